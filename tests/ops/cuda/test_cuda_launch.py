"""What a launch passes to the driver: arguments, descriptors, grid, shared memory; and the driver's
errors.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver

from eapo_kernels.ops.cuda import build, launch
from eapo_kernels.ops.cuda.launch import Arguments, Box, Walk, product_launch
from eapo_kernels.ops.cuda.tiles import THREADS, TILES, Build
from eapo_kernels.ops.lm_head import Projection

pytestmark = pytest.mark.csrc

ITEM = Build("scaled_exp_gemm", TILES[0], "bf16", entropy=True)


def test_arguments_match_the_kernels_field_by_field(host: ctypes.CDLL) -> None:
    outer = [name for name, _ in Arguments._fields_ if name != "walk"]
    offsets = [getattr(Arguments, name).offset for name in outer]
    offsets += [Arguments.walk.offset + getattr(Walk, name).offset for name, _ in Walk._fields_]
    assert [*offsets, ctypes.sizeof(Arguments)] == [host.arguments_layout(i) for i in range(len(offsets) + 1)]


def test_a_descriptor_counts_from_the_innermost_dimension(fake: FakeDriver) -> None:
    matrix = torch.zeros(40, 96, dtype=torch.float16)[3:, :72]
    Box(matrix, 128).encode()
    (encoded,) = fake.encoded
    assert encoded["type"] == int(driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    assert (encoded["rank"], encoded["address"]) == (2, matrix.data_ptr())
    assert encoded["sizes"] == [72, 37]
    assert encoded["strides"] == [192]
    assert encoded["box"] == [64, 128]
    assert encoded["steps"] == [1, 1]
    assert encoded["swizzle"] == int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)


def test_descriptors_lie_at_multiples_of_128_bytes_and_are_encoded_once(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = example(monkeypatch)
    for _ in range(3):
        one()
    assert len(fake.encoded) == len(one.boxes) == 3
    assert [e["map"] % 128 for e in fake.encoded] == [0, 0, 0]
    assert [p % 128 for call in fake.parameters for p in call[:3]] == [0] * 9
    assert fake.parameters[0][:3] == [e["map"] for e in fake.encoded]


def test_a_refused_descriptor_is_an_error(fake: FakeDriver) -> None:
    fake.encode_status = int(driver.CUresult.CUDA_ERROR_INVALID_VALUE)
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        Box(torch.zeros(8, 64, dtype=torch.bfloat16), 64).encode()


def example(monkeypatch: pytest.MonkeyPatch, slots: int = 66) -> launch.Launch:
    monkeypatch.setattr(launch, "slots", lambda device, tile: slots)
    hidden, weight = torch.zeros(700, 72, dtype=torch.bfloat16), torch.zeros(1031, 72, dtype=torch.bfloat16)
    p = Projection(hidden, weight, inv_temperature=0.5, logit_scale=3.0)
    return product_launch(
        ITEM, p, torch.zeros(700, dtype=torch.int64), torch.zeros(2, 5, 700), 1, offsets=torch.zeros(700),
        matrix=torch.zeros(700, 1040, dtype=torch.bfloat16)[:, :1031],
    )  # fmt: skip


def test_arguments_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    one = example(monkeypatch)
    a = one.arguments
    assert (a.n_rows, a.n_columns, a.steps, a.scale) == (700, 1031, 2, 1.5)
    assert (a.walk.row_tiles, a.walk.column_tiles, a.walk.tiles_per_split, a.walk.group) == (3, 5, 1, 8)
    assert (a.bias, a.row_inv_temperature, a.bias_stride) == (None, None, 0)
    assert [box.rows for box in one.boxes] == [128, 128, 64], "a program loads half of a weight tile for both"
    assert one.programs == 30, "no more clusters than units"
    assert example(monkeypatch, slots=4).programs == 8


class FakeDriver:
    """Records the calls; hands out numbers for handles."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, ...]]] = {}
        self.status = driver.CUresult.CUDA_SUCCESS
        self.context = driver.CUcontext(5)
        self.read: Arguments | None = None
        self.parameters: list[list[int]] = []
        self.encoded: list[dict[str, Any]] = []
        self.encode_status = 0
        self._encode = launch._ENCODE(self._record)

    def _record(self, where: int, kind: int, rank: int, address: int, *more: int) -> int:
        sizes, strides, box, steps, _, swizzle, _, _ = more
        self.encoded.append({
            "map": where, "type": kind, "rank": rank, "address": address, "swizzle": swizzle,
            "sizes": list((ctypes.c_uint64 * 2).from_address(sizes)),
            "strides": list((ctypes.c_uint64 * 1).from_address(strides)),
            "box": list((ctypes.c_uint32 * 2).from_address(box)), "steps": list((ctypes.c_uint32 * 2).from_address(steps)),
        })  # fmt: skip
        return self.encode_status

    def from_cubin(self, code: bytes, *, name: str) -> FakeDriver:
        """``ObjectCode``'s; its kernels have a handle."""
        self.calls.setdefault("from_cubin", []).append((code, name))
        return self

    def get_kernel(self, name: str) -> SimpleNamespace:
        self.calls.setdefault("get_kernel", []).append((name,))
        return SimpleNamespace(handle=driver.CUkernel(7))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or not callable(getattr(driver, name)):
            return getattr(driver, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.setdefault(name, []).append(arguments)
            if name == "cuGetProcAddress":
                return self.status, ctypes.cast(self._encode, ctypes.c_void_p).value, 0
            if name == "cuLaunchKernel":
                pointers = (ctypes.c_void_p * 4).from_address(arguments[9])
                self.parameters.append(list(pointers))
                self.read = Arguments.from_buffer_copy(ctypes.string_at(pointers[3], ctypes.sizeof(Arguments)))
            return self.status, self.context if name == "cuCtxGetCurrent" else driver.CUtensorMap()

        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    made = FakeDriver()
    monkeypatch.setattr(launch, "driver", made)
    monkeypatch.setattr(launch, "ObjectCode", made)
    monkeypatch.setattr(build, "cubin", lambda item: b"code")
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=99))
    for cache in (launch.load, launch._encoder, launch._encoded):
        cache.cache_clear()
    return made


