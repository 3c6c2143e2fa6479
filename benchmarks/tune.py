"""The tuner, stage "tune" of ``python -m benchmarks.gpu --tune``: race the kernels' tiles on this
GPU.

Every tile is compiled (no spills, fits the multiprocessor), compared with float64, then raced side
by side with the L2 cache flushed. The winners go to ``<out>/<backend>/measured.json``; copied to
``eapo_kernels/ops/<backend>/`` they come before the table.
"""

from __future__ import annotations

import itertools
import json
import operator
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from eapo_kernels import Options

from . import compiled_code, kernels
from .kernels import KERNELS, PRODUCTS, Entry, Operands, Tile
from .measure import Clock, time_interleaved

SHAPES = ((4096, 4096, 131072), (8192, 2048, 151936), (8192, 1024, 151936))
FEW_ROWS = (512, 4096, 131072)
"""The CUDA kernels' tile depends on the rows too."""

FINALISTS = 4
FIRST_ROUNDS, FINAL_ROUNDS = 3, 30
COMPILE_SHARE = 0.6
"""Of the time of a search: compiling and checking."""

SHARED_LIMIT = {"sm80": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024}
"""Bytes of shared memory that programs on one multiprocessor may have together; 1 KiB a program is
the system's."""

REGISTERS, _MOST_REGISTERS = 65536, 255
_ACCUMULATOR = {"sm80": 128, "sm90": 128, "sm100": 256}
"""Registers a thread may spend on its part of a product (sm100 keeps it in tensor memory)."""

_SINGLE: kernels.Space = {"block_n": (32, 64, 128), "block_v": (32, 64, 128), "block_d": (16, 32, 64), "descriptors": (False,)}
"""Products of fp32 operands run on the ordinary cores: smaller tiles."""

ENVIRONMENT = ("gpu", "driver", "torch", "triton", "commit", "date")
KEYS = {"triton": ("kernel", "family", "itemsize", "dim", "vocab"), "cuda": ("kernel", "dim", "rows")}
"""What a line of a file of measured tiles is known by: the fields of the backend's ``Entry`` but
the tile."""


@dataclass(frozen=True)
class Search:
    """One line of a table of tiles to be measured.

    Attributes:
        backend, kernel: a key of ``KERNELS``.
        family: of GPUs, as in the table of tiles.
        n, d, v: rows, depth and vocabulary of the operands.
        dtype: of the operands.
    """

    backend: str
    kernel: str
    family: str
    n: int
    d: int
    v: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if KERNELS[self.backend, self.kernel].typed else 4

    @property
    def key(self) -> tuple[Any, ...]:
        """The values of ``KEYS``."""
        if self.backend == "cuda":
            return self.kernel, self.d, self.n
        return self.kernel, self.family, self.itemsize, self.d, self.v

    @property
    def describable(self) -> bool:
        """Whether rows of the operands are multiples of 16 bytes."""
        return self.kernel in PRODUCTS and self.d * self.itemsize % 16 == 0

    def current(self) -> Any:
        """The tile that is used today."""
        if self.backend == "cuda":
            return kernels.cuda_tiles(self.kernel, self.n, self.d)[0]
        return kernels.find(self.kernel, self.family, self.itemsize, self.d, self.v, descriptors=self.describable)

    def candidates(self, seed: int = 0) -> list[Any]:
        """Tiles worth trying, the current one first, then those that differ from it in fewest
        fields.

        Tiles equally far are in random order, so that a search that ends early has looked
        everywhere near.
        """
        if self.backend == "cuda":
            return kernels.cuda_tiles(self.kernel, self.n, self.d)
        space, current = KERNELS[self.backend, self.kernel].space, self.current()
        if self.kernel in PRODUCTS and self.itemsize == 4:
            space = space | _SINGLE
        tiles = [Tile(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values())]
        if self.kernel in PRODUCTS:
            tiles += [replace(t, max_registers=cap) for t in tiles if (cap := register_cap(t)) is not None]
        found = [t for t in tiles if t != current and misfit(self, t) is None]
        random.Random(seed).shuffle(found)
        mine = tuple(vars(current).values())
        found.sort(key=lambda t: sum(map(operator.ne, vars(t).values(), mine)))
        return [current, *found]


