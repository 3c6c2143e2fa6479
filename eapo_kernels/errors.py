"""Errors that callers catch, and checks that raise them with the expected and the given value."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

LARGEST, FACTORS = 1e30, (1e-12, 1e12)  # size of a caller's number; range of those that multiply or cap logits
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class EapoError(ValueError):
    """Base of all errors about invalid arguments and requests that cannot be met."""


class ShapeError(EapoError):
    """A tensor has the wrong shape, dtype or device."""


class BackendUnavailable(EapoError):
    """The backend asked for by name cannot run these inputs; the message gives the reason."""


def require(condition: bool, name: str, expected: object, got: object, error: type[EapoError] = EapoError) -> None:
    """Raise ``error`` as ``name: expected ..., got ...`` unless ``condition`` holds."""
    if not condition:
        raise error(f"{name}: expected {expected}, got {got}")


def describe(tensor: object) -> str:
    """``float32 [3, 4] cpu`` for messages."""
    if not isinstance(tensor, Tensor):
        return repr(tensor)
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {tensor.device}"


def require_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise ShapeError unless the tensor has this shape, one of these dtypes, ``like``'s device."""
    good = isinstance(tensor, Tensor) and tuple(tensor.shape) == shape and tensor.dtype in dtypes
    if not (good and tensor.device == like.device):
        names = "/".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ShapeError(f"{name}: expected {names} {list(shape)} {like.device}, got {describe(tensor)}")


def is_number(value: object) -> bool:
    """Whether it is an int or float, but not a bool or an int beyond every float."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023)


def is_factor(value: object) -> bool:  # products and quotients of several stay finite in fp32
    return isinstance(value, (int, float)) and is_number(value) and FACTORS[0] <= value <= FACTORS[1]


def require_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number in [low, high], of a size up to ``LARGEST``."""
    ok = isinstance(value, (int, float)) and is_number(value) and max(low, -LARGEST) <= value <= min(high, LARGEST)
    if not ok:  # no text before: a compiler may trace the number
        bound = f" in [{low:g}, {high:g}]" if high < math.inf else f" >= {low:g}" if low > -math.inf else ""
        raise EapoError(f"{name}: expected a finite number{bound}, got {value!r:.99}")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not (isinstance(value, str) and value in choices):
        raise EapoError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def require_scalar(name: str, value: object, expected: str) -> None:
    """Raise unless ``value`` is a number or a real 0-dim tensor. expected: for the message."""
    real = isinstance(value, Tensor) and value.dim() == 0 and value.dtype in (*FLOATS, torch.int32, torch.int64)
    if not (real or is_number(value)):
        raise EapoError(f"{name}: expected {expected}, got {describe(value):.99}")


def may_read(tensor: Tensor, debug: bool = False) -> bool:
    """Whether to check values: never in a trace; on CUDA, where it synchronizes, with ``debug``."""
    return (debug or not tensor.is_cuda) and not torch.compiler.is_compiling()
