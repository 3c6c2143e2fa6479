"""The examples run, and their printed rewards rise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str) -> str:
    """The output of an example.

    Raises:
        CalledProcessError: the example failed.
    """
    return subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.parametrize(
    ("name", "framework"), [("hf_eapo.py", "transformers"), ("trl_eapo.py", "trl"), ("verl/steps.py", "transfer_queue")]
)
def test_training_examples_learn(name: str, framework: str) -> None:
    pytest.importorskip(
        framework, reason=f"examples/{name}: {framework} is not installed (verl's: make test-verl)", exc_type=ImportError
    )
    printed = _run(name)
    rewards = [float(number) for number in re.findall(r"reward (\d\.\d+)", printed)]
    weights = [float(number) for number in re.findall(r"weight (\d\.\d+)", printed)]
    assert len(rewards) == len(weights) == 6, printed
    assert rewards[-1] > rewards[0] + 0.1, printed
    assert weights[-1] < 1, "the entropy has fallen, and the weight of the positives with it"


def test_drop_ins_agree_with_plain_pytorch() -> None:
    printed = _run("linear_cross_entropy.py")
    (plain, ours), (error,) = re.findall(r"(?:plain|ours) (\d+\.\d+)", printed), re.findall(r"at most (\S+)", printed)
    assert plain == ours
    assert float(error) < 1e-6
