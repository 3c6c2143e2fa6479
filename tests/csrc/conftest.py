"""The library that the tests of the headers call; and launches of kernels over rows, run in three ways."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace

import interpreted  # noqa: F401
import emulated_cuda
import pytest
import torch
from host_library import host, run_rows
from torch import Tensor

from eapo_kernels.ops.cuda.launch import Launch

__all__ = ["host", "run"]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def run_elsewhere(launch: Launch, device: str, start: Callable[[Launch], object] = lambda launch: launch()) -> None:
    """Run a launch on copies of its tensors on a device, and copy back what it leaves there."""
    whole, moved = {}, {}
    for tensor in launch.tensors.values():
        if tensor is not None:
            storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            copy = storage.to(device, copy=True)
            whole[tensor.data_ptr()] = storage, copy
            moved[tensor.data_ptr()] = copy.data_ptr() + tensor.storage_offset() * tensor.element_size()
    arguments = type(launch.arguments).from_buffer_copy(launch.arguments)
    point_elsewhere(arguments, moved)
    copies: dict[str, Tensor | None] = {str(i): copy for i, (_, copy) in enumerate(whole.values())}
    start(replace(launch, arguments=arguments, tensors=copies, device=torch.device(device)))
    for storage, copy in whole.values():
        storage.copy_(copy)


def point_elsewhere(arguments: ctypes.Structure, moved: dict[int, int]) -> None:
    """Replace every pointer, also those of structures inside."""
    for name, kind in arguments._fields_:
        value = getattr(arguments, name)
        if isinstance(value, ctypes.Structure):
            point_elsewhere(value, moved)
        elif kind is ctypes.c_void_p and value is not None:
            setattr(arguments, name, moved[value])


RUNS = {
    "source": lambda launch, host: run_rows(launch, host),
    "compiled": lambda launch, host: run_elsewhere(launch, "cpu", emulated_cuda.run),
    "device": lambda launch, host: run_elsewhere(launch, "cuda"),
}


@pytest.fixture(
    params=[
        "source",
        "compiled",
        pytest.param(
            "device",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")],
        ),
    ]
)
def run(request: pytest.FixtureRequest, host: ctypes.CDLL) -> Callable[[Launch], object]:
    """The maths of the headers by g++ over what a launch points to; the compiled kernel on the emulator; or on the device."""
    return lambda launch: RUNS[request.param](launch, host)