def register_cap(tile: Tile) -> int | None:
    """Registers per thread with which ``tile.resident`` programs share a multiprocessor, where that
    is a limit at all."""
    cap = REGISTERS // (tile.resident * 32 * tile.warps) // 8 * 8
    return cap if tile.resident > 1 and cap < _MOST_REGISTERS else None


def misfit(search: Search, tile: Tile) -> str | None:
    """Why a Triton tile cannot work or is not worth compiling, or None; an estimate from its sizes
    alone."""
    threads = 32 * tile.warps
    if search.kernel not in PRODUCTS:
        per_thread = tile.block_n * max(tile.block_v, 1) * max(tile.block_d, 1) / threads
        return None if 1 <= per_thread <= 64 else f"{per_thread:g} elements a thread"
    if tile.descriptors and not search.describable:
        return "rows that no descriptor can describe"
    if tile.stores and not tile.descriptors:
        return "stores by descriptor with loads by pointer"
    if tile.block_v // tile.slices < 16:
        return "slices of less than 16 columns"
    if search.itemsize == 4 and tile.slices > 1 and tile.block_v <= 64:
        return "slices of a narrow tile"
    accumulator = tile.block_n * tile.block_v // threads
    if not 8 <= accumulator <= _ACCUMULATOR[search.family]:
        return f"{accumulator} registers of product a thread"
    if search.family != "sm100" and tile.resident * threads * (accumulator + 32) > REGISTERS:
        return "registers of the programs that share a multiprocessor"
    shared = (tile.block_n + tile.block_v) * tile.block_d * search.itemsize * tile.stages
    if tile.stores:
        shared += tile.block_n * tile.block_v // tile.slices * search.itemsize
    limit = SHARED_LIMIT[search.family]
    return None if tile.resident * (shared + 1024) <= limit + 1024 else f"{shared} bytes of shared memory"


