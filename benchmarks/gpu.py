"""``python -m benchmarks.gpu``: check and measure this package on one NVIDIA GPU, in nine minutes.

build    compile the kernels, in several processes
kernels  every kernel once beside its float64 reference
selftest every way through a backend beside float64, as backend="auto" checks it
tests    (--full) the tests that a GPU can change, compute-sanitizer among them
speed    bare products, unfused PyTorch and our backends at three shapes;
         --full: more shapes, --peers: other packages too
tune     (--tune) race the kernels' tiles

Every stage is a process of its own with a time limit. If one fails or hangs, the others run all
the same, and the exit code is 1. All results go to one folder: gpu.log, stages.json, the rows as
``<gpu>-<date>-<commit>.json``, and the tuner's tiles in measured/. ``--rehearse --device cpu``
tries all stages at toy sizes with interpreted kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from eapo_kernels import selftest

from .measure import DeviceLost, Job, Limits, make_clock, print_missing, sweep
from .providers import chosen
from .results import ROOT, ResultFile, environment

SECONDS = {"build": 120.0, "kernels": 90.0, "selftest": 60.0, "speed": 240.0}
"""Limits of the stages of a plain call: with what starting them takes less than nine minutes."""

MORE = {"tests": 900.0, "tune": 300.0}
"""Limits of the stages that are asked for."""

OURS = ("bare_gemms", "unfused_eager", "eapo_")
"""Providers without peers and without compiled PyTorch, whose compilation takes longer than
everything else."""

FIRST = (Job(4096, 4096, 131072), Job(8192, 2048, 151936), Job(8192, 1024, 151936))
SPEED = tuple(Job(job.n, job.d, job.v, modes=("fwd_bwd", "fwd")) for job in FIRST)
FULL = (
    *SPEED,
    Job(4096, 4096, 131072, inputs="steep", modes=("fwd_bwd",)),
    Job(4096, 4096, 131072, inputs="uniform", modes=("fwd_bwd",)),
    *(Job(job.n, job.d, job.v, modes=("frozen_head", "half_zero_rows")) for job in FIRST),
    Job(4096, 3584, 152064),
    *(Job(n, 4096, 131072, modes=("fwd", "fwd_bwd")) for n in (1024, 3328, 16384)),
    *(Job(n, 2048, 151936, modes=("fwd_bwd",)) for n in (512, 1024, 4800, 65536)),
    Job(8192, 4096, 32000, modes=("fwd_bwd", "half_zero_rows")),
    Job(8192, 4096, 128256, modes=("fwd_bwd",)),
    Job(4096, 8192, 131072, modes=("fwd_bwd",)),
    Job(8192, 2304, 262144, modes=("fwd", "fwd_bwd")),
    Job(8192, 2048, 248320, modes=("fwd_bwd",)),
)
"""Most telling first: a run that is cut short keeps the head of the list."""

TOY = (Job(32, 16, 300, torch.float32, modes=("fwd_bwd",)),)

TOY_GROUPS = ("triton scaled_exp_rescue",)
"""The kernel of a rehearsal; tests/benchmarks/test_kernels.py has the others."""

TESTS = ("tests/gpu", "tests/ops", "tests/integrations", "tests/test_*.py")
"""What a GPU can change: not the trainer, the emulator, and compiling for other GPUs."""


@dataclass
class Verdict:
    """What came of a stage.

    Attributes:
        right, skipped: numbers of comparisons, tests or rows.
        wrong: a sentence each.
        seconds: wall time.
    """

    right: int = 0
    skipped: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the options ask for; every child process gets the same.

    Attributes:
        out: the folder of results.
        device: "cuda" or "cpu".
        rehearse: toy sizes.
        peers, full: see the command.
        rounds: timed runs of each provider.
        without: names of providers, or their beginnings, to be left out.
    """

    out: Path
    device: str
    rehearse: bool
    peers: bool
    full: bool
    rounds: int
    without: tuple[str, ...] = ()

    @property
    def workers(self) -> int:
        """Processes side by side."""
        return 1 if self.rehearse else max(2, (os.cpu_count() or 2) // 2)

    def backends(self) -> dict[str, str | None]:
        """Backend -> why it cannot run here, or None."""
        from eapo_kernels import available_backends

        return available_backends(self.device)

    def family(self) -> str:
        """Of the GPU, as in the table of tiles."""
        from .kernels import family

        return family(torch.cuda.get_device_capability() if self.device == "cuda" else None)


# ---- build


def build_jobs(plan: Plan) -> list[tuple[str, int, tuple[int, int, int]]]:
    """(backend, number of the check, shape) of everything that the next stage launches; a rehearsal
    takes two for Hopper."""
    from . import kernels

    if plan.rehearse:
        vectors = next(n for n, check in enumerate(kernels.checks("triton", "sm90")) if check.kernel == "finalize")
        return [("triton", vectors, kernels.SHAPES[1]), ("cuda", 0, kernels.SHAPES[1])]
    able = [name for name, reason in plan.backends().items() if reason is None and name != "torch"]
    return [
        (backend, number, shape)
        for backend in able
        for number in range(len(kernels.checks(backend, plan.family())))
        for shape in (kernels.SHAPES if backend == "triton" else kernels.SHAPES[:1])
    ]


def build_one(job: tuple[str, int, tuple[int, int, int]], family: str, device: str) -> str | None:
    """Compile a check's launch into the cache of its compiler; what went wrong, or None."""
    from . import compiled_code, kernels

    backend, number, shape = job
    check = kernels.checks(backend, family)[number]
    try:
        if backend == "cuda":
            from eapo_kernels.ops.cuda import build

            build.cubin(check.cuda_build())
        else:
            launch = kernels.KERNELS[backend, check.kernel].run(check.operands(shape, "meta"), check.tile).launch
            if device == "cuda":
                kernels.warm_up(launch)
            else:
                compiled_code.compile_triton(launch, compiled_code.ARCHITECTURES[family])
    except kernels.FAILURES as error:
        return f"{check}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
    return None


def build(plan: Plan) -> Verdict:
    """Stage "build"."""
    jobs = build_jobs(plan)
    family = "sm90" if plan.rehearse else plan.family()
    os.environ["TRITON_INTERPRET"] = "0"
    with ProcessPoolExecutor(1 if plan.rehearse else os.cpu_count(), mp_context=get_context("spawn")) as pool:
        count = len(jobs)
        found = list(pool.map(build_one, jobs, [family] * count, ["cpu" if plan.rehearse else plan.device] * count))
    wrong = [sentence for sentence in found if sentence is not None]
    return Verdict(len(found) - len(wrong), wrong=wrong)


# ---- kernels and selftest: cases in processes of their own, which print each case and what came of it


def kernel_groups(plan: Plan) -> dict[str, list[Any]]:
    """Checks by what shares a process: a kernel, and of the CUDA kernels a tile."""
    from . import kernels

    found: dict[str, list[Any]] = {}
    for backend, reason in plan.backends().items():
        if backend == "torch" or reason is not None:
            continue
        for check in kernels.checks(backend, plan.family()):
            tile = f" {check.tile.name}" if backend == "cuda" else ""
            found.setdefault(f"{backend} {check.kernel}{tile}", []).append(check)
    return {name: found[name] for name in TOY_GROUPS} if plan.rehearse else found


def kernel_cases(plan: Plan, group: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name, what is wrong) of a group's cases."""
    from . import kernels

    shapes = kernels.TOY if plan.rehearse else kernels.SHAPES
    for check in kernel_groups(plan)[group]:
        for shape in shapes:
            yield f"{check} {'x'.join(map(str, shape))}", lambda c=check, s=shape: c.why_wrong(s, plan.device)


CHECKED = (("bfloat16", 4096), ("bfloat16", 2048), ("float16", 4096), ("float32", 1024))
"""dtype and D of the self-checks of a backend: those of the shapes that are timed, and other dtypes."""


def selftest_groups(plan: Plan) -> list[str]:
    """ "backend dtype D" of every self-check."""
    able = [name for name, reason in plan.backends().items() if reason is None]
    kinds = [("bfloat16", 32)] if plan.rehearse else CHECKED
    return [f"{name} {dtype} {d}" for name in able for dtype, d in kinds if (name, dtype) != ("cuda", "float32")]


def selftest_cases(plan: Plan, group: str) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """(name, what is wrong) of the cases of ``python -m eapo_kernels selftest``, whose rows go to a
    file."""
    backend, dtype, dim = group.split()
    question = selftest.Question(backend, dtype, int(dim), 100 if plan.rehearse else 128256)
    lines: list[dict[str, Any]] = []
    for full in (False, True):
        rows = selftest.FEW_ROWS if plan.rehearse else selftest.N_ROWS
        problem = selftest.make_problem(question, torch.device(plan.device), full=full, rows=rows)
        for case in selftest.CASES:

            def check(problem: Any = problem, case: Any = case, full: bool = full) -> str | None:
                row = selftest.check_case(problem, case, backend, full=full)
                lines.append(row._asdict())
                file = plan.out / f"selftest-{backend}-{dtype}-{dim}.json"
                file.write_text(json.dumps({"question": vars(question), "rows": lines}, indent=1) + "\n")
                return None if row.outcome == "right" else row.detail

            yield f"{group} {case.name}, {'with' if full else 'without'} bias", check


GROUPED = {
    "kernels": (kernel_groups, kernel_cases),
    "selftest": (selftest_groups, selftest_cases),
}
"""Stage -> (groups, cases of a group)."""


def print_cases(plan: Plan, stage: str, group: str) -> None:
    """In a group's process: print the name of each case, then what came of it; the first one that
    raises ends the process."""
    for name, check in GROUPED[stage][1](plan, group):
        print(f"begin {name}", flush=True)
        wrong = check()
        print(f"right {name}" if wrong is None else f"wrong {name}: {wrong}", flush=True)


def watch(
    commands: dict[str, list[str]], seconds: float, workers: int, env: dict[str, str] | None = None
) -> dict[str, Verdict]:
    """Run commands that print cases, ``workers`` at a time; what is not done after ``seconds`` in
    all hangs."""
    until = time.monotonic() + seconds

    def run(name: str) -> Verdict:
        start = time.monotonic()
        code, text = execute(commands[name], max(0.0, until - start), env)
        lines, verdict = text.splitlines(), Verdict(seconds=time.monotonic() - start)
        verdict.right = sum(line.startswith("right ") for line in lines)
        verdict.wrong = [line.removeprefix("wrong ") for line in lines if line.startswith("wrong ")]
        if code != 0:
            said = [line for line in lines if line.startswith(("begin ", "right ", "wrong "))]
            inside = said[-1].removeprefix("begin ") if said and said[-1].startswith("begin ") else f"{name}, outside a case"
            last = next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing printed")
            verdict.wrong.append(f"{inside}: " + ("hangs" if code is None else f"ended with {code}: {last}"))
        return verdict

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


def execute(command: Sequence[str], seconds: float, env: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Exit code and everything printed; after ``seconds`` the command ends with all that it
    started, and the code is None."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path} | (env or {})
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, text


# ---- tests


def run_tests(plan: Plan, seconds: float) -> Verdict:
    """Stage "tests": every test file in a pytest process of its own, so that a kernel that hangs
    takes no other file with it."""
    patterns = ["tests/objectives/test_advantages.py"] if plan.rehearse else TESTS
    files = [
        p
        for pattern in patterns
        for p in sorted([*(ROOT / pattern).rglob("test_*.py"), *(p for p in ROOT.glob(pattern) if p.is_file())])
    ]
    reports = plan.out / "tests"
    reports.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds

    def run(file: Path) -> tuple[str, int | None, Path, str]:
        name = file.relative_to(ROOT).as_posix()
        report = reports / (name.replace("/", "-") + ".xml")
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", name]
        code, text = execute(command, max(0.0, until - time.monotonic()), {"OMP_NUM_THREADS": "2"})
        report.with_suffix(".log").write_text(text)
        return name, code, report, text

    verdict = Verdict()
    with ThreadPoolExecutor(plan.workers) as pool:
        for name, code, report, text in pool.map(run, files):
            if report.exists():
                read_report(report, verdict)
            if code is None:
                last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing printed")
                verdict.wrong.append(f"{name}: not finished in time, in {last[:200]}")
            elif code not in (0, 1, 5) or not report.exists():  # all passed, some failed, none collected
                verdict.wrong.append(f"{name}: pytest exited with {code}")
    return verdict


def read_report(path: Path, verdict: Verdict) -> None:
    """Add a JUnit report's tests to ``verdict``."""
    for test in ElementTree.parse(path).getroot().iter("testcase"):
        bad = next((e for e in test if e.tag in ("failure", "error")), None)
        if bad is not None:
            message = next(iter((bad.get("message") or "").strip().splitlines()), "no message")
            verdict.wrong.append(f"{test.get('classname')}::{test.get('name')}: {message[:200]}")
        elif test.find("skipped") is not None:
            verdict.skipped += 1
        else:
            verdict.right += 1


# ---- speed and tuning


BROKEN = re.compile(r"run again with --without (\w+)")
"""What ``measure`` says when a provider has left the GPU unusable for its process."""


def measure_speed(plan: Plan, seconds: float) -> Verdict:
    """Stage "speed": the rows go to the result file after every mode. A backend that was wrong
    before is left out."""
    start, before = time.monotonic(), json.loads((plan.out / "stages.json").read_text())
    providers = chosen(None if plan.peers else list(OURS), [*plan.without, *(f"eapo_{name}" for name in before["broken"])])
    print_missing(providers, plan.device)
    result = ResultFile(environment(plan.device))
    result.gate["stages"] = {name: len(stage["wrong"]) or stage["right"] for name, stage in before["stages"].items()}
    tests = before["stages"].get("tests")
    if tests is not None:
        result.gate["tests"] = {"passed": tests["right"], "failed": len(tests["wrong"]), "skipped": tests["skipped"]}
    result.redden([f"{name}: {wrong}" for name, stage in before["stages"].items() for wrong in stage["wrong"]])
    earlier = len(result.gate["red"])
    jobs = TOY if plan.rehearse else FULL if plan.full else SPEED
    # A tenth of the time for the rounds of one mode; what is begun last may take as long again for its checks.
    limits = Limits(plan.rounds, seconds / 10, start + 0.75 * seconds)
    try:
        sweep(jobs, providers, result, plan.out, plan.device, limits)
    except DeviceLost as error:
        result.redden([str(error)])
    result.save(plan.out)
    return Verdict(sum(row["ms"] is not None for row in result.rows), wrong=result.gate["red"][earlier:])


def race_tiles(plan: Plan, seconds: float) -> Verdict:
    """Stage "tune"."""
    from . import tune

    able = [name for name, reason in plan.backends().items() if reason is None]
    jobs = list(tune.searches(able, plan.family()))
    if plan.rehearse:
        jobs = [tune.Search("triton", "finalize", plan.family(), 40, 24, 301, torch.float32)]
    written, wrong = tune.tune(
        jobs, lambda job: tune.KernelContest(job, plan.device), make_clock(plan.device), seconds, plan.out / "measured",
        environment(plan.device), workers=plan.workers,
    )  # fmt: skip
    return Verdict(written, wrong=wrong if written else [*wrong, "no tile could be written"])


CHILDREN: dict[str, Callable[[Plan, float], Verdict]] = {
    "build": lambda plan, seconds: build(plan),
    "tests": run_tests,
    "speed": measure_speed,
    "tune": race_tiles,
}
"""Stages that are one process, which gets its time limit and prints its verdict as the last
line."""


# ---- the command


def run_stage(name: str, plan: Plan, seconds: float, child: list[str]) -> tuple[Verdict, str]:
    """A stage within ``seconds``, and what it printed."""
    start = time.monotonic()
    env = {"TRITON_INTERPRET": "1"} if plan.device == "cpu" else {}
    if name in GROUPED:
        groups = GROUPED[name][0](plan)
        found = watch({group: [*child, "--stage", name, "--group", group] for group in groups}, seconds, plan.workers, env)
        lines = [f"{'group':46} {'right':>6} {'wrong':>6} {'s':>6}"]
        lines += [f"{group:46} {v.right:6} {len(v.wrong):6} {v.seconds:6.1f}" for group, v in found.items()]
        verdict = Verdict(sum(v.right for v in found.values()), wrong=[w for v in found.values() for w in v.wrong])
        lines += [f"{backend}: not here: {reason}" for backend, reason in plan.backends().items() if reason is not None]
        text = "\n".join(lines)
    else:
        # The child ends a little earlier by itself, so that it can write down what it has.
        code, text = execute([*child, "--stage", name, "--seconds", f"{0.9 * seconds:.1f}"], seconds, env)
        *lines, last = text.splitlines() or [""]
        if last.startswith("verdict: "):
            text, verdict = "\n".join(lines), Verdict(**json.loads(last.removeprefix("verdict: ")))
        else:
            ended = f"not finished after {seconds:.0f} s" if code is None else f"ended with {code}"
            verdict = Verdict(wrong=[f"{ended}: {last.strip()[:300] or 'nothing printed'}"])
    verdict.seconds = round(time.monotonic() - start, 1)
    return verdict, text


def run(plan: Plan, limits: dict[str, float], child: list[str]) -> dict[str, Verdict]:
    """All stages, one after the other; printed, in gpu.log and in stages.json."""
    plan.out.mkdir(parents=True, exist_ok=True)
    verdicts: dict[str, Verdict] = {}
    broken: list[str] = []
    with (plan.out / "gpu.log").open("w") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            log.write(f"{text}\n")
            log.flush()

        def stage(name: str, seconds: float, more: list[str]) -> Verdict:
            say(f"\n## {name}, at most {seconds:.0f} s")
            verdict, text = run_stage(name, plan, seconds, child + more)
            say(text)
            for sentence in verdict.wrong:
                say(f"wrong: {sentence}")
            return verdict

        for name, seconds in limits.items():
            verdicts[name] = stage(name, seconds, [])
            lost = next((found[1] for wrong in verdicts[name].wrong if (found := BROKEN.search(wrong))), None)
            left = seconds - verdicts[name].seconds
            if lost is not None and left > 30:
                say(f"{lost} left the GPU unusable; again without it")
                again = stage(name, left, ["--without", lost, *plan.without])
                again.wrong.insert(0, f"{lost} left the GPU unusable")
                verdicts[name] = again
            if name in GROUPED:
                broken += [b for b in ("torch", "triton", "cuda") if any(w.startswith(b) for w in verdicts[name].wrong)]
            content = {"broken": sorted(set(broken)), "stages": {n: vars(v) for n, v in verdicts.items()}}
            (plan.out / "stages.json").write_text(json.dumps(content, indent=1) + "\n")
        say(f"\n{'stage':10} {'right':>6} {'wrong':>6} {'s':>6}")
        for name, v in verdicts.items():
            say(f"{name:10} {v.right:6} {len(v.wrong):6} {v.seconds:6.1f}")
        for backend in sorted(set(broken)):
            say(f"the {backend} backend was wrong and was not timed")
        say(f"results: {plan.out}")
    return verdicts


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when something is wrong, 2 for bad arguments or without the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of all results, default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --rehearse")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, to try the command")
    parser.add_argument("--peers", action="store_true", help="measure other packages and compiled PyTorch too")
    parser.add_argument("--full", action="store_true", help="more shapes, and the tests: 15 minutes more")
    parser.add_argument("--tune", action="store_true", help="race tiles: 5 minutes more")
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each provider, default: %(default)s")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out providers whose names begin so")
    for hidden in ("--stage", "--group", "--seconds"):
        parser.add_argument(hidden, default=None, help=argparse.SUPPRESS)
    o = parser.parse_args(arguments)
    if o.device == "cpu" and not o.rehearse:
        parser.error("--device cpu: expected with --rehearse; python -m benchmarks.cpu measures on the processor")
    if o.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none; --rehearse --device cpu tries the command")
    if o.device == "cpu" and o.stage != "build":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    plan = Plan(o.out.resolve(), o.device, o.rehearse, o.peers, o.full, o.rounds, tuple(o.without))
    if o.group is not None:
        print_cases(plan, o.stage, o.group)
        return 0
    if o.stage is not None:
        verdict = CHILDREN[o.stage](plan, float(o.seconds))
        print(f"\nverdict: {json.dumps(vars(verdict))}")
        return 0
    limits = dict(SECONDS)
    if o.full or o.peers:
        limits["speed"] *= 1 + o.full + o.peers
    if o.full:
        speed = limits.pop("speed")
        limits |= {"tests": MORE["tests"], "speed": speed}
    if o.tune:
        limits["tune"] = MORE["tune"]
    if o.rehearse:  # with interpreted kernels, on any processor
        limits = {name: 5 * seconds for name, seconds in limits.items()}
    child = [sys.executable, "-m", "benchmarks.gpu", "--device", o.device, "--out", str(plan.out), "--rounds", str(o.rounds)]
    child += [flag for flag in ("--rehearse", "--peers", "--full") if getattr(o, flag[2:])]
    verdicts = run(plan, limits, child + (["--without", *o.without] if o.without else []))
    return 1 if any(v.wrong for v in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
