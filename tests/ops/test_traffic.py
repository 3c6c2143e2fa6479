"""Bytes moved and operations launched by the torch backend on CUDA, counted on CPU tensors that report a CUDA device.

A product's operands and its own fp32 output are not counted: every implementation has them. Each other operation counts what it
reads and writes of logits [C, V] and of d_weight [V, D].
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import make_batch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eapo_kernels import Options, eapo_loss, token_stats
from eapo_kernels.ops import gemm, torch_backend
from eapo_kernels.ops import token_stats as op
from eapo_kernels.ops.vocab_shard import INVALID
from eapo_kernels.testing import assert_no_worse_than, eager_token_stats, make_inputs, oracle_token_stats

N, D, V = 96, 24, 512
aten = torch.ops.aten
FEW = {
    aten.gather,
    aten.scatter_,
    aten.scatter,
    aten.index,
    aten.index_put_,
    aten.empty,
    aten.new_empty,
    aten.empty_like,
    aten.detach,
}
"""Operations that touch a few elements of a large tensor, or none."""


class Traffic(TorchDispatchMode):
    """Counts bytes of logits and passes over them, bytes of d_weight, and products."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = self.passes = self.weight_read = self.weight_written = self.products = self.rows = self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        packet, schema = function.overloadpacket, function._schema
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if packet in FEW or views:
            return result
        before = self.logits
        self.calls += 1
        overwritten = packet in (aten.copy_, aten.zero_, aten.fill_)
        read = [
            t
            for t in tree_leaves((args[overwritten:], {k: v for k, v in kwargs.items() if k != "out"}))
            if isinstance(t, Tensor)
        ]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.logits += sum(size(t, V) for t in (*read, *written) if is_logits(t))
        self.passes += self.logits > before
        self.weight_read += sum(size(t, D) for t in read if t.shape[-1:] == (D,) and t.shape[0] == V)
        self.weight_written += sum(size(t, D) for t in written if t.shape[-1:] == (D,) and t.shape[0] == V)
        return result


def is_logits(t: Tensor) -> bool:
    return t.dim() == 2 and t.shape[1] == V and t.shape[0] > 1


def size(t: Tensor, columns: int) -> int:
    return t.shape[0] * columns * t.element_size()


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """Tensors report a CUDA device; products multiply in fp32 out of the mode's sight, and are counted."""
    counted = Traffic()
    real = gemm.add_product_

    def product(out: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> Tensor:
        counted.products += 1
        if out.shape[1] == V:
            counted.rows = len(out)
        if out.shape == (V, D):
            counted.weight_written += size(out, D)
            counted.weight_read += 0 if overwrite else size(out, D)
        with torch.utils._python_dispatch._disable_current_modes():
            return real(out, a.to(out.dtype), b.to(out.dtype), overwrite=overwrite)

    monkeypatch.setattr(gemm, "add_product_", product)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch_backend, "_compiled", lambda: None)
    monkeypatch.setenv("EAPO_KERNELS_BACKEND", "torch")
    return counted


def one_pass(mode: Traffic, dtype: torch.dtype, *, metrics: bool = True, budget: int | None = None, grad: float = 1.0) -> None:
    inputs = make_inputs(N, D, V, dtype=dtype)
    batch = make_batch(inputs, masked=False)
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    with mode:
        loss = eapo_loss(
            hidden, weight, batch, positive_weight=0.7, metrics=metrics, options=Options(memory_budget=budget)
        ).loss
        loss.backward(torch.tensor(grad))


@pytest.mark.parametrize(
    ("dtype", "metrics", "expected"),
    [(torch.bfloat16, True, 30), (torch.bfloat16, False, 18), (torch.float32, True, 24), (torch.float32, False, 12)],
)
def test_bytes_a_logit_without_the_compiler(dtype: torch.dtype, metrics: bool, expected: int, mode: Traffic) -> None:
    """Maximum 4, softmax in place 8, matrix 6 (none in fp32), entropy 12 (if there are metrics). 86 at 22c18e3."""
    one_pass(mode, dtype, metrics=metrics)
    assert mode.products == 3
    assert mode.logits == expected * mode.rows * V
    assert mode.rows == N if metrics else 0 < mode.rows < N, "without metrics idle tokens are left out"