def test_a_launch_calls_the_driver_once_per_kernel(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    one = example(monkeypatch)
    one()
    one()
    assert fake.calls["from_cubin"] == [(b"code", "scaled_exp_gemm")], "loaded once"
    assert fake.calls["get_kernel"] == [("scaled_exp_gemm",)]
    assert [len(fake.calls[name]) for name in ("cuKernelSetAttribute", "cuLaunchKernel")] == [1, 2]
    shared = ITEM.tile.shared_bytes("scaled_exp_gemm")
    attribute, value, kernel, device = fake.calls["cuKernelSetAttribute"][0]
    assert attribute == driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert (value, int(kernel), device) == (shared, 7, 3)
    function, *sizes, _, _ = fake.calls["cuLaunchKernel"][0]
    assert int(function) == 7
    assert sizes == [30, 1, 1, THREADS, 1, 1, shared, 99]
    assert fake.read is not None
    assert fake.read.sums == one.tensors["sums"].data_ptr()
    assert fake.read.walk.column_tiles == 5


def test_a_thread_without_a_context_gets_the_devices(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the thread of a backward pass, where PyTorch has launched nothing yet."""
    entered = []

    def enter(device: int) -> None:
        assert "cuLaunchKernel" not in fake.calls
        entered.append(device)
        fake.context = driver.CUcontext(5)

    monkeypatch.setattr(launch, "Device", lambda device: SimpleNamespace(set_current=lambda: enter(device)))
    one = example(monkeypatch)
    fake.context = driver.CUcontext(0)
    one()
    one()
    assert entered == [3], "an existing context stays"


def test_the_drivers_errors_are_raised(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    one = example(monkeypatch)
    fake.status = driver.CUresult.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_IMAGE"):
        one()


@pytest.mark.parametrize(("version", "refused"), [(12080, True), (13000, False), (14010, False)])
def test_a_driver_older_than_the_compiler_is_refused(version: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    status = driver.CUresult
    bindings = SimpleNamespace(CUresult=status, cuDriverGetVersion=lambda: (status.CUDA_SUCCESS, version))
    monkeypatch.setattr(launch, "driver", bindings)
    monkeypatch.setattr(build, "compiler_version", lambda: "13.5")
    launch.refusal.cache_clear()
    said = "a driver for CUDA 12.8, where the code of NVRTC 13.5 needs one for CUDA 13"
    assert launch.refusal() == (said if refused else None)
    launch.refusal.cache_clear()
