"""Speed, memory and accuracy beside unfused PyTorch and the bare products. From a checkout: ``python -m benchmarks.cpu``."""