def test_launches_over_a_chunk(mode: Traffic) -> None:
    """Maximum, softmax, matrix, two for the entropy, three products; and all torch calls of a loss and its backward."""
    one_pass(mode, torch.bfloat16)
    assert (mode.passes, mode.products) == (5, 3)
    assert mode.calls <= 165, "223 at first, 195 with shared statistics of groups"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_d_weight_is_written_once_in_one_chunk(dtype: torch.dtype, mode: Traffic) -> None:
    """bf16: into a slab in fp32, and from there rounded to its place. The incoming gradient is in the row factors."""
    one_pass(mode, dtype, grad=0.25)
    slab = 4 * V * D if dtype == torch.bfloat16 else 0
    assert mode.weight_written - slab == dtype.itemsize * V * D
    assert mode.weight_read == slab


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_d_weight_of_several_chunks(chunks: int, dtype: torch.dtype, mode: Traffic) -> None:
    """4VD for the first chunk, 8VD for every other, 6VD to scale and round."""
    one_pass(mode, dtype, budget=-(-N // chunks) * V * 6, grad=0.25)
    assert mode.products == 3 * chunks
    buffers = 8 * V * D * chunks if dtype == torch.float16 else 0  # fp16: each chunk has a power of two of its own
    moved = mode.weight_read + mode.weight_written - buffers
    scaled = 8 * V * D * chunks if dtype == torch.float16 else 0
    assert moved - scaled == (4 + 8 * (chunks - 1) + 6) * V * D


def test_bytes_of_statistics_and_of_a_recomputed_gradient(mode: Traffic) -> None:
    """24 with entropy; 22 a slab for the gradient of log-probs."""
    inputs = make_inputs(N, D, V, dtype=torch.bfloat16)
    projection = op.Projection(inputs.hidden, inputs.weight)
    options, backend = Options(plan="recompute", compact=False), torch_backend.BACKEND
    with mode:
        s, _ = op.compute_statistics(projection, inputs.targets, backend, entropy=True, second_moments=False, options=options)
    assert mode.logits == 24 * N * V
    mode.logits = 0
    cotangents = op.LogitCotangents(torch.ones(N))
    with mode:
        op.gradients_by_recomputing(projection, inputs.targets, s, cotangents, backend, (True, True, False), options)
    assert mode.logits == 22 * N * V


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, mode: Traffic) -> Callable[..., None]:
    """Compares statistics and gradients of the CUDA path with float64."""

    def run(dtype: torch.dtype, **options: Any) -> None:
        inputs = make_inputs(N, D, V, dtype=dtype, bias=True)
        removed = torch.ones(V, dtype=torch.bool).scatter(0, inputs.targets, False) & (torch.arange(V) % 7 == 0)
        inputs.bias.masked_fill_(removed, -torch.inf)
        leaves = [t.detach().requires_grad_() for t in (inputs.hidden, inputs.weight, inputs.bias)]
        temperature = 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(3))
        names = ("logp", "entropy", "lse")
        c = torch.randn(N, generator=torch.Generator().manual_seed(4))

        def results(
            compute: Callable[..., Any], tensors: list[Tensor], scale: Tensor, factor: Tensor, **more: Any
        ) -> list[Tensor]:
            hidden, weight, bias = tensors
            s = compute(hidden, weight, inputs.targets, bias=bias, inv_temperature=scale, **more)
            gradients = torch.autograd.grad((factor * s.logp).sum(), tensors)
            return [*(getattr(s, n).detach() for n in names), *gradients]

        ours = results(token_stats, leaves, temperature, c, entropy="nograd", options=Options(**options))
        plain = [t.detach().requires_grad_() for t in leaves]
        eager = results(eager_token_stats, plain, temperature, c)
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact_stats = oracle_token_stats(inputs, inv_temperature=temperature)
        from eapo_kernels import reference

        exact = results(reference.token_stats, wide, temperature.double(), c.double())
        assert torch.equal(exact[0], exact_stats.logp.detach())
        for name, a, b, e in zip((*names, "d_hidden", "d_weight", "d_bias"), ours, eager, exact, strict=True):
            plain_value = torch.where(b.isfinite(), b, torch.zeros_like(b))
            assert_no_worse_than(a, plain_value, e, floor=2e-6 if dtype == torch.float32 else 2e-3, name=name)

    return run