def flaw(search: Search, tile: Any, usage: compiled_code.Usage, *, plain: bool = True) -> str | None:
    """Why a compiled tile is not taken, or None: the same demands as those of tests/aot and
    tests/csrc on the shipped tables.

    usage: of the launch with the tile, or with every switch of the kernel on (then not ``plain``,
    and how many programs share a multiprocessor does not matter).
    """
    if usage.spills or usage.stack:
        return f"{usage.spills} spills, {usage.stack} bytes of stack"
    if search.backend == "cuda":
        return None
    if usage.shared > SHARED_LIMIT[search.family]:
        return f"{usage.shared} bytes of shared memory"
    if search.kernel in PRODUCTS and search.itemsize == 2 and not usage.tensor:
        return "no tensor cores"
    if not plain:
        return None
    if tile.resident * usage.threads * (-(-usage.registers // 8) * 8) > REGISTERS:
        return f"{usage.registers} registers"
    together = tile.resident * (usage.shared + 1024)
    return None if together <= SHARED_LIMIT[search.family] + 1024 else f"{together} bytes of shared memory together"


class Contest(Protocol):
    """What a search asks about a tile."""

    def prepare(self, tile: Any) -> Callable[[], str | None]:
        """A function, run beside others, that compiles the tile and says why it is not taken, or
        None."""
        ...

    def check(self, tile: Any) -> str | None:
        """Run the tile; how its results are wrong, or None."""
        ...

    def runner(self, tile: Any) -> Callable[[], object]:
        """What is timed."""
        ...

    def flaw_with_every_switch(self, tile: Any) -> str | None:
        """Why the tile is not taken for launches with bias, soft-cap, temperatures and second
        moments, or None."""
        ...


class KernelContest:
    """The contest for a kernel on one device, whose operands all tiles share."""

    def __init__(self, search: Search, device: str, budget: int | None = None) -> None:
        self.search, self._kernel = search, KERNELS[search.backend, search.kernel]
        self._device, self._budget = device, budget

    @cached_property
    def operands(self) -> Operands:
        s = self.search
        budget = kernels.workspace_bytes(Options(self._budget), torch.device(self._device))
        rows = self._kernel.rows(s.n, s.v, s.dtype, budget)
        return Operands(rows, s.d, s.v, s.dtype, self._device, budget=budget, rescue=False)

    def prepare(self, tile: Any) -> Callable[[], str | None]:
        """See ``Contest``. The launch is made now, compiled later; an interpreted kernel is not
        compiled."""
        launch = self._kernel.run(self.operands, tile).launch
        return (lambda: None) if self.search.backend == "triton" and kernels.INTERPRETED else lambda: self._flaw(launch, tile)

    def _flaw(self, launch: Any, tile: Any, *, plain: bool = True) -> str | None:
        try:
            if self.search.backend == "cuda":
                usage = compiled_code.cuda_usage(launch.build)
            else:
                usage = compiled_code.triton_usage(launch, compiled_code.ARCHITECTURES[self.search.family])
        except kernels.FAILURES as error:
            return f"{type(error).__name__} of the compiler"
        return flaw(self.search, tile, usage, plain=plain)

    def flaw_with_every_switch(self, tile: Any) -> str | None:
        """See ``Contest``."""
        s = self.search
        if s.backend == "cuda":
            build = self._kernel.run(self.operands, tile).launch.build
            every = replace(build, bias=True, second_moments=s.kernel == "stream_statistics")
            return flaw(s, tile, compiled_code.cuda_usage(every), plain=False)
        if kernels.INTERPRETED:
            return None
        return self._flaw(kernels.example(Entry(*s.key, tile), "full"), tile, plain=False)

    @torch.no_grad()
    def check(self, tile: Any) -> str | None:
        """See ``Contest``. An error that leaves the device unusable is raised again by the next
        call to it."""
        try:
            return kernels.why_wrong(self._kernel.run(self.operands, tile))
        except kernels.FAILURES as error:
            if self._device == "cuda":
                torch.cuda.synchronize()
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

    def runner(self, tile: Any) -> Callable[[], object]:
        """See ``Contest``."""
        run = self._kernel.run(self.operands, tile)
        run.prepare()
        return run.launch


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        ranking: (tile, median milliseconds in the final), the fastest first; empty when no tile was
            right.
        tried: tiles that were compiled.
        refused: how many were not taken, by reason (its words without numbers).
        wrong: results that differ from the reference: the reasons. Those are bugs, of the kernel or
            of the compiler.
    """

    ranking: list[tuple[Any, float]] = field(default_factory=list)
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def search(tiles: Sequence[Any], contest: Contest, clock: Clock, seconds: float, *, workers: int = 1) -> Outcome:
    """Look for the fastest of ``tiles``, which come in order of promise, in about ``seconds``."""
    start, outcome, good = time.monotonic(), Outcome(), []
    queue = iter(tiles)
    with ThreadPoolExecutor(workers) as pool:
        while time.monotonic() < start + COMPILE_SHARE * seconds or not outcome.tried:
            batch = list(islice(queue, max(2 * workers, 4)))
            if not batch:
                break
            outcome.tried += len(batch)
            for tile, reason in zip(batch, pool.map(lambda job: job(), [contest.prepare(t) for t in batch]), strict=True):
                if reason is not None:
                    outcome.refused[" ".join(word for word in reason.split() if not word[:1].isdigit())] += 1
                elif (wrong := contest.check(tile)) is not None:
                    outcome.wrong.append(f"{tile}: {wrong}")
                else:
                    good.append(tile)
    left = start + seconds - time.monotonic()
    outcome.ranking = halve({t: contest.runner(t) for t in good}, clock, left, keep=tiles[0])
    return outcome


def halve(
    runs: dict[Any, Callable[[], object]], clock: Clock, seconds: float, *, keep: Any = None, seed: int = 0
) -> list[tuple[Any, float]]:
    """Successive halving: every stage times all that are left side by side, drops the slower half
    and doubles the rounds.

    Returns (tile, median milliseconds) of the finalists, the fastest first; ``keep`` is among them.
    A stage has half of the time that is left, but at least three rounds, so that few ``seconds``
    cost precision and not the result.
    """
    until, alive, rounds = time.monotonic() + seconds, list(runs), FIRST_ROUNDS
    for stage in itertools.count(seed):
        final = len(alive) <= FINALISTS + (keep in alive)
        left = max(until - time.monotonic(), 0.0)
        times = time_interleaved(
            {str(place): runs[tile] for place, tile in enumerate(alive)},
            FINAL_ROUNDS if final else rounds,
            clock,
            seconds=left if final else left / 2,
            seed=stage,
        )
        medians = {tile: statistics.median(times[str(place)]) for place, tile in enumerate(alive)}
        alive.sort(key=medians.__getitem__)
        if final:
            break
        fast = alive[: max(FINALISTS, (len(alive) + 1) // 2)]
        alive, rounds = fast + [tile for tile in (keep,) if tile in alive and tile not in fast], 2 * rounds
    return [(tile, medians[tile]) for tile in alive]


def searches(backends: Sequence[str], family: str, names: Sequence[str] = ()) -> Iterator[Search]:
    """Every line of the tables once, the CUDA kernels first, then the Triton kernels that multiply.
    names: only these kernels."""
    found: dict[tuple[Any, ...], Search] = {}
    tuned = sorted(KERNELS, key=lambda key: (key[0] != "cuda", key[1] not in PRODUCTS))
    for n, d, v in (*SHAPES, FEW_ROWS):
        for backend, kernel in tuned:
            wanted = backend in backends and KERNELS[backend, kernel].space and (not names or kernel in names)
            if wanted and (backend == "cuda" or (n, d, v) != FEW_ROWS):
                one = Search(backend, kernel, family, n, d, v)
                found.setdefault((backend, *one.key), one)
    yield from sorted(found.values(), key=lambda one: tuned.index((one.backend, one.kernel)))


def tune(
    jobs: Sequence[Search],
    open_contest: Callable[[Search], Contest],
    clock: Clock,
    seconds: float,
    folder: Path,
    made: dict[str, Any],
    *,
    workers: int = 1,
) -> tuple[int, list[str]]:
    """Search each job within an equal share of the time that is left, and write the backend's file
    after each.

    made: the environment. Returns the number of lines written, and what was wrong.
    """
    until, written, wrong = time.monotonic() + seconds, 0, []
    for number, job in enumerate(jobs):
        share = max(until - time.monotonic(), 0.0) / (len(jobs) - number)
        contest = open_contest(job)
        outcome = search(job.candidates(), contest, clock, share, workers=workers)
        best = next(((t, ms) for t, ms in outcome.ranking if contest.flaw_with_every_switch(t) is None), None)
        print(_sentence(job, outcome, best), flush=True)
        wrong += [f"{job.backend} {job.kernel}: {reason}" for reason in outcome.wrong]
        if best is not None:
            path = folder / job.backend / "measured.json"
            write_line(path, job, *best, made)
            written += 1
    return written, wrong


def _sentence(job: Search, outcome: Outcome, best: tuple[Any, float] | None) -> str:
    refused = ", ".join(f"{count} {reason}" for reason, count in outcome.refused.most_common(3)) or "none"
    head = f"{job.backend} {job.kernel} N={job.n} D={job.d} V={job.v}: {outcome.tried} tried, refused: {refused}"
    wrong = "".join(f"\n  wrong: {reason}" for reason in outcome.wrong)
    if best is None:
        return f"{head}; nothing to write{wrong}"
    now = dict(outcome.ranking).get(job.current())
    than = "" if now is None else f", the tile of today {now:.4f} ms"
    return f"{head}\n  {best[1]:.4f} ms{than}: {best[0]}{wrong}"


def write_line(path: Path, job: Search, tile: Any, ms: float, made: dict[str, Any]) -> None:
    """Add a line to a file of measured tiles, or replace the one of the same key; the file is
    written whole or not at all.

    GPU and commit stand in every line because lines of several runs share a file. Fields of the
    tile that are defaults are left out.
    """
    keys = KEYS[job.backend]
    defaults = {f.name: f.default for f in fields(tile)}
    line = dict(zip(keys, job.key, strict=True)) | {
        "tile": {name: value for name, value in asdict(tile).items() if value != defaults[name]},
        "ms": round(ms, 5),
        "shape": {"N": job.n, "D": job.d, "V": job.v, "dtype": str(job.dtype).removeprefix("torch.")},
        "gpu": made.get("gpu"),
        "commit": made.get("commit"),
    }
    old = json.loads(path.read_text())["lines"] if path.exists() else []
    kept = {tuple(one[name] for name in keys): one for one in [*old, line]}
    rows = ",\n  ".join(json.dumps(kept[key]) for key in sorted(kept))
    head = json.dumps({name: made.get(name) for name in ENVIRONMENT})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(f'{{\n "environment": {head},\n "lines": [\n  {rows}\n ]\n}}\n')
    scratch.replace(path)
