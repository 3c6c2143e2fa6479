"""What the shipped kernels compile to: registers, spills, shared memory, tensor-core instructions. Needs no GPU.

``python -m eapo_kernels.ops.triton.report [sm80|sm90|sm100]`` prints the table. It compiles the very ``Launch`` objects that
the backend would run, on tensors without storage. Not in a process that interprets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import cubin
from ..backend import LogitCotangents, SurrogateTerms, TargetRows
from ..projection import Projection
from ..statistics import RowStatistics
from . import configs
from .backward import logit_gradient
from .configs import Entry
from .finalize import finalize
from .forward import stream_statistics
from .launch import Launch
from .offsets import ScaledExpSums, row_offsets
from .one_pass import workspace
from .rows import row_gradient, row_statistics
from .scaled_exp_finalize import scaled_exp_finalize
from .scaled_exp_gemm import scaled_exp_gemm
from .scaled_exp_rescue import collect_rescue_ids, row_maxima
from .sums import PartialSums
from .target_rows import add_target_rows

VARIANTS = ("plain", "full")
"""plain: entropy, nothing else. full: every switch on, V odd, D not a multiple of the tile's (odd for the fallback lines)."""

ARCHITECTURES = {"sm80": 80, "sm90": 90, "sm100": 100}

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread.
        spills: loads and stores of local memory.
        shared: bytes per program.
        tensor: tensor-core instructions, by mnemonic.
        tma, tma_stores: bulk tensor loads and stores.
        doubles: fp64 arithmetic instructions.
        threads: per program.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    tensor: dict[str, int]
    tma: int
    tma_stores: int
    doubles: int
    threads: int


def example(entry: Entry, variant: str) -> Launch:
    """A launch of the entry's kernel with its tile on tensors of its shape, without storage."""
    full = variant == "full"
    dtype = torch.bfloat16 if entry.itemsize == 2 else torch.float32
    fallback = not entry.tile.descriptors and entry.family in ("sm90", "sm100")
    n, d, v = 8192, entry.dim, entry.vocab
    if full:
        d, v = d + (3 if fallback else 16), v + 3

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    projection = Projection(
        hidden=empty(n, d, dtype=dtype),
        weight=empty(v, d, dtype=dtype),
        bias=empty(v, dtype=dtype) if full else None,
        row_inv_temperature=empty(n) if full else None,
        softcap=30.0 if full else None,
    )
    targets, row = empty(n, dtype=torch.int64), empty(n)
    statistics = RowStatistics(row, row, row, row, row, row)
    cotangents = LogitCotangents(row, row if full else None, row if full else None)
    terms = SurrogateTerms(targets, row, row, row, row, row, empty(), 1.0, 0.2, 0.2, 3.0)
    match entry.kernel:
        case "stream_statistics":
            return stream_statistics(projection, targets, entropy=True, second_moments=full, budget=2**30, tile=entry.tile)[0]
        case "logit_gradient":
            gain = empty() if full else None
            width = 2048 - (3 if full else 0)
            slab, columns = empty(n, 2048, dtype=dtype)[:, :width], slice(4096, 4096 + width)
            return logit_gradient(slab, projection, targets, columns, statistics, cotangents, gain, tile=entry.tile)
        case "row_statistics":
            raw = workspace(projection, torch.float32)
            return row_statistics(raw, projection, targets, entropy=True, tile=entry.tile)[0]
        case "row_gradient":
            raw = workspace(projection, torch.float32)
            out = raw if full else workspace(projection, torch.bfloat16)
            return row_gradient(out, raw, projection, targets, statistics, cotangents, tile=entry.tile)
        case "finalize":
            sums = PartialSums.empty(projection, 8, True, full)
            return finalize(sums, terms if full else None, tile=entry.tile)[0]
        case "target_rows":
            rows = TargetRows(targets, targets, projection.hidden, row)
            return add_target_rows(torch.empty_like(projection.weight, dtype=torch.float32), 0, rows, tile=entry.tile)
        case (
            "row_offsets"
            | "scaled_exp_gemm"
            | "scaled_exp_rescue"
            | "row_maxima"
            | "collect_rescue_ids"
            | "scaled_exp_finalize"
        ):
            return exponential_example(entry, replace(projection, softcap=None), targets, terms if full else None)
    raise ValueError(f"kernel: expected one of the table's, got {entry.kernel!r}")


def exponential_example(entry: Entry, projection: Projection, targets: Tensor, terms: SurrogateTerms | None) -> Launch:
    """``example`` for the kernels of the scaled-exponential form."""
    tile = entry.tile
    sums = ScaledExpSums.empty(
        projection, True, tile=tile if entry.kernel in ("scaled_exp_gemm", "scaled_exp_rescue") else configs.Tile(0, 256)
    )
    matrix = workspace(projection, projection.hidden.dtype)
    match entry.kernel:
        case "row_offsets":
            logp_guess = projection.row_inv_temperature
            return row_offsets(projection, targets, logp_guess, sums, tile=tile)
        case "scaled_exp_gemm" | "scaled_exp_rescue":
            return scaled_exp_gemm(projection, targets, sums, matrix, rescue_ids=entry.kernel == "scaled_exp_rescue", tile=tile)
        case "row_maxima":
            return row_maxima(projection, sums, tile=tile)
        case "collect_rescue_ids":
            return collect_rescue_ids(projection, sums, tile=tile)
    return scaled_exp_finalize(projection, sums, terms, tile=tile)[0]


def compile_launch(launch: Launch, architecture: int) -> Any:
    """Compile what the launch would run: the signature follows from its arguments as the just-in-time compiler reads them."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        aligned = True
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
            aligned = False
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialize and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def usage(launch: Launch, architecture: int) -> Usage:
    """Compile and read the cubin with the ``cuobjdump`` that comes with triton."""
    compiled = compile_launch(launch, architecture)
    code = cubin.inspect(compiled.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    counts = code.instructions
    return Usage(
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=compiled.metadata.shared,
        tensor={name: counts[name] for name in ("HGMMA", "HMMA", "UTCHMMA") if name in counts},
        tma=counts["UTMALDG"],
        tma_stores=counts["UTMASTG"],
        doubles=sum(counts[name] for name in ("DADD", "DMUL", "DFMA", "DSETP")),
        threads=32 * compiled.metadata.num_warps,
    )


def rows(family: str) -> Iterator[str]:
    """The table in Markdown, a line at a time."""
    yield "| kernel | bytes | tile | variant | registers | spills | shared | tensor cores | TMA |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for entry in configs.TABLE:
        for variant in VARIANTS if entry.family == family else ():
            t, u = entry.tile, usage(example(entry, variant), ARCHITECTURES[family])
            shape = f"{t.block_n}x{t.block_v}x{t.block_d}, {t.warps} warps, {t.stages} stages"
            tensor = " ".join(f"{count} {name}" for name, count in u.tensor.items()) or "-"
            yield (
                f"| {entry.kernel} | {entry.itemsize} | {shape} | {variant} | {u.registers} | {u.spills} ({u.stack} B) "
                f"| {u.shared} | {tensor} | {u.tma} + {u.tma_stores} |"
            )


if __name__ == "__main__":
    for _family in sys.argv[1:] or ARCHITECTURES:
        print(f"\n{_family}, triton {triton.__version__}, torch {torch.__version__}\n")
        for _row in rows(_family):
            print(_row, flush=True)
