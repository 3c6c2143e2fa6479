"""Both backends on CPU tensors: every launch is compiled for a GPU and runs on the emulator."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import emulated_cuda
import emulated_triton
import pytest

from benchmarks import compiled_code
from eapo_kernels.ops import cuda, triton
from eapo_kernels.ops.lm_head import Projection

PROGRAMS = 3
"""Programs (or clusters) of a persistent kernel: few, so that each walks over several tiles."""


def _modules(package: ModuleType) -> list[ModuleType]:
    names = [one.name for one in pkgutil.iter_modules(package.__path__) if not one.name.startswith("__")]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def pretend(monkeypatch: pytest.MonkeyPatch, *, family: str = "sm90", dim: int | None = None, **how: Any) -> None:
    """Send every launch of this process to the emulator. The process must not interpret Triton
    kernels.

    family: sm80, sm90 or sm100; the backend ``cuda`` needs sm90. dim: selects lines of Triton's
    table of tiles, in the place of the inputs' D. how: ``seed`` and ``lateness`` of
    ``ptx_machine.Kernel.run``.
    """
    major = compiled_code.ARCHITECTURES[family] // 10
    instead = {"family": lambda device: family, "slots": lambda device, tile: PROGRAMS, "capability": lambda device: (major, 0)}
    for module in [*_modules(triton), *_modules(cuda)]:
        for name, value in instead.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    runs = ((triton, partial(emulated_triton.run, family=family)), (cuda, emulated_cuda.run))
    for package, run in runs[: 2 if family == "sm90" else 1]:
        launch = importlib.import_module(f"{package.__name__}.{'common' if package is triton else 'launch'}").Launch
        monkeypatch.setattr(launch, "__call__", lambda one, run=run: run(one, **how))
        backend = importlib.import_module(f"{package.__name__}.backend")
        monkeypatch.setattr(backend, "BACKEND", replace(backend.BACKEND, supports=lambda projection: None))
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda p: p.hidden.dtype))
    if dim is not None:
        tiles = importlib.import_module(f"{triton.__name__}.tiles")
        find = tiles.find

        def chosen(kernel: str, family: str, itemsize: int, *shape: int, **more: Any) -> Any:
            return find(kernel, family, itemsize, *((dim, *shape[1:]) if shape else ()), **more)

        monkeypatch.setattr(tiles, "find", chosen)
