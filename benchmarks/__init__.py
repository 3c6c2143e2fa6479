"""Speed, memory and accuracy beside unfused PyTorch and the bare products. From a checkout:
``python -m benchmarks.cpu``."""

import os

# The CPU's memory is read off PyTorch's profiler, which would announce every start and stop; read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
