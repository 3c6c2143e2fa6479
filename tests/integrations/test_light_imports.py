"""Adapters import their framework when used, not before; those that name it at the top say so."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = ("weight", "versions", "head", "hf", "liger", "cross_entropy", "advantage_hooks", "loss_hooks")
FRAMEWORKS = ("transformers", "peft", "trl", "verl", "liger_kernel", "accelerate", "datasets", "triton", "megatron", "prime_rl")


@pytest.mark.parametrize("name", LIGHT)
def test_importing_an_adapter_imports_no_framework(name: str) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); "
        f"import eapo_kernels.integrations.{name}; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "eapo_kernels" in out.stdout.split()
    assert not set(out.stdout.split()) & set(FRAMEWORKS)