@pytest.mark.parametrize("plan", ["one_chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_numbers(
    compiled: bool, dtype: torch.dtype, plan: str, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bias that removes columns and a temperature per row."""
    if compiled:
        function = torch.compile(torch_backend.fused_softmax, dynamic=True, fullgraph=True)
        monkeypatch.setattr(torch_backend, "_compiled", lambda: function)
    check(dtype, plan=plan)


def test_without_a_working_compiler_the_plain_way_is_taken_and_said_once(
    mode: Traffic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    calls: list[int] = []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        raise RuntimeError("no C compiler\nmore")

    torch_backend._log_plain.cache_clear()
    torch_backend._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **how: broken)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    z, targets = torch.randn(8, 50), torch.arange(8)
    exact = torch.log_softmax(z.double(), 1).gather(1, targets[:, None])[:, 0]
    for _ in range(3):
        found = torch_backend.softmax_chunk(z.clone(), targets, torch.bfloat16, entropy=True, matrix=True)
        torch.testing.assert_close(found.logp.double(), exact, rtol=0, atol=1e-6)
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the torch backend runs without torch.compile, in more passes over memory: RuntimeError: no C compiler"
    ]
    torch_backend._log_plain.cache_clear()
    torch_backend._compiled.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_a_logit_with_the_compiler(dtype: torch.dtype) -> None:
    """In the compiler's own code: a sweep over the columns for the maximum, one for the sums, one for the matrix."""
    z, targets = torch.randn(64, V), torch.arange(64)
    out = z if dtype == torch.float32 else torch.empty(64, V, dtype=dtype)
    function = torch.compile(torch_backend.fused_softmax, dynamic=True, fullgraph=True)
    _, (code, *_) = run_and_get_code(function, z, targets, out, 1.0, True)
    kernel = code[code.index("void ") :]
    size = {name: 2 if "BFloat16" in kind else 4 for kind, name in re.findall(r"(\S+)\* (\w*ptr\d+)[,)]", kernel)}
    moved = []
    for sweep in kernel.split("for(int64_t x1=")[1:]:
        at = re.findall(r"(.*?)\b(\w*ptr\d+)(?: \+ |\[)static_cast<int64_t>\(x1(?:_tail)? \+ ks\d\*x0\)(.*)", sweep)
        moved.append(sum(size[name] for name, _ in {(name, "store" in before or " = " in after) for before, name, after in at}))
    assert moved == [4, 4, 4 + dtype.itemsize], "14 in bf16"


@pytest.mark.parametrize("function", [torch_backend.plain_softmax, torch_backend.fused_softmax])
def test_rows_of_few_columns(function: Callable[..., Any]) -> None:
    """The target alone, the target removed, an invalid target, nothing but -inf beside the target."""
    inf = torch.inf
    z = torch.tensor([[1.0, -inf, -inf], [-inf, 0.5, 0.5], [0.0, 0.0, 0.0], [-inf, -inf, 3.0]])
    out = torch.empty_like(z)
    offset, log_sum, logp, rest, entropy = function(z, torch.tensor([0, 0, INVALID, 2]), out, 1.0, True)
    log2, log3 = torch.tensor([2.0, 3.0]).log().tolist()
    torch.testing.assert_close(logp, torch.tensor([0.0, -inf, torch.nan, 0.0]), equal_nan=True)
    torch.testing.assert_close((offset + log_sum)[1:3], torch.tensor([0.5 + log2, log3]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, log2, log3, 0.0]))
    torch.testing.assert_close(rest[[0, 1, 3]], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(out[1], torch.tensor([-1.0, 0.5, 0.5]))
    assert torch.equal(out[0], torch.tensor([-1.0, 0.0, 0.0]))
    one = function(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), None, 1.0, True)
    assert torch.equal(torch.stack(one[2:]), torch.zeros(3, 2)), "log-prob, 1 - p and entropy of a vocabulary of one token"


@pytest.mark.parametrize("function", [torch_backend.plain_softmax, torch_backend.fused_softmax])
@pytest.mark.parametrize("margin", [5.0, 12.0, 25.0, 40.0])
def test_a_confident_target_keeps_its_gradient(margin: float, function: Callable[..., Any]) -> None:
    """log p = -R and 1 - p = R down to R = 1e-14: eager PyTorch loses both below 6e-8."""
    z = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)
    z[torch.arange(8), targets] = margin + z.amax(1)
    wide = z.double()
    others = (wide - wide.logsumexp(1, keepdim=True)).exp().scatter(1, targets[:, None], 0.0)
    rest, entropy = others.sum(1), torch.special.entr(others).sum(1) - (1 - others.sum(1)) * torch.log1p(-others.sum(1))
    out = torch.empty_like(z)
    _, _, logp, found_rest, found = function(z.clone(), targets, out, 1.0, True)
    torch.testing.assert_close(logp.double(), torch.log1p(-rest), rtol=1e-5, atol=0)
    torch.testing.assert_close(found_rest.double(), rest, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        (out * found_rest[:, None]).scatter(1, targets[:, None], 0.0).double(), others, rtol=2e-5, atol=0
    )
    assert (out.gather(1, targets[:, None]) == -1).all()
    torch.testing.assert_close(found.double(), entropy, rtol=1e-4, atol=0)
