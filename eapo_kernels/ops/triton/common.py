"""Device functions that the kernels share (product, scalars, logit transform), and launches.

Device functions run in triton's interpreter, so they use no libdevice and no inline assembly.
Loads are widened to fp32, and arithmetic is fp32.

A tile of logits is y [BLOCK_N, BLOCK_V] with z = scale * y, scale > 0 per row (E1): y is
hidden @ weight.T + bias, or its tanh under a soft-cap. One multiplication applies temperature,
logit scale and log2(e) after the row maximum of y is subtracted, so it does not round the maximum.
A logit that must not count (behind the last column, the target's, -inf by its bias) is ``LOWEST``,
far below real logits: its e^x is exactly 0, and unlike with -inf no difference or product is NaN.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import verdicts
from ..chunking import cdiv, padded
from ..lm_head import Projection
from . import tiles
from .compiling import waiting
from .tiles import Tile

logger = logging.getLogger("eapo_kernels")

INTERPRETED: bool = triton.knobs.runtime.interpret  # kernels run on the CPU (TRITON_INTERPRET=1 when triton was imported)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e20)
NEG_INF = tl.constexpr(float("-inf"))

PER_CALL = (
    "n_rows", "n_splits", "n_tiles", "tiles_per_split", "first_column",
    "targets", "row_inv_temperature", "logp_guess", "over_ranks", "logp", "row_offset", "log_sum", "mean_shifted", "grad_logp",
    "grad_entropy", "grad_lse", "valid", "sequence_ids", "old_logp", "scale", "advantages", "rewards", "thresholds",
)  # fmt: skip
"""Arguments on which no kernel is specialized: counts, and vectors of rows, whose alignment changes
with N and the chunk. Their places are cut off at the last row, so alignment vectorizes no load."""


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to a few ulp, also where 1 + x rounds to 1 (Kahan's correction)."""
    u = 1.0 + x
    d = u - 1.0
    plain = (d == 0.0) | (u == float("inf"))
    return tl.where(plain, x, tl.log(u) * (x / tl.where(plain, 1.0, d)))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 80 to a few ulp, also near 0 (Kahan's correction)."""
    u = tl.exp(x)
    d = u - 1.0
    plain = (d == 0.0) | (u < 1e-8)
    corrected = d * x / tl.where(plain, 1.0, tl.log(tl.where(plain, 2.0, u)))
    return tl.where(d == 0.0, x, tl.where(plain, d, corrected))


@triton.jit
def round_to(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """x fp32 rounded to nearest in ``dtype``. WIDEN: the interpreter truncates to bf16 itself."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((x == x) & (tl.abs(x) < float("inf")), rounded, x)
    return x.to(dtype)


@triton.jit
def tanh_and_slope(u):
    """(tanh u, 1 - tanh^2 u) to a few ulp: a polynomial near 0 (Cephes), else e^(-2|u|)."""
    w = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - w) / (1.0 + w)
    s = u * u
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    value = tl.where(s < 0.390625, u + u * (s * p), tl.where(u < 0.0, -far, far))
    return value, 4.0 * w / ((1.0 + w) * (1.0 + w))


@triton.jit
def row_scale(row_inv_temperature, scale, rows):
    """scale of z = scale * y, [BLOCK_N]. row_inv_temperature: [N] fp32 or None. rows: int64 < N."""
    factor = tl.zeros(rows.shape, tl.float32) + scale
    if row_inv_temperature is not None:
        factor *= tl.load(row_inv_temperature + rows)  # [BLOCK_N]
    return factor


@triton.jit
def shape_logits(raw, bias, bias_stride, columns, cap):
    """(y, dy / d(cap * (raw + bias)) or 1) of raw logits [BLOCK_N, BLOCK_V]: E1 without the scale.

    bias: pointer or None. columns: [BLOCK_V] below V. cap: logit_scale / softcap, or None.
    """
    y, slope = raw, 1.0
    if bias is not None:
        y += tl.load(bias + columns.to(tl.int64) * bias_stride).to(tl.float32)[None, :]  # [1, BLOCK_V]
    if cap is not None:
        y, slope = tanh_and_slope(y * cap)
    elif bias is not None:
        y = tl.where(y < LOWEST, LOWEST, y)
    return y, slope


@triton.jit
def tile_has_target_or_tail(target, first_column, n_columns, BLOCK_V: tl.constexpr):
    """Whether a tile holds the target of any row ([BLOCK_N] int32), or columns behind the last one.

    Mostly False: a branch on it saves comparing every column with every target.
    """
    inside = (target >= first_column) & (target < first_column + BLOCK_V)
    return (first_column + BLOCK_V > n_columns) | (tl.max(inside.to(tl.int32), 0) > 0)


@triton.jit
def split_columns(tile, BLOCK_V: tl.constexpr):
    """The left and the right half of a tile; in the layout of a product no data moves."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, BLOCK_V // 2]), [0, 2, 1]))


@triton.jit
def group_order(pid, n_row_tiles, n_columns, GROUP_N: tl.constexpr):
    """(row tile, column tile): GROUP_N row tiles share each column tile, so operands stay in L2."""
    per_group = GROUP_N * n_columns
    first = pid // per_group * GROUP_N
    size = tl.minimum(n_row_tiles - first, GROUP_N)
    inside = pid % per_group
    return first + inside % size, inside // size


@triton.jit
def raw_logits(
    hidden, weight, first_row, first_column, n_rows, n_columns, dim,
    hidden_stride_n, hidden_stride_d, weight_stride_v, weight_stride_d,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDEN: tl.constexpr, rescue_ids=None,
):  # fmt: skip
    """A tile [BLOCK_N, BLOCK_V] of hidden @ weight.T in fp32 (fp32 operands without tf32).

    Entries behind the last row or column are undefined (copies of the last one, or zeros).
    hidden [n_rows, dim], weight [n_columns, dim]: with DESCRIPTORS, descriptors of blocks
        [BLOCK_N, BLOCK_D] and [BLOCK_V, BLOCK_D]; else pointers with strides.
    rescue_ids: None, or [n_rows] int32: the rows of hidden to gather, without DESCRIPTORS.
    EVEN_D: dim is a multiple of BLOCK_D.
    WIDEN: multiply in fp32, because the interpreter's product of bf16 is wrong.
    """
    product = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if not DESCRIPTORS:
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_N), n_rows - 1).to(tl.int64)
        if rescue_ids is not None:
            rows = tl.load(rescue_ids + rows).to(tl.int64)  # [BLOCK_N]
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_V), n_columns - 1).to(tl.int64)
        dims = tl.arange(0, BLOCK_D)
        h_at = hidden + rows[:, None] * hidden_stride_n + dims[None, :].to(tl.int64) * hidden_stride_d
        w_at = weight + columns[:, None] * weight_stride_v + dims[None, :].to(tl.int64) * weight_stride_d
    for d in range(0, dim, BLOCK_D):
        if DESCRIPTORS:
            h = hidden.load([first_row, d])  # [BLOCK_N, BLOCK_D]
            w = weight.load([first_column, d])  # [BLOCK_V, BLOCK_D]
        elif EVEN_D:
            h = tl.load(h_at)  # [BLOCK_N, BLOCK_D]
            w = tl.load(w_at)  # [BLOCK_V, BLOCK_D]
        else:
            inside = (dims < dim - d)[None, :]
            h = tl.load(h_at, mask=inside, other=0.0)  # [BLOCK_N, BLOCK_D]
            w = tl.load(w_at, mask=inside, other=0.0)  # [BLOCK_V, BLOCK_D]
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        product = tl.dot(h, tl.trans(w), product, input_precision="ieee")
        if not DESCRIPTORS:
            h_at += BLOCK_D * tl.cast(hidden_stride_d, tl.int64)
            w_at += BLOCK_D * tl.cast(weight_stride_d, tl.int64)
    return product


