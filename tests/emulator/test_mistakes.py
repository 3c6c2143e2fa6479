"""The emulator finds 25 deliberate mistakes in the sources of ``scaled_exp_gemm``, of kinds that
occur in real kernels.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import emulated_cuda
import pytest
import torch
from ptx_machine import Fault, Kernel

from eapo_kernels.ops.cuda import build, launch
from eapo_kernels.ops.cuda.launch import Launch
from eapo_kernels.ops.cuda.tiles import TILES
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.testing import make_inputs

pytestmark = pytest.mark.csrc

SCHEDULES = [(0, 0.0), (1, 0.5), (2, 0.95), (3, 0.999), (4, 0.8), (5, 0.3), (6, 0.99)]
"""Seeds and latenesses of the emulator, tried until one shows the mistake."""

WRONG = "wrong numbers"


class Mistake(NamedTuple):
    """In ``file`` replace ``right`` by ``wrong``; ``found`` matches the emulator's complaint."""

    file: str
    right: str
    wrong: str
    found: str
    tile: str = "shared"


MISTAKES = {
    "products are not fenced": Mistake("consumer.h", "multiply_fence();", "", "expected wgmma.fence"),
    "a stage is released while it is read": Mistake(
        "consumer.h", "multiply_wait<PENDING>();", "if (!PENDING) multiply_wait<0>();", "before it is written again"
    ),
    "one warp too many frees a stage": Mistake(
        "consumer.h", "barrier_init(shared.empty(stage), Kernel::EMPTY_ARRIVALS)",
        "barrier_init(shared.empty(stage), Kernel::EMPTY_ARRIVALS - 1)",
        "arrivals a phase, got one more|before it is written again",
    ),
    "one warp too few frees a stage": Mistake(
        "consumer.h", "barrier_init(shared.empty(stage), Kernel::EMPTY_ARRIVALS)",
        "barrier_init(shared.empty(stage), Kernel::EMPTY_ARRIVALS + 1)", "deadlock",
    ),
    "more bytes are announced than come": Mistake(
        "consumer.h", "shared.full(stage), Kernel::STAGE_BYTES", "shared.full(stage), Kernel::STAGE_BYTES + 16", "deadlock"
    ),
    "the producer does not wait": Mistake(
        "pipeline.h", "m.wait_empty(stage, parity_of<S>(p) ^ 1);", "", "before it is written again|arrivals a phase"
    ),
    "consumers do not wait": Mistake(
        "pipeline.h", "m.wait_full(stage_of<S>(p), parity_of<S>(p));", "", "unwritten ones"
    ),
    "a program leaves while its peer still sends": Mistake(
        "consumer.h", "if (Kernel::CLUSTER > 1) cluster_sync();", "", "still runs"
    ),
    "stores for TMA are not fenced": Mistake("scaled_exp_gemm.cu", "fence_for_tma();", "", "expected fence.proxy.async"),
    "a buffer is written before TMA has read it": Mistake(
        "scaled_exp_gemm.cu", "box_store_wait<0>();  // earlier stores", "// earlier stores", "before it is written again"
    ),
    "TMA stores before all warps have written": Mistake(
        "scaled_exp_gemm.cu", "fence_for_tma();\n        named_sync(GROUP_BARRIER + group, WARP_GROUP);", "fence_for_tma();",
        f"{WRONG}|unwritten ones|before it is written again|expected fence.proxy.async",
    ),
    "the kernel ends before its stores": Mistake(
        "scaled_exp_gemm.cu", "if (thread == 0) box_store_wait<0>();", "", "copy to be waited for|waits for its stores"
    ),
    "the swizzle of what leaves": Mistake("layout.h", "(chunk ^ row % SWIZZLE_ROWS) << 4", "chunk << 4", WRONG),
    "the distance of row groups in a descriptor": Mistake(
        "layout.h", "between = SWIZZLE_ROWS * SWIZZLE_BYTES >> 4", "between = SWIZZLE_BYTES >> 4", WRONG
    ),
    "accumulators of two tiles are added up": Mistake("consumer.h", "!(first && k == 0)", "true", WRONG),
    "a column fragment's place": Mistake(
        "layout.h", "i / 4 * 8 + thread % 4 * 2 + i % 2", "i / 4 * 8 + thread % 4 + i % 2 * 4", WRONG
    ),
    "barriers are not fenced": Mistake("consumer.h", "barrier_init_fence();", "", "expected fence.mbarrier_init"),
    "a program starts before its peer's barriers exist": Mistake(
        "consumer.h", "cluster_sync();\n    }\n    if (role == 0)", "__syncthreads();\n    }\n    if (role == 0)",
        "expected an initialised barrier|expected a cluster barrier between",
    ),
    "an arrival at a peer as if it were at home": Mistake(
        "ptx.h", "mbarrier.arrive.shared::cluster.b64 _, [remote]", "mbarrier.arrive.shared::cta.b64 _, [remote]",
        "expected the program's own",
    ),
    "the warps of a group multiply different rows": Mistake(
        "consumer.h", "operand_descriptor(shared.hidden(stage) + part)",
        "operand_descriptor(shared.hidden(stage) + part + thread / WARP * 2048)", "the same product in all four warps",
    ),
    "the producer keeps its registers": Mistake("consumer.h", "give_registers<PRODUCER_REGISTERS>();", "", "deadlock"),
    "consumers take more registers than there are": Mistake(
        "consumer.h", "CONSUMER_REGISTERS = 232", "CONSUMER_REGISTERS = 240", "deadlock"
    ),
    "a turn too few": Mistake("pipeline.h", "if (staggered && group == 0) m.give_turn();", "", "deadlock"),
    "ping-pong without turns": Mistake(
        "pipeline.h", "if (S::PINGPONG && number > 0) m.await_turn();", "",
        f"{WRONG}|deadlock|left over|unwritten|written again", "pingpong",
    ),
}  # fmt: skip


