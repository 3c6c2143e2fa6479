"""From tensors to a kernel launch: what all launchers share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..projection import Projection
from . import configs
from .configs import Tile

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels of this process are interpreted on the CPU (TRITON_INTERPRET=1 when triton was imported)."""


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it runs on, so that what is compiled ahead of time is what would be launched.

    Attributes:
        kernel: the jitted function.
        grid: number of programs along x.
        arguments: by parameter name; tensors and descriptors, numbers, None.
        options: compile options (``num_warps`` and the like).
        device: where the tensors are.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]
    device: torch.device

    def __call__(self) -> None:
        if INTERPRETED:
            self.kernel[(self.grid,)](**self.arguments)
            return
        with torch.cuda.device(self.device):
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def options(tile: Tile) -> dict[str, int]:
    """Compile options of a tile. Contraction to fused multiply-adds is asked for because triton's default changes in 3.10."""
    chosen = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return chosen if tile.max_registers is None else chosen | {"maxnreg": tile.max_registers}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    properties = _properties(_index(device))
    return properties.major, properties.minor


def family(device: torch.device) -> str:
    """The family of tile configurations of a device; the CPU's is the interpreter's."""
    return configs.family(capability(device) if device.type == "cuda" else None)


def slots(device: torch.device, tile: Tile) -> int:
    """Programs that run at once."""
    return tile.resident * _properties(_index(device)).multi_processor_count if device.type == "cuda" else 1


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can stand for a matrix: contiguous rows, 16-byte aligned."""
    dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return dense and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def product_tile(kernel: str, projection: Projection) -> Tile:
    """The tile of a kernel that multiplies hidden and weight."""
    hidden, weight = projection.hidden, projection.weight
    return configs.find(
        kernel,
        family(hidden.device),
        hidden.element_size(),
        projection.dim,
        projection.vocab,
        descriptors=describable(hidden) and describable(weight),
    )


def transform_arguments(projection: Projection) -> dict[str, Any]:
    """The logit transform E1: what ``math.row_scale`` and ``math.shape_logits`` take."""
    p = projection
    gain = p.logit_scale if p.softcap is None else p.softcap
    return {
        "bias": p.bias,
        "bias_stride": 0 if p.bias is None else p.bias.stride(0),
        "row_inv_temperature": None if p.row_inv_temperature is None else p.row_inv_temperature.contiguous(),
        "scale": gain * p.inv_temperature,
        "cap": None if p.softcap is None else p.logit_scale / p.softcap,
    }


def operand_arguments(projection: Projection) -> dict[str, Any]:
    """The operands as they are, strided or not: copying a [V, D] weight would cost more memory than the op saves."""
    hidden, weight = projection.hidden, projection.weight
    return {
        "hidden": hidden,
        "weight": weight,
        "n_rows": projection.n_rows,
        "n_columns": projection.vocab,
        "dim": projection.dim,
        "hidden_stride_n": hidden.stride(0),
        "hidden_stride_d": hidden.stride(1),
        "weight_stride_v": weight.stride(0),
        "weight_stride_d": weight.stride(1),
    }


def product_arguments(projection: Projection, tile: Tile) -> dict[str, Any]:
    """What ``product.raw_logits`` takes: the operands, with a tile that asks for it by descriptor, and the tile."""
    arguments = operand_arguments(projection) | {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_N": tile.group_n,
        "EVEN_D": projection.dim % tile.block_d == 0,
        "DESCRIPTORS": tile.descriptors,
        "WIDEN": INTERPRETED,
    }
    if tile.descriptors:
        arguments["hidden"] = TensorDescriptor.from_tensor(projection.hidden, [tile.block_n, tile.block_d])
        arguments["weight"] = TensorDescriptor.from_tensor(projection.weight, [tile.block_v, tile.block_d])
    return arguments
