"""Every shipped tile compiles for its architecture without spills, on the tensor cores, within
shared memory. Needs no GPU.

Compiling and interpreting exclude each other in one process: run as ``pytest tests/aot``.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from eapo_kernels.ops.triton import tiles
from eapo_kernels.ops.triton.tiles import PRODUCTS, Entry

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs its own process: pytest tests/aot"),
]

SHIPPED = [entry for entry in (*tiles.TABLE, *tiles.RIVALS, *tiles.measured(tiles.MEASURED)) if entry.family != "interpreter"]
BUILDS = [(entry, variant) for entry in SHIPPED for variant in ("plain", "full")]
TENSOR_CORES = {"sm80": "HMMA", "sm90": "HGMMA", "sm100": "UTCHMMA"}
SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
"""Bytes a program may have; sm80 stands for its family, whose consumer cards have 99 KiB."""


def _name(value: object) -> str:
    if not isinstance(value, Entry):
        return str(value)
    t = value.tile
    load = "tma" if t.descriptors else "pointers"
    return f"{value.family}-{value.kernel}-{8 * value.itemsize}bit-{t.block_n}x{t.block_v}x{t.block_d}-{load}"


@pytest.mark.parametrize(("entry", "variant"), BUILDS, ids=_name)
def test_compiles_well(entry: Entry, variant: str) -> None:
    from benchmarks import compiled_code, kernels

    u = compiled_code.triton_usage(kernels.example(entry, variant), compiled_code.ARCHITECTURES[entry.family])
    assert u.spills == 0
    assert u.stack == 0
    assert u.doubles == 0, "a Python float has become fp64 arithmetic"
    assert u.shared <= SHARED_LIMIT[entry.family]
    assert u.threads == 32 * entry.tile.warps
    product = entry.kernel in PRODUCTS
    assert set(u.tensor) == ({TENSOR_CORES[entry.family]} if product and entry.itemsize == 2 else set())
    assert (u.tma[0] > 0) == entry.tile.descriptors
    assert (u.tma[1] > 0) == entry.tile.stores
    if variant == "plain":
        residents = entry.tile.resident
        assert residents * u.threads * (-(-u.registers // 8) * 8) <= 65536, "registers of the programs that share an SM"
        assert residents * (u.shared + 1024) <= SHARED_LIMIT[entry.family] + 1024, "their shared memory"


RESCUES = [
    (family, itemsize, block_v)
    for family in TENSOR_CORES
    for itemsize in (2, 4)
    for block_v in sorted(
        {e.tile.block_v for e in tiles.TABLE if (e.kernel, e.family, e.itemsize) == ("scaled_exp_gemm", family, itemsize)}
    )
]


@pytest.mark.parametrize(("family", "itemsize", "block_v"), RESCUES)
def test_rows_are_rescued_without_spills_for_any_columns(family: str, itemsize: int, block_v: int) -> None:
    """The line of "scaled_exp_rescue" is used with the columns of the first run
    (``scaled_exp.scaled_exp_gemm``)."""
    from dataclasses import replace

    from benchmarks import compiled_code, kernels

    (entry,) = (e for e in tiles.TABLE if (e.kernel, e.family, e.itemsize) == ("scaled_exp_rescue", family, itemsize))
    entry = replace(entry, tile=replace(entry.tile, block_v=block_v))
    u = compiled_code.triton_usage(kernels.example(entry, "full"), compiled_code.ARCHITECTURES[family])
    assert u.spills == 0
    assert u.stack == 0
    assert u.shared <= SHARED_LIMIT[family]


def in_fp16(launch: Any) -> Any:
    """The launch with every bf16 tensor replaced by fp16."""
    from dataclasses import replace

    import torch

    def half(value: Any) -> Any:
        if hasattr(value, "base"):
            return replace(value, base=half(value.base))
        narrow = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        return torch.empty_strided(value.shape, value.stride(), dtype=torch.float16, device="meta") if narrow else value

    return replace(launch, arguments={name: half(value) for name, value in launch.arguments.items()})


def test_half_precision_and_bfloat16_compile_alike() -> None:
    """The table of tiles has one line for both: fp16 operands change neither registers nor instructions."""
    from benchmarks import compiled_code, kernels

    (entry, *_) = (e for e in tiles.TABLE if e.family == "sm90" and e.tile.descriptors and not e.tile.stores)
    launch = kernels.example(entry, "plain")
    half, other = compiled_code.triton_usage(in_fp16(launch), 90), compiled_code.triton_usage(launch, 90)
    assert half.instructions == other.instructions
    assert (half.registers, half.stack, half.shared) == (other.registers, other.stack, other.shared)


@pytest.mark.parametrize("kernel", ["scaled_exp_gemm", "scaled_exp_rescue"])
def test_exponentials_in_fp16_compile_as_in_bfloat16(kernel: str) -> None:
    """Another instruction packs them: spills and memory are as with bf16, in every tile for
    Hopper."""
    from benchmarks import compiled_code, kernels

    for entry in SHIPPED:
        if (entry.family, entry.kernel, entry.itemsize) == ("sm90", kernel, 2):
            launch = kernels.example(entry, "full")
            half, other = compiled_code.triton_usage(in_fp16(launch), 90), compiled_code.triton_usage(launch, 90)
            assert (half.spills, half.stack, half.doubles) == (0, 0, 0)
            assert (half.shared, half.tensor, half.tma) == (other.shared, other.tensor, other.tma)
            assert half.registers <= (entry.tile.max_registers or 255)


@pytest.mark.parametrize("family", TENSOR_CORES)
def test_sums_by_tile_and_over_ranks_do_not_spill(family: str) -> None:
    """The switches of ``collect_rescue_ids`` that only fp16 uses."""
    from dataclasses import replace

    from benchmarks import compiled_code, kernels

    (entry,) = (e for e in tiles.TABLE if (e.family, e.kernel) == (family, "collect_rescue_ids"))
    launch = kernels.example(entry, "full")
    given = {"largest": 65504.0, "everywhere": launch.arguments["row_inv_temperature"]}
    u = compiled_code.triton_usage(replace(launch, arguments=launch.arguments | given), compiled_code.ARCHITECTURES[family])
    assert (u.spills, u.stack, u.doubles) == (0, 0, 0)


def test_numbers_are_passed_as_fp32_and_never_specialised() -> None:
    """A new temperature or soft-cap is a new argument, not a new kernel, 1.0 included."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl

    for value in (0.7, 1.0, 30.0):
        assert native_specialize_impl(CUDABackend, value, False, True, True) == ("fp32", None)


def test_the_table_has_a_line_per_build(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    from benchmarks import compiled_code

    usage = compiled_code.Usage(128, 128, 0, 1024, 256, Counter({"HGMMA.64x256x16": 4, "UTMALDG.2D": 6, "UTMASTG.2D": 2}))
    monkeypatch.setattr(compiled_code, "triton_usage", lambda launch, architecture: usage)
    lines = list(compiled_code.triton_rows("sm90"))
    assert len(lines) == 2 + 2 * sum(entry.family == "sm90" for entry in tiles.TABLE)
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 4 HGMMA | 6 + 2 |" in lines[2]
