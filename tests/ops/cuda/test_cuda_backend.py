"""The backend: the inputs that it refuses, and on a Hopper GPU its statistics and gradients.

Without a GPU tests/emulator runs the compiled kernels.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import emulated_cuda
import pytest
import torch
from comparison import compare, cotangents
from cuda.pathfinder import DynamicLibNotFoundError
from torch import Tensor

from eapo_kernels import BackendUnavailable, available_backends, token_stats
from eapo_kernels.ops.cuda import backend, build, launch
from eapo_kernels.ops.cuda.tiles import TILES, Tile
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import backend as triton_backend
from eapo_kernels.testing import make_inputs

pytestmark = [pytest.mark.csrc, pytest.mark.usefixtures("poisoned")]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
SHAPES = [(1, 8, 257), (63, 72, 1031), (130, 136, 515), (300, 64, 2050)]


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """A device with nothing else to refuse."""
    monkeypatch.setattr(backend.triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    for module in (backend, triton_backend):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(launch, "refusal", lambda: None)


def no_library(name: str) -> None:
    raise DynamicLibNotFoundError(f"no lib{name}.so")


class Elsewhere(Tensor):
    """A CPU tensor whose device says GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype).as_subclass(Elsewhere)


def test_every_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert "cpu tensors" in backend.supports(Projection(plain, plain))
    good = Projection(on_gpu(4, 8), on_gpu(9, 8))
    pretend(monkeypatch, (10, 0))
    assert "10.0, where it needs 9.0" in backend.supports(good)
    pretend(monkeypatch)
    assert backend.supports(good) is None
    assert backend.supports(Projection(on_gpu(4, 8, dtype=torch.float16), on_gpu(9, 8, dtype=torch.float16))) is None
    assert "float32 inputs" in backend.supports(Projection(on_gpu(4, 8, dtype=torch.float32), good.weight))
    assert "soft-cap" in backend.supports(replace(good, softcap=30.0))
    assert "split over processes" in backend.supports(replace(good, shard=object()))  # type: ignore[arg-type]
    rows = "where TMA needs contiguous, aligned rows a multiple of 8 elements apart"
    assert backend.supports(replace(good, hidden=on_gpu(4, 7))) == f"hidden [4, 7] with strides (7, 1), {rows}"
    assert backend.supports(replace(good, weight=on_gpu(8, 9).t())) == f"weight [9, 8] with strides (1, 9), {rows}"
    with monkeypatch.context() as without:
        without.setattr(build, "load_nvidia_dynamic_lib", no_library)
        assert backend.supports(good) == "NVRTC: expected the library of the package nvidia-cuda-nvrtc, got none"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in backend.supports(good)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert "needs an NVIDIA GPU" in available_backends("cpu")["cuda"]
    inputs = make_inputs(4, 8, 9, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="backend 'cuda': cpu tensors"):
        token_stats(inputs.hidden, inputs.weight, inputs.targets, backend="cuda")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 1024, 50257)], ids=str)
def test_on_the_device(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    inputs = make_inputs(*shape, dtype=dtype, bias=bias, device="cuda")
    compare(inputs, cotangents(shape[0], device="cuda"), backend="cuda")
    compare(inputs, cotangents(shape[0], "logp", device="cuda"), backend="cuda")


@pytest.mark.gpu
@needs_hopper
def test_a_thread_without_earlier_launches() -> None:
    inputs = make_inputs(300, 64, 2050, dtype=torch.bfloat16, device="cuda")
    p = Projection(inputs.hidden.detach(), inputs.weight.detach())
    run = functools.partial(backend.statistics, p, inputs.targets, entropy=True, second_moments=False, budget=2**30)
    here = run().logp
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(run).result().logp, here)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("entropy", [False, True])
def test_every_tile_on_the_device_is_the_emulated_one(tile: Tile, entropy: bool) -> None:
    """The sums of the hardware and of the emulator agree, and repeated runs agree bit by bit."""
    inputs = make_inputs(700, 200, 3001, dtype=torch.bfloat16, device="cuda")
    p = Projection(inputs.hidden.detach(), inputs.weight.detach())
    cpu = Projection(p.hidden.cpu(), p.weight.cpu())
    first, sums = launch.stream_statistics(p, inputs.targets, entropy=entropy, second_moments=False, tile=tile)
    first()
    before = sums.values.clone()
    first()
    assert torch.equal(sums.values, before)
    twin = replace(first, boxes=tuple(replace(b, matrix=m) for b, m in zip(first.boxes, (cpu.hidden, cpu.weight), strict=True)))
    expected = torch.full_like(before, float("nan"), device="cpu")
    arguments = launch.Arguments.from_buffer_copy(first.arguments)
    targets = inputs.targets.cpu()
    arguments.sums, arguments.targets = expected.data_ptr(), targets.data_ptr()
    emulated_cuda.run(replace(twin, arguments=arguments, tensors={"sums": expected, "targets": targets}))
    torch.testing.assert_close(before.cpu(), expected, rtol=1e-4, atol=1e-4)
