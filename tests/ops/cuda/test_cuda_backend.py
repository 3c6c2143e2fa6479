"""The backend: what it refuses; and its compiled kernels, on the emulator, through to statistics and gradients.

With a Hopper GPU the kernels themselves run.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import emulated_cuda
import pytest
import torch
from comparison import STATISTICS_FLOOR, compare, cotangents
from cuda.pathfinder import DynamicLibNotFoundError
from exponential_rows import unsound
from torch import Tensor

from eapo_kernels import BackendUnavailable, available_backends, reference, token_stats
from eapo_kernels.ops import plans
from eapo_kernels.ops.backend import LogitCotangents
from eapo_kernels.ops.cuda import backend, build, launch, products
from eapo_kernels.ops.cuda.configs import TILES, Tile
from eapo_kernels.ops.projection import Projection
from eapo_kernels.ops.triton import backend as triton_backend
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs

pytestmark = [pytest.mark.csrc, pytest.mark.usefixtures("poisoned")]

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
SHAPES = [(1, 8, 257), (63, 72, 1031), (130, 136, 515), (300, 64, 2050)]


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """A device on which everything else is fine."""
    monkeypatch.setattr(backend.triton_backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", None)
    for module in (backend, triton_backend):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(launch, "refusal", lambda: None)


def no_library(name: str) -> None:
    raise DynamicLibNotFoundError(f"lib{name}.so is nowhere")


class Elsewhere(Tensor):
    """A CPU tensor that says it is on a GPU."""

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_without_a_gpu_it_says_so() -> None:
    assert "needs an NVIDIA GPU" in available_backends("cpu")["cuda"]
    inputs = make_inputs(4, 8, 9, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="backend 'cuda': cpu tensors"):
        token_stats(inputs.hidden, inputs.weight, inputs.targets, backend="cuda")


def test_auto_does_not_take_it() -> None:
    """Until a committed result from hardware shows it correct and faster than Triton's."""
    assert not any(name == "cuda" for _, name, _ in plans.PROVEN)


def inputs_of(shape: tuple[int, int, int], dtype: torch.dtype, **more: bool) -> tuple[Inputs, Tensor]:
    """Inputs and a temperature per row."""
    inputs = make_inputs(*shape, dtype=dtype, **more)
    return inputs, 0.5 + torch.rand(shape[0], generator=torch.Generator().manual_seed(3))


def check_statistics(inputs: Inputs, temperature: Tensor, got: object, *, second_moments: bool) -> None:
    more = {"second_moments": second_moments}
    bias = None if inputs.bias is None else inputs.bias.detach()
    exact = inputs.to(torch.float64)
    truth = reference.token_stats(
        exact.hidden, exact.weight, exact.targets, bias=exact.bias, inv_temperature=temperature.double(), **more
    )
    eager = eager_token_stats(inputs.hidden, inputs.weight, inputs.targets, bias=bias, inv_temperature=temperature, **more)
    for name in ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy"):
        value = getattr(got, name)
        if value is not None:
            plain, right = getattr(eager, name), getattr(truth, name)
            assert_no_worse_than(value, plain, right, floor=2 * STATISTICS_FLOOR, name=name)


@pytest.mark.skipif(HOPPER, reason="there the kernels themselves run")
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize("second_moments", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    second_moments: bool,
    tile: Tile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launcher, walk, epilogue, partial sums, finalize; no sum is read unwritten (scratch is NaN)."""
    monkeypatch.setattr(backend, "stream_statistics", functools.partial(products.stream_statistics, tile=tile))
    inputs, temperature = inputs_of(shape, dtype, bias=bias)
    detached = None if inputs.bias is None else inputs.bias.detach()
    p = Projection(inputs.hidden.detach(), inputs.weight.detach(), detached, row_inv_temperature=temperature)
    for budget in (0, 2**30):
        got = backend.statistics(p, inputs.targets, entropy=True, second_moments=second_moments, budget=budget)
        check_statistics(inputs, temperature, got, second_moments=second_moments)


@pytest.mark.skipif(HOPPER, reason="there the kernels themselves run")
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: tile.name)
@pytest.mark.parametrize(("off", "bias"), [(0.3, False), (20.0, True), (80.0, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunk(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, off: float, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk of the scaled-exponential form: statistics and gradient, also where the logp_guess is wrong and Triton's kernels rescue the rows."""
    monkeypatch.setattr(products.configs, "find", lambda kernel, n_rows, dim: tile)
    inputs, temperature = inputs_of(shape, dtype, bias=bias)
    detached = None if inputs.bias is None else inputs.bias.detach()
    p = Projection(inputs.hidden.detach(), inputs.weight.detach(), detached, row_inv_temperature=temperature)
    z = reference.logits(
        p.hidden.double(), p.weight.double(), bias=None if detached is None else detached.double(),
        inv_temperature=temperature.double(),
    ).requires_grad_()  # fmt: skip
    logp = z.log_softmax(1).gather(1, inputs.targets[:, None])[:, 0]
    logp_guess = logp.detach().float() + off
    chunk = backend.open_chunk(p, inputs.targets, entropy=True, entropy_gradient=False, logp_guess=logp_guess)
    assert int(chunk.sums.n_rescue) == int(unsound(p, inputs.targets, logp_guess, tile.block_v).sum())
    if dtype == torch.bfloat16:
        assert int(chunk.sums.n_rescue) == (shape[0] if off > 33 else 0)
    check_statistics(inputs, temperature, chunk.statistics(), second_moments=False)
    a = cotangents(shape[0], "logp")[0]
    gradient = chunk.gradient(LogitCotangents(a))
    (exact,) = torch.autograd.grad(logp, [z], a.double())
    exact = exact * temperature.double()[:, None]
    got = gradient.row_scale.double()[:, None] * gradient.matrix.double()
    assert gradient.target_grads is not None
    got.scatter_add_(1, inputs.targets[:, None], gradient.target_grads.double()[:, None])
    error = (got - exact).norm(dim=1)
    least = 2**-25 * shape[2] ** 0.5 * gradient.row_scale.double().abs() if dtype == torch.float16 else 1e-30  # subnormal E
    assert (error <= torch.finfo(dtype).eps / 2 * exact.norm(dim=1) + least).all()


@pytest.mark.skipif(HOPPER, reason="there the kernels themselves run")
@pytest.mark.usefixtures("emulated")
def test_an_entropy_gradient_takes_a_chunk_of_logits() -> None:
    inputs, _ = inputs_of((5, 8, 40), torch.bfloat16)
    p = Projection(inputs.hidden.detach(), inputs.weight.detach())
    half = Projection(p.hidden.half(), p.weight.half())
    opened = functools.partial(backend.open_chunk, targets=inputs.targets, entropy=True)
    assert type(opened(p, entropy_gradient=False)).__name__ == "ScaledExpChunk"
    assert type(opened(p, entropy_gradient=True)).__name__ == "LogitChunk"
    assert type(opened(half, entropy_gradient=False)).__name__ == "ScaledExpChunk"
    assert type(opened(half, entropy_gradient=True)).__name__ == "LogitChunk"


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
def test_a_thread_that_nothing_was_launched_in_before() -> None:
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
    """The sums of both kernels beside those of the emulation, and the same bits from run to run."""
    inputs = make_inputs(700, 200, 3001, dtype=torch.bfloat16, device="cuda")
    p = Projection(inputs.hidden.detach(), inputs.weight.detach())
    cpu = Projection(p.hidden.cpu(), p.weight.cpu())
    first, sums = products.stream_statistics(p, inputs.targets, entropy=entropy, second_moments=False, budget=2**30, tile=tile)
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
