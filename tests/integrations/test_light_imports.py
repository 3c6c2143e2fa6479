"""The framework-free modules of ``integrations`` import no framework."""

from __future__ import annotations

import subprocess
import sys

FRAMEWORKS = {"transformers", "peft", "trl", "verl", "liger_kernel", "accelerate", "datasets", "triton", "packaging"}


def test_framework_free_modules_import_no_framework() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import eapo_kernels.integrations.hf, eapo_kernels.integrations.liger; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "eapo_kernels" in out.stdout.split()
    assert not set(out.stdout.split()) & FRAMEWORKS
