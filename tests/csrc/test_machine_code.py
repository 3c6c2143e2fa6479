"""Every kernel in every configuration: compiles for sm_90a without spills, on tensor cores fed by TMA, within the budgets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compiled_code, kernels
from eapo_kernels.ops.cuda import build, configs
from eapo_kernels.ops.cuda.configs import TILES, ProductBuild, RowBuild
from eapo_kernels.ops.cuda.tile import SHARED_LIMIT

pytestmark = pytest.mark.csrc


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("item", list(configs.product_builds()), ids=lambda item: str(item).replace(" ", "-"))
def test_compiles_well(item: ProductBuild, cache: Path) -> None:
    u = compiled_code.cuda_usage(item, cache)
    code, count = u, u.instructions
    assert code.spills == 0
    assert code.stack == 0
    assert u.shared == item.shared_bytes <= SHARED_LIMIT, "all of it is named at launch"
    assert configs.THREADS * code.registers <= 65536, "a program must start"
    assert code.highest <= 232, "what a consumer has after the trade"
    assert count["DADD"] + count["DMUL"] + count["DFMA"] == 0
    t = item.tile
    wide, blocks = ("64x256x16", 1) if t.block_v == 256 else ("64x128x16", 2)
    kind = {"bf16": ".F32.BF16", "fp16": ".F32"}[item.operand]
    assert code.mnemonics[f"HGMMA.{wide}{kind}"] == count["HGMMA"] == 4 * blocks
    assert count["WARPGROUP"] == 3, "one fence, one wait that leaves a step in flight, one that leaves none"
    assert code.mnemonics["MEMBAR.ALL.GPU"] == (2 if t.cluster == 2 else 0), "at the two cluster barriers, never in a loop"
    assert count["UTMALDG"] == 2
    assert code.mnemonics["UTMALDG.2D.MULTICAST"] == (1 if t.cluster == 2 else 0)
    assert count["USETMAXREG"] == 2
    fused = item.kernel == "scaled_exp_gemm"
    assert count["UTMASTG"] == (t.block_v // 64 * blocks if fused else 0)
    assert count["STSM"] == 4 * count["UTMASTG"]
    pack = {"bf16": "F2FP.BF16.F32.PACK_AB", "fp16": "F2FP.F16.F32.PACK_AB"}[item.operand]
    assert code.mnemonics[pack] == 4 * count["STSM"]


WIDE_LOADS = {"row_offsets": 8, "finalize": 7, "scaled_exp_finalize": 8}
"""Of 16 bytes, in the loop over whole lines: four steps of two rows; a range's fields; four tiles of two fields."""


PARTS = {"row_offsets": 0, "finalize": 7, "scaled_exp_finalize": 4}
"""Fields that the warps of a program merge through shared memory."""


@pytest.mark.parametrize("item", list(configs.row_builds()), ids=str)
def test_rows_are_read_wide_and_nothing_spills(item: RowBuild, cache: Path) -> None:
    u = compiled_code.cuda_usage(item, cache)
    code, count = u, u.instructions
    assert (code.spills, code.stack) == (0, 0)
    assert u.shared == PARTS[item.kernel] * item.threads // 32 * item.rows * 4, "a number a field, warp and row"
    assert code.mnemonics["LDG.E.128"] == WIDE_LOADS[item.kernel]
    assert 2 * item.threads * (-(-code.registers // 8) * 8) <= 65536, "two programs share a multiprocessor"
    assert count["DADD"] + count["DMUL"] + count["DFMA"] == 0
    assert not {"HGMMA", "HMMA", "UTMALDG", "UTMASTG", "ATOMG", "ATOM", "RED"} & set(count), "no product, no atomics"
    if item.kernel == "row_offsets":
        assert code.registers <= 40, "48 warps share a multiprocessor, which keeps memory busy"


RACED = {replace(tile, group_n=1): None for tile in kernels.cuda_tiles("scaled_exp_gemm", 4096, 4096)}


@pytest.mark.parametrize("kernel", ["stream_statistics", "scaled_exp_gemm"])
def test_every_tile_that_is_raced_compiles_well(kernel: configs.ProductKernel, cache: Path) -> None:
    """With every switch on, the shipped ones left out."""
    assert len(RACED) == 8
    for tile in RACED:
        if not any(replace(tile, name="", group_n=1) == replace(shipped, name="", group_n=1) for shipped in TILES):
            item = ProductBuild(kernel, tile, "bf16", entropy=True, second_moments=kernel == "stream_statistics", bias=True)
            u = compiled_code.cuda_usage(item, cache)
            assert (u.spills, u.stack) == (0, 0), item
            assert u.shared <= SHARED_LIMIT
            assert u.highest <= 232


def test_the_budget_of_registers_is_the_multiprocessors() -> None:
    text = (build.source_folder() / "consumer.h").read_text()
    producer, consumer = (
        int(text.split(f"constexpr int {name}_REGISTERS = ")[1].split(";")[0]) for name in ("PRODUCER", "CONSUMER")
    )
    assert 128 * producer + 256 * consumer <= 65536
    assert producer % 8 == 0
    assert consumer % 8 == 0


def test_a_wgmma_that_the_compiler_serialises_is_an_error(tmp_path: Path) -> None:
    """It cannot keep products in flight across a function call: it waits after each, and only says so."""
    sources = Path(shutil.copytree(build.source_folder(), tmp_path / "sources"))
    header = sources / "wgmma.h"
    text = header.read_text()
    broken = text.replace("__forceinline__ void multiply<256>", "__noinline__ void multiply<256>")
    assert broken != text
    header.write_text(broken)
    with pytest.raises(build.BuildError, match="serialized"):
        build.compile_source(ProductBuild("stream_statistics", TILES[0], "bf16", entropy=True), sources)


def test_the_table_has_a_line_per_build(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    one = compiled_code.cuda_usage(ProductBuild("scaled_exp_gemm", TILES[0], "bf16", entropy=True), cache)
    monkeypatch.setattr(compiled_code, "cuda_usage", lambda item: one)
    lines = list(compiled_code.cuda_rows())
    assert len(lines) == 2 + len(list(configs.builds()))
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 4 | 2 + 4 | 16 |" in lines[2]
