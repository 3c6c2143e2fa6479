"""The backend's record: inputs that it refuses, and its work under torch.library and
torch.compile."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comparison import check_compiles_once, check_custom_op, projection
from torch import Tensor

from eapo_kernels import BackendUnavailable, available_backends, token_stats
from eapo_kernels.ops.lm_head import Projection, describable
from eapo_kernels.ops.triton import backend, common
from eapo_kernels.testing import make_inputs

CPU = Projection(torch.zeros(2, 8), torch.zeros(3, 8))


def _pretend(kind: str, dtype: torch.dtype = torch.float32) -> Projection:
    tensor = SimpleNamespace(device=torch.device(kind), dtype=dtype)
    return Projection(tensor, tensor)  # type: ignore[arg-type]


def test_runs_here(device: str) -> None:
    assert available_backends(device)["triton"] is None


def test_float64_is_refused(device: str) -> None:
    inputs = make_inputs(4, 8, 9, dtype=torch.float64, device=device)
    with pytest.raises(BackendUnavailable, match="backend 'triton': float64 inputs"):
        token_stats(inputs.hidden, inputs.weight, inputs.targets, backend="triton")


def test_every_refusal_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA" in backend.supports(_pretend("mps"))
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1" in backend.supports(CPU)
    monkeypatch.setattr(backend, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    assert "7.5" in backend.supports(_pretend("cuda"))
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    assert backend.supports(_pretend("cuda")) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in backend.supports(_pretend("cuda"))
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert "interpreter" in backend.supports(_pretend("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_descriptor_can_describe(dtype: torch.dtype, device: str) -> None:
    matrix = torch.zeros(40, 64, dtype=dtype, device=device)
    assert describable(matrix)
    assert describable(matrix[3:, :40])
    assert not describable(matrix[:, 1:])
    assert not describable(matrix.t())
    assert not describable(matrix[:, ::2])
    assert not describable(matrix[:1].expand(40, 64))
    assert not describable(torch.zeros(40, 7, dtype=dtype, device=device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's table")
def test_descriptors_are_used_where_they_can_be() -> None:
    inputs = make_inputs(4, 16, 99, dtype=torch.bfloat16)
    assert common.product_tile("stream_statistics", projection(inputs)).descriptors
    odd = make_inputs(4, 7, 99, dtype=torch.bfloat16)
    assert not common.product_tile("stream_statistics", projection(odd)).descriptors


@pytest.mark.parametrize(("second_moments", "entropy"), [(False, True), (True, True), (False, False)])
def test_custom_op_contract(second_moments: bool, entropy: bool, device: str) -> None:
    check_custom_op("triton", device, entropy=entropy, second_moments=second_moments)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 5.0)], ids=str)
def test_custom_op_contract_with_saved_rows(dtype: torch.dtype, softcap: float | None, device: str) -> None:
    check_custom_op("triton", device, entropy=True, second_moments=False, dtype=dtype, save=True, softcap=softcap)


def test_compiles_in_one_graph_without_recompiling_for_a_new_length(device: str) -> None:
    check_compiles_once("triton", device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_temperature_and_length_do_not_recompile(device: str) -> None:
    from eapo_kernels.ops.triton.online_softmax import stream_statistics_kernel

    inputs = make_inputs(100, 64, 1000, dtype=torch.bfloat16, device=device)

    def variants() -> int:
        return sum(len(cache[0]) for cache in stream_statistics_kernel.device_caches.values())

    token_stats(inputs.hidden, inputs.weight, inputs.targets, inv_temperature=0.9, backend="triton")
    before = variants()
    for n, inv_temperature in ((100, 1.0), (99, 0.7), (96, 2.0), (1, 1.3)):
        token_stats(inputs.hidden[:n], inputs.weight, inputs.targets[:n], inv_temperature=inv_temperature, backend="triton")
    assert variants() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_with_a_length_known_only_when_it_runs(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(24, 16, 99, dtype=dtype, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return token_stats(hidden[mask], weight, targets[mask], entropy="nograd", backend="triton").logp.sum()

    weight, mask = inputs.weight.requires_grad_(), torch.arange(24, device=device) % 3 > 0
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (ours,) = torch.autograd.grad(loss(inputs.hidden, weight, inputs.targets, mask), [weight])
    plain = token_stats(inputs.hidden[mask], weight, inputs.targets[mask], entropy="nograd", backend="triton").logp.sum()
    torch.testing.assert_close(ours, torch.autograd.grad(plain, [weight])[0], rtol=2e-2, atol=2e-2)
