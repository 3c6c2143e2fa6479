"""Statistics over a support against a dense float64 oracle that masks the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eapo_kernels import EapoError, Options, ShapeError, TokenSupport, reference, token_stats
from eapo_kernels.ops import sparse
from eapo_kernels.testing import Inputs, assert_no_worse_than, eager_token_stats, make_inputs

N, D, V = 60, 40, 300
FIELDS = ("logp", "entropy", "lse", "p2", "p2_logp", "varentropy")


def make_support(inputs: Inputs, largest: int = 70, seed: int = 1) -> TokenSupport:
    """0 to ``largest`` random ids a position beside its target, in no order."""
    draw = torch.Generator().manual_seed(seed)
    vocab, lists = len(inputs.weight), []
    for target in inputs.targets:
        count = int(torch.randint(0, largest, (1,), generator=draw))
        lists.append(torch.cat([torch.randperm(vocab, generator=draw)[:count], target[None]]).unique().flip(0))
    return TokenSupport.from_lists(lists)


def allowed(support: TokenSupport, vocab: int) -> Tensor:
    """[N, V] bool."""
    mask = torch.zeros(support.n_rows, vocab, dtype=torch.bool)
    mask[support.rows(), support.ids] = True
    return mask


def compare(
    inputs: Inputs, support: TokenSupport, *, mask: Tensor | None = None, options: Options | None = None, **kwargs: Any
) -> None:
    """Statistics and gradients through all of them, in the inputs' dtype, beside plain PyTorch and float64."""
    dense = allowed(support, len(inputs.weight))
    valid = torch.ones(len(dense), dtype=torch.bool) if mask is None else mask
    dense[~valid] = True
    factors = torch.randn(3, len(dense), generator=torch.Generator().manual_seed(2))

    def run(which: str) -> list[Tensor]:
        i = inputs.to(torch.float64) if which == "exact" else inputs
        leaves = [t.detach().clone().requires_grad_() for t in (i.hidden, i.weight, i.bias) if t is not None]
        bias, more = (leaves[2] if len(leaves) > 2 else None), dict(kwargs)
        if which == "exact" and isinstance(more.get("inv_temperature"), Tensor):
            more["inv_temperature"] = more["inv_temperature"].double()
        if which == "ours":
            s = token_stats(
                *leaves[:2], i.targets, bias=bias, mask=mask, second_moments=True, support=support, options=options, **more
            )
        elif which == "exact":
            s = reference.token_stats(*leaves[:2], i.targets, bias=bias, mask=mask, second_moments=True, allowed=dense, **more)
        else:
            removed = torch.zeros_like(dense, dtype=leaves[0].dtype).masked_fill(~dense, -1e4)
            s = eager_token_stats(*leaves[:2], i.targets, bias=bias, mask=mask, second_moments=True, added=removed, **more)
        assert s.entropy is not None
        loss = sum((f.to(v.dtype) * v).sum() for f, v in zip(factors, (s.logp, s.entropy, s.lse), strict=True))
        return [*(getattr(s, name).detach() for name in FIELDS), *torch.autograd.grad(loss, leaves)]

    floor = {torch.float64: 1e-12, torch.float32: 1e-6}.get(inputs.hidden.dtype, 4e-3)
    for name, ours, eager, exact in zip(
        (*FIELDS, "d_hidden", "d_weight", "d_bias"), run("ours"), run("eager"), run("exact"), strict=False
    ):
        assert_no_worse_than(ours, eager, exact, floor=floor, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_and_gradients(dtype: torch.dtype) -> None:
    inputs = make_inputs(N, D, V, dtype=dtype)
    compare(inputs, make_support(inputs))


@pytest.mark.parametrize(
    "kwargs", [{"softcap": 3.0}, {"logit_scale": 0.7}, {"inv_temperature": 1.4}, {"softcap": 5.0, "logit_scale": 2.0}]
)
@pytest.mark.parametrize("per_token", [False, True])
def test_transforms_of_logits(kwargs: dict[str, float], per_token: bool) -> None:
    """Bias, scale, soft-cap, temperature of the call and of the token."""
    inputs = make_inputs(N, D, V, bias=True)
    if per_token:
        kwargs = kwargs | {"inv_temperature": 0.5 + torch.rand(N, generator=torch.Generator().manual_seed(3))}
    compare(inputs, make_support(inputs), **kwargs)


def test_masked_rows_need_no_support_and_may_hold_nan() -> None:
    inputs = make_inputs(N, D, V)
    mask = torch.arange(N) % 3 > 0
    lists = [
        row.tolist() if keep else []
        for row, keep in zip(make_support(inputs).ids.split(make_support(inputs).offsets.diff().tolist()), mask, strict=True)
    ]
    compare(inputs, TokenSupport.from_lists(lists), mask=mask)
    hidden = torch.where(mask[:, None], inputs.hidden, torch.nan).requires_grad_()
    weight = inputs.weight.clone().requires_grad_()
    s = token_stats(hidden, weight, inputs.targets, mask=mask, support=make_support(inputs))
    (s.logp + s.entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad[~mask].any()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


def test_a_support_of_one_token_is_certain() -> None:
    inputs = make_inputs(N, D, V)
    leaves = inputs.leaves()
    s = token_stats(*leaves, inputs.targets, support=TokenSupport.from_padded(inputs.targets[:, None]))
    assert s.entropy is not None
    assert not s.logp.any()
    assert not s.entropy.any()
    for gradient in torch.autograd.grad(s.logp.sum() + s.entropy.sum(), leaves):
        assert not gradient.any()


def test_the_whole_vocabulary_is_no_support() -> None:
    inputs = make_inputs(N, D, V)
    everything = TokenSupport.from_padded(torch.arange(V).expand(N, V))
    c = torch.linspace(-1, 1, N)

    def run(support: TokenSupport | None) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight)]
        s = token_stats(*leaves, inputs.targets, support=support)
        assert s.entropy is not None
        return [s.logp, s.entropy, s.lse, *torch.autograd.grad((c * (s.logp + 0.3 * s.entropy)).sum(), leaves)]

    for a, b in zip(run(everything), run(None), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["grad", "nograd", "none"])