@dataclass
class Launch:
    """A kernel with all its arguments: call it to launch, or compile it ahead of time."""

    kernel: Any  # the jitted function, whose constants are its last parameters
    grid: int  # number of programs along x
    arguments: dict[str, Any]  # by parameter name, and others; tensors, descriptors, numbers, None
    options: dict[str, int]  # compile options (``num_warps`` and the like)
    device: torch.device  # of the tensors

    @property
    def values(self) -> list[Any]:
        """The kernel's arguments, in order."""
        return list(map(self.arguments.__getitem__, self.kernel.arg_names))

    def __call__(self) -> None:
        kernel, values = self.kernel, self.values
        if INTERPRETED:
            kernel[(self.grid,)](*values)
            return
        launches = waiting.get()
        if launches is not None:
            launches.append(self)
            return
        constant = len(values) - len(kernel.constexprs)
        form = (kernel.fn, self.device, *self.options.values(), *map(_form, values[:constant]), *values[constant:])
        compiled = _compiled.get(form)
        with torch.cuda.device(self.device):
            if compiled is None:
                _compiled[form] = kernel[(self.grid,)](*values, **self.options)
            else:
                compiled[(self.grid, 1, 1)](*values)


_compiled: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by form. Finding one here takes a third of the time that Triton takes."""


def _form(value: Any) -> Any:
    """All of an argument on which compiled code depends: at least what Triton specializes on."""
    if type(value) is int:
        return 4 * (value >> 31) + 2 * (value % 16 == 0) + (value == 1)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return (value.base.dtype, *value.block_shape) if type(value) is TensorDescriptor else type(value)


def options(tile: Tile) -> dict[str, int]:
    """Compile options of a tile. The default of ``enable_fp_fusion`` changes in triton 3.10."""
    chosen = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return chosen if tile.max_registers is None else chosen | {"maxnreg": tile.max_registers}


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor


@functools.cache
def family(device: torch.device) -> str:
    """The device's name in the table of tiles; the CPU's is the interpreter's. Tuned tiles of the
    device come into use."""
    tiles.use_tuned(verdicts.tuned_file(device))
    if device.type == "cuda":
        logger.info(
            "first use of the Triton kernels on %s: each is compiled once, seconds in all", torch.cuda.get_device_name(device)
        )
    return tiles.family(capability(device) if device.type == "cuda" else None)


def slots(device: torch.device, tile: Tile) -> int:
    """Programs that run at once."""
    return tile.resident * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product_tile(kernel: str, projection: Projection) -> Tile:
    """The table's tile for a kernel that multiplies hidden and weight."""
    hidden, dim, vocab, able = projection.hidden, projection.dim, projection.vocab, projection.describable
    return tiles.find(kernel, family(hidden.device), hidden.element_size(), dim, vocab, descriptors=able)


def tile_count(projection: Projection, tile: Tile) -> int:
    """Tiles of [N, V]."""
    return cdiv(projection.n_rows, tile.block_n) * cdiv(projection.vocab, tile.block_v)


def product_arguments(projection: Projection, tile: Tile) -> dict[str, Any]:
    """``Projection.arguments`` and those of ``raw_logits``, the operands by descriptor where the tile says so."""
    arguments = projection.arguments | {
        "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "GROUP_N": tile.group_n,
        "EVEN_D": projection.dim % tile.block_d == 0, "DESCRIPTORS": tile.descriptors, "WIDEN": INTERPRETED,
    }  # fmt: skip
    if tile.descriptors:
        arguments["hidden"] = TensorDescriptor.from_tensor(projection.hidden, [tile.block_n, tile.block_d])
        arguments["weight"] = TensorDescriptor.from_tensor(projection.weight, [tile.block_v, tile.block_d])
    return arguments


def workspace(projection: Projection, dtype: torch.dtype) -> Tensor:
    """[N, V] uninitialized, with padded rows."""
    columns = padded(projection.vocab)
    matrix = projection.hidden.new_empty(projection.n_rows, columns, dtype=dtype)
    return matrix if columns == projection.vocab else matrix[:, : projection.vocab]
