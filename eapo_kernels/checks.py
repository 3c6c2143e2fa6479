"""Checks of tensors that every layer uses; the messages say what was expected and what was given."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ShapeError

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def describe(tensor: object) -> str:
    """``float32 [3, 4] cpu`` for messages."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {tensor.device}"


def require_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """ShapeError unless the tensor has this shape, one of these dtypes, and the device of ``like``."""
    good = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape and tensor.dtype in dtypes
    if not (good and tensor.device == like.device):
        names = "/".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ShapeError(f"{name}: expected {names} {list(shape)} {like.device}, got {describe(tensor)}")