def test_entropy_of_the_vocabulary(mode: str) -> None:
    inputs = make_inputs(N, D, V)
    given = make_support(inputs)
    support = TokenSupport(given.ids, given.offsets, full_entropy=True)
    leaves = inputs.leaves()
    s = token_stats(*leaves, inputs.targets, support=support, entropy=mode)
    own, full = token_stats(*leaves, inputs.targets, support=given), token_stats(*leaves, inputs.targets)
    assert torch.equal(s.logp, own.logp)
    assert own.entropy is not None
    assert full.entropy is not None
    if mode == "none":
        assert s.entropy is None
        return
    assert s.entropy is not None
    assert torch.equal(s.entropy, full.entropy)
    assert s.entropy.requires_grad == (mode == "grad")
    if mode == "grad":
        for a, b in zip(
            torch.autograd.grad(s.entropy.sum(), leaves), torch.autograd.grad(full.entropy.sum(), leaves), strict=True
        ):
            assert torch.equal(a, b)


def test_same_bits_again_and_for_a_row_alone() -> None:
    inputs = make_inputs(N, D, V)
    support = make_support(inputs)

    def run(rows: slice) -> list[Tensor]:
        leaves = [inputs.hidden[rows].clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
        s = token_stats(*leaves, inputs.targets[rows], support=support.select(rows))
        assert s.entropy is not None
        return [s.logp, s.entropy, *torch.autograd.grad((s.logp + s.entropy).sum(), leaves)]

    for a, b in zip(run(slice(0, N)), run(slice(0, N)), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(run(slice(7, 8))[:2], run(slice(0, N))[:2], strict=True):
        assert torch.equal(a, b[7:8])


@pytest.mark.parametrize("entropy", [True, False])
def test_compiled(entropy: bool) -> None:
    """Without a break of the graph; another number of entries does not compile again more than once."""
    inputs = make_inputs(N, D, V)
    mode = "grad" if entropy else "none"

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        s = token_stats(hidden, weight, inputs.targets, support=TokenSupport(ids, offsets), entropy=mode, backend="torch")
        return s.logp.sum() if s.entropy is None else (s.logp + s.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True)
    for seed in range(3):
        support, leaves = make_support(inputs, seed=seed), inputs.leaves()
        expected = loss(*leaves, support.ids, support.offsets)
        found = compiled(*leaves, support.ids, support.offsets)
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b)


def test_the_op_passes_opcheck() -> None:
    i = make_inputs(6, 8, 20, bias=True)
    support = make_support(i, largest=5)
    tensors = (*i.leaves(), i.targets, support.ids, support.offsets, None)
    torch.library.opcheck(sparse._forward_op, (*tensors, 1.0, 1.0, 4.0, "", [], "torch", False, True, True))


@pytest.mark.parametrize(
    ("ids", "offsets", "message"),
    [
        (
            [3, 1, 2],
            [0, 2, 3],
            "support.ids: expected ascending ids without duplicates (from_csr sorts), got 3 before 1 in row 0",
        ),
        (
            [1, 1, 2],
            [0, 2, 3],
            "support.ids: expected ascending ids without duplicates (from_csr sorts), got 1 before 1 in row 0",
        ),
        ([1, 9, 2], [0, 2, 3], "support.ids: expected values in [0, 9), got 9 in row 0"),
        ([1, 3, 4], [0, 2, 3], "support.ids: expected the target 2 among the ids of row 1, got [4]"),
        ([1, 3, 2], [0, 2, 4], "support.offsets: expected rising numbers from 0 to 3, the number of ids, got [0, 2, 4]"),
        ([1, 3, 2], [0, 5, 3], "support.offsets: expected rising numbers from 0 to 3, the number of ids, got [0, 5, 3]"),
    ],
)
def test_a_support_that_makes_no_sense_is_refused(ids: list[int], offsets: list[int], message: str) -> None:
    inputs = make_inputs(2, 8, 9)
    targets, support = torch.tensor([1, 2]), TokenSupport(torch.tensor(ids), torch.tensor(offsets))
    with pytest.raises(EapoError) as caught:
        token_stats(inputs.hidden, inputs.weight, targets, support=support)
    assert str(caught.value) == message


def test_shapes_are_checked() -> None:
    inputs, ids = make_inputs(2, 8, 9), torch.tensor([1, 2])
    with pytest.raises(ShapeError, match=r"support: expected 2 positions on cpu, got 1 positions on cpu"):
        token_stats(inputs.hidden, inputs.weight, ids, support=TokenSupport(ids, torch.tensor([0, 2])))
    with pytest.raises(EapoError, match=r"support: expected a TokenSupport or None, got \[\[1\], \[2\]\]"):
        token_stats(inputs.hidden, inputs.weight, ids, support=[[1], [2]])  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"support.ids: expected int64 \[E\], got int32 \[2\] cpu"):
        TokenSupport(ids.int(), torch.tensor([0, 2]))
    with pytest.raises(ShapeError, match=r"support.offsets: expected int64 \[N \+ 1\], got int64 \[1, 2\] cpu"):
        TokenSupport(ids, torch.tensor([[0, 2]]))
    with pytest.raises(ShapeError, match=r"ids: expected integers \[N, K\], got float32 \[1, 2\] cpu"):
        TokenSupport.from_padded(torch.ones(1, 2))
    with pytest.raises(EapoError, match=r"offsets: expected rising numbers in \[0, 2\], got \[0, 3\]"):
        TokenSupport.from_csr(ids, torch.tensor([0, 3]))


