"""Entries of a [N, V] matrix: chosen logits and sums of weighted rows, for any number of entries a row, strides and order."""

from __future__ import annotations

import pytest
import torch
from comparison import policy_batch
from torch import Tensor

from eapo_kernels import Options, eapo_loss
from eapo_kernels.ops.dispatch import WeightedRows
from eapo_kernels.ops.lm_head import Projection
from eapo_kernels.ops.triton import sparse, tiles
from eapo_kernels.ops.triton.backend import BACKEND
from eapo_kernels.ops.triton.tiles import Tile
from eapo_kernels.ops.vocab_shard import INVALID
from eapo_kernels.testing import make_inputs

pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [(1, 8, 1), (63, 7, 50), (20, 72, 257), (9, 1500, 4)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def cases(*few: Tile) -> list[tuple[tuple[int, int, int], torch.dtype, Tile | None]]:
    """Every shape and dtype with the table's tile, and a small shape with others."""
    return [(s, dtype, None) for s in SHAPES for dtype in DTYPES] + [((12, 7, 33), torch.bfloat16, tile) for tile in few]


def support(n: int, v: int, device: str, most: int = 200) -> tuple[Tensor, Tensor]:
    """(rows, ids), [E] int64: 0 to ``most`` ids a row, ascending; the last id in every row that has any."""
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(min(most, v) + 1, (n,), generator=g)
    counts[1::5] = 0
    counts[0] = min(most, v)
    ids = [
        torch.cat([torch.randperm(v - 1, generator=g)[: count - 1], torch.tensor([v - 1])])
        for count in counts.tolist()
        if count
    ]
    rows = torch.arange(n).repeat_interleave(counts)
    return rows.to(device), torch.cat([one.sort().values for one in ids]).to(device)


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def add(out: Tensor, first: int, entries: WeightedRows, **tile: Tile) -> Tensor:
    for launch in sparse.add_rows(out, first, entries, **tile):
        launch()
    return out


def check(out: Tensor, before: Tensor, entries: WeightedRows, first: int = 0) -> None:
    """``out`` is the sum to 1e-6 of the sum of all terms without their signs."""
    keys, rows, values, source, _ = entries
    inside = (keys >= first) & (keys < first + len(out)) & (values != 0)
    keys, terms = (keys - first)[inside], source.double()[rows[inside]] * values.double()[inside].unsqueeze(1)
    exact = before.double().index_add(0, keys, terms)
    size = before.double().abs().index_add(0, keys, terms.abs())
    assert (out.double() - exact).abs().le(1e-6 * size).all()
    assert torch.equal(out[size == 0], before[size == 0])


@pytest.mark.parametrize(("shape", "dtype", "tile"), cases(Tile(1, 0, 64), Tile(4, 0, 4), Tile(64, 0, 512)), ids=str)
def test_both_directions(shape: tuple[int, int, int], tile: Tile | None, dtype: torch.dtype, device: str) -> None:
    """d_hidden: keys are tokens. d_weight: keys are ids, one of which is in every row."""
    n, d, v = shape
    rows, ids = support(n, v, device)
    values = random(len(ids), device=device)
    values[::7] = 0
    for keys, others, size, m in ((rows, ids, n, v), (ids, rows, v, n)):
        source, before = random(m, d, device=device, dtype=dtype), random(size, d, device=device, seed=2)
        entries = WeightedRows.sort(keys, others, values, source)
        check(add(before.clone(), 0, entries, tile=tile), before, entries)


@pytest.mark.parametrize("per_key", [64, 126, 129, 4000])
def test_a_key_of_many_entries_is_cut_into_blocks(per_key: int, device: str) -> None:
    """Blocks of 64 entries, and of the longest key carries of 62 blocks, which a program adds 16 at a time."""
    keys = torch.tensor([1, 2, 3, 5], device=device).repeat_interleave(torch.tensor([4, per_key, 1, per_key], device=device))
    source, before = random(50, 24, device=device, dtype=torch.bfloat16), random(7, 24, device=device)
    entries = WeightedRows(keys, torch.arange(len(keys), device=device) % 50, random(len(keys), device=device), source)
    out = add(before.clone(), 0, entries, tile=Tile(16, 0, 32), carries_tile=Tile(16, 0, 16))
    check(out, before, entries)


def test_work_is_cut_evenly_and_the_carries_are_small() -> None:
    """Whatever the keys are: 32 entries a program of a chunk's targets, 32 MiB of carries for four million entries."""
    tile = tiles.find("add_rows", "sm90", 2, 4096)
    for n_entries, most in ((8192, 32), (2**22, 2048)):
        one = torch.empty(n_entries, dtype=torch.int64, device="meta")
        source = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
        out = torch.empty(8192, 4096, device="meta")
        launch, last = sparse.add_rows(out, 0, WeightedRows(one, one, one.float(), source), tile=tile, carries_tile=tile)
        assert launch.arguments["per_block"] <= most
        assert launch.grid == 4 * -(-n_entries // launch.arguments["per_block"])
        assert last.grid == launch.grid - 4
        assert launch.arguments["carries"].nbytes <= 2**25


def counted_seconds(targets: Tensor, dim: int) -> float:
    """Of one entry a row, on 132 multiprocessors that share 4.2 TB/s: the bytes of the first launch, whose programs have
    the same work, and of the second those of all programs or of the longest one alone."""
    share, itemsize = 4.2e12 / 132, 2
    n, counts = len(targets), targets.unique(return_counts=True)[1]
    one = torch.empty(n, dtype=torch.int64, device="meta")
    entries = WeightedRows(one, one, one.float(), torch.empty(n, dim, dtype=torch.bfloat16, device="meta"))
    tile, carries_tile = tiles.find("add_rows", "sm90", itemsize, dim), tiles.find("add_carries", "sm90", 4, dim)
    out = torch.empty(n, dim, device="meta")
    first, _ = sparse.add_rows(out, 0, entries, tile=tile, carries_tile=carries_tile)
    blocks = counts // first.arguments["per_block"]  # of a key, at most as many carries
    longest = int(blocks.max()) * carries_tile.block_d * 4 + carries_tile.block_d * 8
    carried = max(int(blocks.sum()) * dim * 4 / 132, longest if int(blocks.max()) > 1 else 0)
    return ((n * dim * itemsize + len(counts) * dim * 8) / 132 + carried) / share


@pytest.mark.parametrize("dim", [1024, 2048, 4096, 8192])
def test_a_token_of_all_rows_costs_at_most_three_times_the_uniform_case(dim: int) -> None:
    n = 8192
    uniform, equal = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    frequent = torch.where(uniform < n // 20, 0, uniform)
    assert counted_seconds(equal, dim) <= 3 * counted_seconds(uniform, dim)
    assert counted_seconds(frequent, dim) <= 1.05 * counted_seconds(uniform, dim)


def test_a_slab_takes_its_own_keys(device: str) -> None:
    """Keys outside of the slab, and keys that name no row of any slab, change no row."""
    rows, ids = support(30, 300, device)
    ids[5], ids[6], ids[7], ids[8] = -1, 300, 2**40, INVALID
    before, source = random(300, 24, device=device), random(30, 24, device=device)
    entries = WeightedRows.sort(ids, rows, random(len(ids), device=device), source)
    out = before.clone()
    for first, last in ((0, 100), (100, 130), (130, 299), (299, 300)):
        BACKEND.add_rows(out[first:last], first, entries)
    check(out, before, entries)
    check(add(before[100:130].clone(), 100, entries), before[100:130], entries, first=100)


def test_other_rows_are_not_written(device: str) -> None:
    """Not even with zeros, which would be a race with their own programs: -0.0 keeps its sign."""
    keys = torch.tensor([1, 1, 4, 4, 4, 5], device=device)
    entries = WeightedRows(keys, keys.new_zeros(6), random(6, device=device), torch.ones(1, 24, device=device))
    everything = torch.full((10, 24), -0.0, device=device)
    add(everything[3:7], 3, entries, tile=Tile(4, 0, 16))
    assert everything.eq(0).logical_and(everything.signbit()).all(1).logical_not().nonzero().tolist() == [[4], [5]]


def test_entries_of_value_zero_read_nothing(device: str) -> None:
    """Sorted, they have no key: one key would have all masked rows. In the caller's order they keep it."""
    rows, ids = support(30, 300, device)
    idle = rows % 3 == 0
    values = torch.where(idle, 0.0, random(len(ids), device=device))
    source = random(30, 24, device=device)
    source[::3] = torch.nan
    entries = WeightedRows.sort(ids, rows, values, source)
    assert entries.keys[: idle.sum()].eq(INVALID).all()
    assert entries.keys[idle.sum() :].ge(0).all()
    out = torch.zeros(300, 24, device=device)
    BACKEND.add_rows(out, 0, entries)
    check(out, torch.zeros_like(out), entries)
    weight = random(300, 24, device=device).index_fill_(0, ids[3:4], torch.nan)
    values = torch.where(ids == ids[3], 0.0, values)
    d_hidden = torch.zeros(30, 24, device=device)
    BACKEND.add_rows(d_hidden, 0, WeightedRows(rows, ids, values, weight))
    check(d_hidden, torch.zeros_like(d_hidden), WeightedRows(rows, ids, values, weight))


def test_rows_that_do_not_exist_are_not_read(device: str) -> None:
    """A token whose target is no id has NaN as its value, and so its whole row becomes NaN."""
    rows = torch.tensor([-1, 5, 2**40, 2, 4], device=device)
    values = torch.tensor([torch.nan, torch.nan, torch.nan, 1.0, 0.0], device=device)
    out = torch.zeros(5, 24, device=device)
    source = random(5, 24, device=device)
    BACKEND.add_rows(out, 0, WeightedRows(torch.arange(5, device=device), rows, values, source))
    assert out[:3].isnan().all()
    assert torch.equal(out[3], source[2])
    assert torch.equal(out[4], torch.zeros_like(out[4]))


def test_strides_and_no_entries(device: str) -> None:
    rows, ids = support(63, 50, device)
    wide = random(63, 48, device=device)[:, ::2]
    out = torch.zeros(24, 100, device=device).t()[::2]
    entries = WeightedRows.sort(ids, rows, random(2 * len(ids), device=device)[::2], wide)
    check(add(out, 0, entries), torch.zeros_like(out), entries)
    before = out.clone()
    BACKEND.add_rows(out, 0, WeightedRows(ids[:0], rows[:0], entries.values[:0], wide))
    assert torch.equal(out, before)


def test_bitwise_reproducible(device: str) -> None:
    rows, ids = support(100, 7, device)
    entries = WeightedRows.sort(ids, rows, random(len(ids), device=device), random(100, 72, device=device))
    first, second = (add(torch.zeros(7, 72, device=device), 0, entries, tile=Tile(4, 0, 64)) for _ in range(2))
    assert torch.equal(first, second)


def far_apart(values: Tensor) -> Tensor:
    """``values`` [3, D] of two bytes each, with 2^30 elements and more from row to row. Pages between them take no memory."""
    stride = 2**30 + 8
    storage = torch.UntypedStorage(2 * (2 * stride + values.shape[1]), device=values.device)
    return values.new_tensor([]).set_(storage, 0, values.shape, (stride, 1)).copy_(values)


def test_addresses_beyond_32_bits(device: str) -> None:
    near = random(3, 24, device=device, dtype=torch.bfloat16)
    far, rows = far_apart(near), torch.tensor([0, 1, 2, 2], device=device)
    keys, values = torch.tensor([0, 0, 1, 4], device=device), random(4, device=device)
    outs = [add(torch.zeros(5, 24, device=device), 0, WeightedRows(keys, rows, values, source)) for source in (near, far)]
    assert torch.equal(*outs)
    projections = [Projection(near, near), Projection(near, far), Projection(far, near)]
    plain, *others = [BACKEND.logits_at(projection, rows, rows.flip(0)) for projection in projections]
    assert all(torch.equal(other, plain) for other in others)


def logits(projection: Projection, rows: Tensor, ids: Tensor, tile: Tile | None = None) -> Tensor:
    launch, out = sparse.logits_at(projection, rows, ids, tile=tile)
    launch()
    return out


@pytest.mark.parametrize(("shape", "dtype", "tile"), cases(Tile(1, 0, 64), Tile(16, 0, 4)), ids=str)
def test_logits_of_a_support(shape: tuple[int, int, int], tile: Tile | None, dtype: torch.dtype, device: str) -> None:
    """fp32 sums of exact products: to 1e-6 of the sum of all terms without their signs. Bias, scale and cap do not enter."""
    n, d, v = shape
    rows, ids = support(n, v, device)
    hidden, weight = random(n, d, device=device, dtype=dtype), random(v, d, device=device, dtype=dtype, seed=2)
    bias = torch.full((v,), torch.nan, device=device, dtype=dtype)
    out = logits(Projection(hidden, weight, bias, inv_temperature=0.5, softcap=2.0), rows, ids, tile)
    assert out.dtype == torch.float32
    terms = hidden.double()[rows] * weight.double()[ids]
    assert (out.double() - terms.sum(1)).abs().le(1e-6 * terms.abs().sum(1)).all()


def test_logits_of_ids_that_do_not_exist(device: str) -> None:
    rows, ids = torch.tensor([0, 0, 1, 1, 2, 2], device=device), torch.tensor([0, INVALID, 49, 50, 2**40, -1], device=device)
    p = Projection(random(3, 24, device=device), random(50, 24, device=device))
    out = BACKEND.logits_at(p, rows, ids)
    assert out.isnan().tolist() == [False, True, False, True, True, True]
    assert torch.equal(out[[0, 2]], BACKEND.logits_at(p, rows[[0, 2]], ids[[0, 2]]))
    assert BACKEND.logits_at(p, rows[:0], ids[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_logit_does_not_depend_on_the_other_entries(dtype: torch.dtype, device: str) -> None:
    """The same bits twice, alone, in another order, beside NaN, and with strided operands."""
    rows, ids = support(12, 300, device)
    hidden, weight = random(12, 72, device=device, dtype=dtype), random(300, 72, device=device, dtype=dtype)
    p = Projection(hidden, weight)
    full = BACKEND.logits_at(p, rows, ids)
    assert torch.equal(BACKEND.logits_at(p, rows, ids), full)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(3)).to(device)
    assert torch.equal(BACKEND.logits_at(p, rows[order], ids[order]), full[order])
    for e in (0, 1, len(ids) // 2, len(ids) - 1):
        assert torch.equal(BACKEND.logits_at(p, rows[e : e + 1], ids[e : e + 1]), full[e : e + 1])
    spoiled = Projection(hidden, weight.index_fill(0, ids[:1], torch.nan))
    others = ids != ids[0]
    assert torch.equal(BACKEND.logits_at(spoiled, rows, ids)[others], full[others])
    strided = Projection(hidden.t().contiguous().t(), weight.repeat_interleave(2, 0)[::2])
    assert torch.equal(BACKEND.logits_at(strided, rows, ids), full)


@pytest.mark.parametrize(
    ("schedule", "plan", "main"),
    [
        ("one_pass", "one_chunk", False),
        ("one_pass", "one_chunk", True),
        ("one_pass", "chunks", False),
        ("one_pass", "chunks", True),
        ("autograd", "one_chunk", False),
    ],
)
@pytest.mark.parametrize("peaked", [True, False], ids=["peaked", "uniform"])
def test_gradients_of_a_loss_round_less_than_exact_dlogits(
    peaked: bool, schedule: str, plan: str, main: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 through the loss. The rounding of a result to bf16 is 1.65e-3; that of exact dlogits
    adds as much again."""
    monkeypatch.setattr(Projection, "operand_dtype", property(lambda self: self.hidden.dtype))  # as on CUDA
    inputs = make_inputs(150, 64, 1031, dtype=torch.bfloat16, peaked=peaked, device=device)
    batch = policy_batch(inputs, device)
    wide = inputs.to(torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (wide.hidden, wide.weight)]
    exact = torch.autograd.grad(eapo_loss(*leaves, batch, positive_weight=0.7, backend="torch").loss, leaves)
    hidden, weight = (t.detach().clone().requires_grad_() for t in (inputs.hidden, inputs.weight))
    out = torch.zeros(1031, 64, device=device) if main else None
    common = {"positive_weight": 0.7, "schedule": schedule, "backend": "triton", "options": Options(plan=plan)}
    eapo_loss(hidden, weight, batch, **common, main_grad=out).loss.backward()
    errors = [
        float((got.double() - ref64).norm() / ref64.norm())
        for got, ref64 in zip((hidden.grad, out if main else weight.grad), exact, strict=True)
    ]
    alone = 1.2e-3 if peaked else 1e-4
    assert errors[0] < (1.9e-3 if peaked else 1.7e-3)
    assert errors[1] < (alone if main else 2.1e-3 if peaked else 1.8e-3)
