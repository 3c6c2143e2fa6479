"""How much of an epilogue falls into the other group's products: predicted by the kernels' own loops
against a clock (timing.cpp).

Nothing here was measured. ``ASSUMED`` says what it rests on; ``python tests/csrc/test_overlap.py`` prints the tables of
csrc/README.md, and a test keeps them the model's.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import issue_times
import pytest
from host_library import compiled

from benchmarks import compiled_code
from eapo_kernels.ops.cuda import build
from eapo_kernels.ops.cuda.configs import TILES, ProductBuild, ProductKernel

pytestmark = pytest.mark.csrc

DEPTHS = (512, 1024, 2048, 3584, 4096, 8192)
SHAPES = {  # as in timing.cpp
    "shared, no stagger": 0,
    "shared, stagger 1": 1,
    "shared, stagger 2": 2,
    "**shared, stagger 3**": 3,
    "shared, stagger 2, 3 stages": 4,
    "shared, stagger 3, 5 stages (does not fit)": 5,
    "**shared_alone, stagger 2**": 6,
    "shared_alone, stagger 3": 7,
    "pingpong": 8,
}
NO_STAGGER, LATE, SHARED, ALONE, PINGPONG = 0, 2, 3, 6, 8

ASSUMED = {
    "latency": 800.0, "bandwidth": 44.0, "jitter": 0.0, "barrier": 40.0, "remote": 200.0, "start": 30.0, "drain": 30.0,
    "produce": 60.0, "alone": 0.0, "together": 0.0, "store": 60.0, "read": 500.0, "pause": 0.0,
    "passes": 0, "arbiter": 0, "paused": 0, "at": -1,
}  # fmt: skip
"""In clocks and bytes a clock; timing.cpp names them."""

PRODUCT: dict[str, float] = {"alone": 1e-3, "together": 1e-3}
STATISTICS: dict[str, float] = {"alone": 1600, "together": 2700}
EXP_GEMM: dict[str, float] = {"alone": 1600, "together": 2700, "passes": 2}
"""Epilogues of 64 x 256 logits, rounded from what issue_times.py reads in the machine code (a test holds them to it)."""


class Numbers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int if isinstance(value, int) else ctypes.c_double) for name, value in ASSUMED.items()]


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return compiled(Path(folder) / "timing.so", "timing.cpp")


def run(shape: int, dim: int, tiles: int = 0, **numbers: float) -> tuple[list[float], list[int]]:
    """(clocks at which each tile is finished, steps by which group 1 is behind at each epilogue of group 0)."""
    steps = dim // 64
    tiles = tiles or max(16, 400 // steps)
    finish, lag = (ctypes.c_double * tiles)(), (ctypes.c_int * tiles)()
    done = library().time_tiles(shape, ctypes.byref(Numbers(**ASSUMED | numbers)), tiles, steps, finish, lag)
    assert done == tiles, "the program never ends"
    return list(finish), list(lag)


@cache
def _pace(shape: int, dim: int, numbers: tuple[tuple[str, float], ...]) -> float:
    """Time over that of the tensor cores alone, first and last tiles left out."""
    finish, _ = run(shape, dim, **dict(numbers))
    first, last = len(finish) // 4 // 2 * 2, (len(finish) - 1) // 2 * 2
    columns = 128 if shape == PINGPONG else 256
    return (finish[last] - finish[first]) / (last - first) / (dim / 16 * columns)


def pace(shape: int, dim: int, **numbers: float) -> float:
    return _pace(shape, dim, tuple(sorted(numbers.items())))


def over_product(shape: int, dim: int, epilogue: dict[str, float], **numbers: float) -> float:
    """Time over that of the without_guess product on the same machine, without an epilogue and turns."""
    return pace(shape, dim, **epilogue | numbers) / pace(NO_STAGGER, dim, **PRODUCT | numbers)


def scaled(epilogue: dict[str, float], factor: float) -> dict[str, float]:
    return epilogue | {name: epilogue[name] * factor for name in ("alone", "together")}


def percent(ratio: float) -> str:
    return f"{max(100 * (ratio - 1), 0):.1f}"


def by_depth() -> Iterator[str]:
    yield f"| over the tensor cores' time, % | {' | '.join(f'D = {dim}' for dim in DEPTHS)} |"
    yield "|---" * (1 + len(DEPTHS)) + "|"
    for name, shape in SHAPES.items():
        cells = [" / ".join(percent(pace(shape, dim, **e)) for e in (STATISTICS, EXP_GEMM)) for dim in DEPTHS]
        yield f"| {name} | {' | '.join(cells)} |"


MACHINES = {
    "as assumed": ({}, 1.0),
    "TMA latency 1600": ({"latency": 1600.0}, 1.0),
    "TMA latency varies by half": ({"jitter": 0.5}, 1.0),
    "29 bytes a clock from L2": ({"bandwidth": 44 / 1.5}, 1.0),
    "56 bytes a clock from L2": ({"bandwidth": 56.0}, 1.0),
    "epilogue 1.5 times as long": ({}, 1.5),
    "epilogue two thirds as long": ({}, 1 / 1.5),
    "wgmma in order of issue": ({"arbiter": 1}, 1.0),
    "wgmma of one group while it can": ({"arbiter": 2}, 1.0),
}
RACED = {"no stagger": NO_STAGGER, "stagger 2": LATE, "stagger 3": SHARED, "pingpong": PINGPONG}


def by_machine() -> Iterator[str]:
    yield f"| over the without_guess product, %: D = 1024, D = 3584 | {' | '.join(RACED)} |"
    yield "|---" * (1 + len(RACED)) + "|"
    for name, (changes, factor) in MACHINES.items():
        epilogue = scaled(STATISTICS, factor)
        cells = [
            ", ".join(percent(over_product(shape, dim, epilogue, **changes)) for dim in (1024, 3584))
            for shape in RACED.values()
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def test_the_tables_of_the_readme_are_the_models() -> None:
    text = (build.source_folder() / "README.md").read_text()
    assert "\n".join(by_depth()) in text
    assert "\n".join(by_machine()) in text


def test_shapes_are_those_that_ship() -> None:
    found = {name.strip("*").split(",")[0]: name for name in SHAPES if "**" in name or name == "pingpong"}
    assert list(found) == [tile.name for tile in TILES]
    assert all(tile.pingpong or f"stagger {tile.stagger}" in found[tile.name] for tile in TILES)


@pytest.mark.parametrize("dim", DEPTHS)
def test_a_bare_product_keeps_the_tensor_cores_busy(dim: int) -> None:
    assert pace(NO_STAGGER, dim, **PRODUCT) < 1.05
    assert pace(PINGPONG, dim, **PRODUCT) == pytest.approx(48 / 44, abs=0.01), "L2 decides"


@pytest.mark.parametrize(("dim", "bar"), [(1024, 1.15), (3584, 1.03), (4096, 1.03), (8192, 1.03)])
def test_statistics_are_within_the_bars(dim: int, bar: float) -> None:
    assert over_product(SHARED, dim, STATISTICS) < bar
    assert over_product(SHARED, dim, STATISTICS, jitter=0.5) < bar
    assert over_product(SHARED, dim, STATISTICS, bandwidth=44 / 1.5) < bar


@pytest.mark.parametrize("epilogue", [STATISTICS, EXP_GEMM], ids=["statistics", "scaled_exp_gemm"])
@pytest.mark.parametrize("dim", [1024, 4096])
def test_without_stagger_it_is_worse(dim: int, epilogue: dict[str, float]) -> None:
    for arbiter in (0, 1, 2):
        without, late, later = (over_product(shape, dim, epilogue, arbiter=arbiter) - 1 for shape in (NO_STAGGER, LATE, SHARED))
        assert later < 0.75 * without
        assert late < without


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("kernel", "epilogue"), [("stream_statistics", STATISTICS), ("scaled_exp_gemm", EXP_GEMM)])
def test_epilogues_take_what_the_machine_code_says(
    kernel: ProductKernel, epilogue: dict[str, float], entropy: bool, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(build.cubin(ProductBuild(kernel, TILES[0], "bf16", entropy), cache=tmp_path))
    command = [compiled_code.disassembler(), "--dump-sass", str(cubin)]
    path = issue_times.epilogue(issue_times.parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert sum(one.name == "MUFU" for one in path) >= 128
    assert not any(one.name == "HGMMA" for one in path)
    assert issue_times.clocks(path) == pytest.approx(epilogue["alone"], rel=0.1)
    assert issue_times.clocks(path, warps=2) == pytest.approx(epilogue["together"], rel=0.1)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("shape", [LATE, SHARED])
def test_the_lag_is_regained_after_a_disturbance(shape: int, group: int) -> None:
    finish, lag = run(shape, 2048, **STATISTICS, pause=6000, paused=group, at=6)
    assert set(lag) == {shape + 1}, "the steps that the second group stops before, and one that it has not released"
    times = [b - a for a, b in pairwise(finish)]
    assert max(times) > 1.1 * times[4], "the disturbance"
    assert math.isclose(sum(times[9:13]), sum(times[1:5]), rel_tol=5e-3)


def test_without_turns_the_lag_is_only_what_it_happens_to_be() -> None:
    """It neither grows by itself nor comes to what an epilogue needs."""
    _, lag = run(NO_STAGGER, 2048, **STATISTICS, pause=1500, paused=1, at=3)
    assert max(lag) < 3


def test_pingpong_hides_any_epilogue_and_waits_for_l2() -> None:
    for dim in (512, 1024, 4096):
        assert pace(PINGPONG, dim, **scaled(EXP_GEMM, 1.5)) < 1.02 * pace(PINGPONG, dim, **PRODUCT)
    assert pace(PINGPONG, 1024, **STATISTICS, bandwidth=56) < pace(SHARED, 1024, **STATISTICS, bandwidth=56)
    assert pace(PINGPONG, 1024, **STATISTICS) > pace(SHARED, 1024, **STATISTICS)


if __name__ == "__main__":
    print(*by_depth(), "", *by_machine(), sep="\n")
