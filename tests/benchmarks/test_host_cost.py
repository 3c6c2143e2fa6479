"""What a loss costs the host, counted with a stand-in for Triton's driver: numbers that only a better design may lower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_counts_of_a_loss_and_its_backward(tmp_path: Path) -> None:
    """In a process of its own, because it compiles kernels. Three launches add entries at the targets: one to d_hidden."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_cost", "--rounds", "3", "--out", str(tmp_path / "rows.json")]
    root = Path(__file__).parents[2]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert out.returncode == 0, out.stderr
    loss, stats = json.loads((tmp_path / "rows.json").read_text())
    assert out.stdout.splitlines()[0].startswith("call eapo_loss and backward, torch_calls ")
    assert loss["torch_calls"] <= 98, "200 at 4b41f60, 150 at 1f9ecb8"
    assert (loss["products"], loss["launches"], loss["descriptors"]) == (2, 9, 3)
    assert (stats["products"], stats["launches"], stats["descriptors"]) == (2, 9, 3)
    assert stats["torch_calls"] <= 15, "those that a custom op hides are not counted"
    assert min(loss["milliseconds"], stats["milliseconds"]) > 0