def test_makers_agree() -> None:
    rows = [[5, 2, 9], [], [7]]
    expected = TokenSupport(torch.tensor([2, 5, 9, 7]), torch.tensor([0, 3, 3, 4]))
    padded = torch.tensor([[-1, 5, 2, 9], [-1, -1, -1, -1], [7, -1, -1, -1]], dtype=torch.int32)
    csr = torch.tensor([8, 5, 2, 9, 7, 8], dtype=torch.int32)
    for support in (
        TokenSupport.from_lists(rows),
        TokenSupport.from_padded(padded),
        TokenSupport.from_csr(csr, torch.tensor([1, 4, 4, 5], dtype=torch.int32)),
    ):
        assert torch.equal(support.ids, expected.ids)
        assert torch.equal(support.offsets, expected.offsets)
    assert TokenSupport.from_lists([]).n_rows == 0
    assert TokenSupport.from_padded(torch.full((3, 2), -1)).offsets.tolist() == [0, 0, 0, 0]
    for chosen in (slice(1, 3), torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = expected.select(chosen)
        numbers = torch.arange(3)[chosen].tolist()
        assert [part.tolist() for part in some.ids.split(some.offsets.diff().tolist())] == [sorted(rows[n]) for n in numbers]


@pytest.mark.parametrize("lists", [[[1.5]], [[True]], [[1], [2.0]]], ids=repr)
def test_what_is_no_list_of_ids_is_refused(lists: Any) -> None:
    """1.5 is not token 1."""
    with pytest.raises(EapoError, match="lists: expected "):
        TokenSupport.from_lists(lists)
    with pytest.raises(ShapeError, match=r"ids: expected integers \[N, K\]"):
        TokenSupport.from_padded(torch.tensor([[True]]))
