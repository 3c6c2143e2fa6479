"""Rules that the source itself shows: imports point to lower layers, importing the package is light and changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("eapo_kernels", "trainer", "benchmarks")
LAYERS = {
    "eapo_kernels.errors": 0,
    "eapo_kernels.types": 1,
    "eapo_kernels.traced": 1,
    "eapo_kernels.support": 1,
    "eapo_kernels.reference": 2,
    "eapo_kernels.ops": 3,
    "eapo_kernels.objectives": 3,
    "eapo_kernels.diagnostics": 4,
    "eapo_kernels.loss": 5,
    "eapo_kernels": 6,
    "eapo_kernels.testing": 6,
    "eapo_kernels.selftest": 7,
    "eapo_kernels.tune": 7,
    "eapo_kernels.__main__": 8,
    "eapo_kernels.integrations": 7,
    "trainer": 8,
    "benchmarks": 8,
    "benchmarks.experiments": 9,
}
SIBLINGS = [("eapo_kernels.ops", "eapo_kernels.objectives"), ("eapo_kernels.ops", "eapo_kernels.reference"),
            ("eapo_kernels.objectives", "eapo_kernels.reference"), ("eapo_kernels.loss", "eapo_kernels.reference"),
            ("trainer", "benchmarks")]  # fmt: skip
# Each part of the trainer imports only those before it, not even for its types.
TRAINER = (
    "errors", "ranks", "records", "config", "dataset", "models", "rewards", "learning", "runs", "rollouts",
    "evaluation", "dry_run", "loop", "commands", "__main__",
)  # fmt: skip
EXCEPTIONS: set[tuple[str, str]] = set()
# Reward functions of users, kernels of peers: what they raise is a result.
BORDERS = ("trainer/rewards/calls.py", "benchmarks/measure.py")


def _unit(module: str) -> str | None:
    """The layer a module belongs to: the longest prefix in LAYERS."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LAYERS and (name != "eapo_kernels" or length == len(parts)):
            return name
    return None


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, at any depth of its code."""
    package = _module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{prefix}.{alias.name}" for alias in node.names]
    return found


def _files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    for path in _files(package):
        own = _unit(_module_name(path))
        assert own is not None, f"{path} belongs to no layer"
        for imported in _imports(path):
            other = _unit(imported)
            if imported.startswith("eapo_kernels.") and other is None and own not in ("eapo_kernels",):
                other = "eapo_kernels"  # a name from the package itself
            if other is None or other == own or (_module_name(path), imported) in EXCEPTIONS:
                continue
            assert LAYERS[other] <= LAYERS[own], f"{path} of {own} imports {imported}, which lies above it"
            assert (own, other) not in SIBLINGS, f"{path} of {own} imports {imported}"
            assert (other, own) not in SIBLINGS or own == "eapo_kernels.reference", f"{path} of {own} imports {imported}"


def test_imports_of_the_trainer_point_down() -> None:
    for path in _files("trainer"):
        own = _module_name(path).split(".")[1:2]
        for imported in _imports(path):
            top, *part = imported.split(".")[:2]
            if top == "trainer" and part != own:
                assert TRAINER.index(part[0]) < TRAINER.index(own[0]), f"{path} imports {imported}, which lies above it"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_swallowed_errors(package: str) -> None:
    """Only calls of code outside the project may catch everything; they report the failure with the input it failed on."""
    for path in _files(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                broad = caught in ("everything", "Exception", "BaseException")
                border = path.relative_to(ROOT).as_posix() in BORDERS
                assert raises or border or not broad, f"{path}:{node.lineno} swallows {caught}"


def test_import_is_light() -> None:
    code = (
        "import sys, os, torch; before = dict(os.environ), set(sys.modules); import eapo_kernels; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before[1]}; "
        "assert dict(os.environ) == before[0]; print(sorted(new))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "'eapo_kernels'" in out.stdout
    for heavy in ("triton", "cuda", "transformers", "numpy", "trainer", "trl", "verl", "vllm"):
        assert f"'{heavy}'" not in out.stdout, out.stdout