def problem(tile_name: str) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """A launch of ``scaled_exp_gemm`` with several tiles per program, its matrix, and the exact
    result.
    """
    (tile,) = (one for one in TILES if one.name == tile_name)
    inputs = make_inputs(300, 392, 1031, dtype=torch.bfloat16)
    p = Projection(inputs.hidden.detach(), inputs.weight.detach())
    sums = launch.scaled_exp_sums(p, True, tile=tile)
    z = p.hidden.double() @ p.weight.double().T
    sums.offsets[0] = (z.logsumexp(1) * 1.4426950408889634).float()
    expected = torch.exp2(z * 1.4426950408889634 - sums.offsets[0].double()[:, None]).scatter_(1, inputs.targets[:, None], 0.0)
    matrix = torch.zeros(300, 1032, dtype=torch.bfloat16)[:, :1031]
    return launch.scaled_exp_gemm(p, inputs.targets, sums, matrix, tile=tile), matrix, expected


def complaint(one: Launch, code: Kernel, matrix: torch.Tensor, expected: torch.Tensor, seed: int, lateness: float) -> str:
    """What is wrong with a run, or an empty string."""
    matrix.fill_(float("nan"))
    try:
        emulated_cuda.run(one, code, seed=seed, lateness=lateness)
    except Fault as fault:
        return str(fault)
    error = (matrix.double() - expected).abs() <= 2**-8 * expected + 1e-30
    return "" if bool(error.all()) else WRONG


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "slots", lambda device, tile: 2)


@pytest.mark.parametrize("tile", [tile.name for tile in TILES])
def test_no_schedule_finds_anything_in_the_kernel_as_it_is(tile: str) -> None:
    one, matrix, expected = problem(tile)
    code = emulated_cuda.kernel(one.build)
    for seed, lateness in SCHEDULES:
        assert complaint(one, code, matrix, expected, seed, lateness) == ""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, tmp_path: Path) -> None:
    mistake = MISTAKES[name]
    sources = tmp_path / "csrc"
    shutil.copytree(build.source_folder(), sources)
    text = (sources / mistake.file).read_text()
    assert text.count(mistake.right) == 1, "the sources have changed: adapt the mistake"
    (sources / mistake.file).write_text(text.replace(mistake.right, mistake.wrong))
    one, matrix, expected = problem(mistake.tile)
    code = Kernel(build.ptx(one.build, sources=sources, cache=tmp_path), one.build.kernel)
    said = []
    for schedule in SCHEDULES:
        said.append(complaint(one, code, matrix, expected, *schedule))
        if re.search(mistake.found, said[-1]):
            return
    pytest.fail(f"not found: {said}")


def test_accumulators_read_before_the_products_are_done_are_found() -> None:
    """Removed from the PTX: in the source the compiler would notice and insert a wait."""
    one, matrix, expected = problem("shared")
    text = emulated_cuda.kernel(one.build).text
    assert text.count("wgmma.wait_group.sync.aligned 0;") == 1
    code = Kernel(text.replace("wgmma.wait_group.sync.aligned 0;", ""), one.build.kernel)
    assert "left alone until wgmma.wait_group" in complaint(one, code, matrix, expected, 0, 0.5)
