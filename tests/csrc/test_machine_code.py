"""Every build compiles for sm_90a without spills, on tensor cores fed by TMA, within the budgets of
csrc/README.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import compiled_code
from eapo_kernels.ops.cuda import build, tiles
from eapo_kernels.ops.cuda.tiles import SHARED_LIMIT, THREADS, TILES, Build

pytestmark = pytest.mark.csrc

CONSUMER_REGISTERS = 232


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("item", list(tiles.builds()), ids=lambda item: str(item).replace(" ", "-"))
def test_compiles_well(item: Build, cache: Path) -> None:
    u = compiled_code.cuda_usage(item, cache)
    code, count = u, u.instructions
    assert (code.spills, code.stack) == (0, 0)
    assert u.shared == item.shared_bytes <= SHARED_LIMIT, "the launch names all of it"
    assert THREADS * code.registers <= 65536, "registers at launch"
    assert code.highest <= CONSUMER_REGISTERS, "registers after setmaxnreg"
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
    assert count["UTMASTG"] == (t.block_v // 64 * blocks if item.kernel == "scaled_exp_gemm" else 0)
    assert count["STSM"] == 4 * count["UTMASTG"]
    pack = {"bf16": "F2FP.BF16.F32.PACK_AB", "fp16": "F2FP.F16.F32.PACK_AB"}[item.operand]
    assert code.mnemonics[pack] == 4 * count["STSM"]


def test_registers_after_setmaxnreg_fit_the_multiprocessor() -> None:
    text = (build.source_folder() / "consumer.h").read_text()
    producer, consumer = (
        int(text.split(f"constexpr int {name}_REGISTERS = ")[1].split(";")[0]) for name in ("PRODUCER", "CONSUMER")
    )
    assert consumer == CONSUMER_REGISTERS
    assert 128 * producer + 256 * consumer <= 65536
    assert producer % 8 == consumer % 8 == 0


def test_serialised_wgmma_is_an_error(tmp_path: Path) -> None:
    """The compiler cannot keep products in flight across a function call; it only remarks that it
    waits after each.
    """
    sources = Path(shutil.copytree(build.source_folder(), tmp_path / "sources"))
    header = sources / "ptx.h"
    text = header.read_text()
    broken = text.replace("__forceinline__ void multiply<256>", "__noinline__ void multiply<256>")
    assert broken != text
    header.write_text(broken)
    with pytest.raises(build.BuildError, match="serialized"):
        build.compile_source(Build("stream_statistics", TILES[0], "bf16", entropy=True), sources)
