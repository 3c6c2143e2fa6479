"""Run the tests of other packages against this package's drop-ins, on a CPU. By hand; not collected.

    python tests/integrations/peer_suites.py liger-cross-entropy path/to/Liger-Kernel [pytest arguments]

The checkout of the package is read only: its functions are replaced in this process, and tests that
name a GPU are copied with "cpu" in its place into a temporary folder. Nothing of it is kept.
docs/integrations.md has the counts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest.mock import MagicMock

import pytest

from eapo_kernels.integrations import liger, linear_cross_entropy
from eapo_kernels.integrations.head import PrimeHead


@dataclass(frozen=True)
class Suite:
    """A part of a package's tests.

    Attributes:
        tests: files in the checkout.
        paths: folders of the checkout to import from.
        replace: puts the drop-ins in place, before the tests are imported.
        select: pytest's -k: the tests that call what is replaced and need no GPU.
        package: what this package imports, and these tests do not use, may be missing: mocks stand for it.
    """

    tests: tuple[str, ...]
    paths: tuple[str, ...]
    replace: Callable[[], None]
    select: str = ""
    package: str | None = None


class _Applied:
    """What a test calls as ``Function.apply``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.apply = function


def _set(module: str, **names: Any) -> None:
    found = importlib.import_module(module)
    for name, value in names.items():
        assert hasattr(found, name), f"{module}: expected a name {name}"
        setattr(found, name, value)


def _apple() -> None:
    def call(
        e: Any, c: Any, targets: Any, bias: Any = None, ignore_index: int = -100, softcap: float | None = None,
        reduction: str = "mean", shift: int = 0, return_lse: bool = False, **own: Any,
    ) -> Any:  # fmt: skip
        unknown = own.keys() - {"impl", "filter_eps", "accum_e_fp32", "accum_c_fp32", "filter_e_grad", "filter_c_grad"}
        assert not unknown, f"expected the arguments of linear_cross_entropy, got {unknown}"
        return linear_cross_entropy(
            e, c, targets, bias, ignore_index=ignore_index, softcap=softcap, reduction=reduction, shift=shift,
            return_lse=return_lse,
        )  # fmt: skip

    _set("cut_cross_entropy", linear_cross_entropy=call)


def _liger_cross_entropy() -> None:
    def apply(*arguments: Any) -> tuple[Any, ...]:
        found = liger.liger_fused_linear_cross_entropy(*arguments)
        if not isinstance(found, liger.CrossEntropyOutput):
            return found, None, None, None
        return found.loss, found.z_loss, found.token_accuracy, found.predicted_tokens

    _set("liger_kernel.ops", LigerFusedLinearCrossEntropyFunction=_Applied(apply))
    _set(
        "liger_kernel.transformers.functional", CrossEntropyOutput=liger.CrossEntropyOutput,
        liger_fused_linear_cross_entropy=liger.liger_fused_linear_cross_entropy,
    )  # fmt: skip
    module = "liger_kernel.transformers.fused_linear_cross_entropy"
    _set(module, LigerFusedLinearCrossEntropyLoss=liger.LigerFusedLinearCrossEntropyLoss)


def _liger_grpo() -> None:
    _set("liger_kernel.chunked_loss", LigerFusedLinearGRPOLoss=liger.LigerFusedLinearGRPOLoss)
    _set("liger_kernel.chunked_loss.functional", liger_fused_linear_grpo=liger.liger_fused_linear_grpo)
    function = _Applied(liger.liger_fused_linear_grpo)
    _set("liger_kernel.chunked_loss.grpo_loss", LigerFusedLinearGRPOFunction=function)


def _prime_rl() -> None:
    for module in ("models.llama", "rl.loss"):  # imported by the tests
        importlib.import_module(f"prime_rl.trainer.{module}")
    importlib.import_module("loguru")  # by the first message of a log
    _set("prime_rl.trainer.models.layers.lm_head", FusedOutputLinear=PrimeHead)


SUITES = {
    "apple": Suite(
        ("tests/test_cce_loss_forward.py", "tests/test_cce_loss_backward.py"), (".",), _apple,
        select="not torch_compile and not cce_exact",  # the same call here
    ),
    "liger-cross-entropy": Suite(
        ("test/transformers/test_fused_linear_cross_entropy.py",), ("src", "."), _liger_cross_entropy
    ),
    "liger-grpo": Suite(("test/chunked_loss/test_grpo_loss.py",), ("src", "."), _liger_grpo, select="not triton"),
    "prime-rl": Suite(
        ("tests/unit/train/rl/test_fused_lm_head.py",), ("src", "packages/prime-rl-configs/src"), _prime_rl, package="prime_rl",
    ),
}  # fmt: skip


class _Mock(MagicMock):
    """A mock that leaves a function which it decorates as it is."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        decorated = len(arguments) == 1 and not keywords and isinstance(arguments[0], FunctionType)
        return arguments[0] if decorated else super().__call__(*arguments, **keywords)


class _Mocked(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports packages that are not installed as mocks."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        module = _Mock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module: Any) -> None:
        pass


def _replace(suite: Suite) -> None:
    """Put the drop-ins in place, with mocks of what the package imports in vain."""
    mocked = _Mocked()
    sys.meta_path.append(mocked)  # behind the finders of what is installed
    while True:
        try:
            return suite.replace()
        except ModuleNotFoundError as error:
            missing = str(error.name).split(".")[0]
            if suite.package is None or missing in (suite.package, *mocked.names):
                raise
            print(f"not installed, mocked: {missing}")
            mocked.names.add(missing)
            for name in [name for name in sys.modules if name.split(".")[0] == suite.package]:
                del sys.modules[name]


class _Counts:
    """A pytest plugin that counts outcomes."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("checkout", type=Path)
    given, others = parser.parse_known_args()
    suite, root = SUITES[given.suite], given.checkout.resolve()
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(root / path) for path in suite.paths]
    _replace(suite)
    counts = _Counts()
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for test in suite.tests:
            text = (root / test).read_text()
            copy = Path(folder, Path(test).name)
            copy.write_text(text.replace('"cuda"', '"cpu"').replace("not torch.cuda.is_available()", "False"))
            files.append(str(copy))
        select = ["-k", suite.select] if suite.select else []
        arguments = [*files, *select, "-q", "-p", "no:cacheprovider", "--rootdir", folder, "-c", "/dev/null", *others]
        status = pytest.main(arguments, plugins=[counts])
    total = sum(counts.outcomes.values())
    print(f"{given.suite}: {counts.outcomes['passed']} of {total} pass; {dict(counts.outcomes)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
