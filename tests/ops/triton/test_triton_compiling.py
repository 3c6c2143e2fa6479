"""Kernels are compiled side by side before their first launch: all that a loss needs, and each once."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eapo_kernels import selftest
from eapo_kernels.ops import verdicts
from eapo_kernels.ops.triton import common, logit_grad, online_softmax, scaled_exp, sparse
from eapo_kernels.ops.triton.common import Launch
from eapo_kernels.ops.triton.compiling import compiled_together

ON_A_STAND_IN = """
import json, logging
import torch
from triton import knobs
from benchmarks import host_cost
from eapo_kernels import Options, TokenBatch, eapo_loss, selftest, token_stats
from eapo_kernels.ops.verdicts import Question
from eapo_kernels.testing import make_inputs

D, V = 64, 2053
compiled, counts = [], {}

def listener(*, src, cache_hit, **_):
    assert not cache_hit
    compiled.append(src.name.removesuffix("_kernel"))

def count(name, call):
    call()
    counts[name] = sorted(compiled)
    compiled.clear()

def loss(n, **how):
    inputs = make_inputs(n, D, V, dtype=torch.bfloat16)
    leaves = inputs.leaves()[:2]
    batch = TokenBatch(inputs.targets, torch.arange(n) * 8 // n, torch.linspace(0, 1, 8), torch.arange(8) // 4,
                       old_logp=torch.full((n,), -3.0))
    torch.autograd.grad(eapo_loss(*leaves, batch, positive_weight=0.7, backend="triton", **how).loss, leaves)

def stats(n, **options):
    inputs = make_inputs(n, D, V, dtype=torch.bfloat16)
    leaves = inputs.leaves()[:2]
    s = token_stats(*leaves, inputs.targets, backend="triton", options=Options(**options))
    torch.autograd.grad(s.logp.sum() + s.entropy.sum() + s.lse.sum(), leaves)

def cases():
    for case in selftest.CASES:
        case.run(problem, "triton")

logging.basicConfig(level=logging.INFO, format="%(message)s")
problem = selftest.make_problem(Question("triton", dim=D, vocab=V), torch.device("cpu"), full=False)
knobs.compilation.listener = listener
with host_cost.on_a_stand_in(host_cost.Counts()):
    count("loss", lambda: loss(256))
    for n in (256, 250, 129, 17):
        count(f"loss of {n}", lambda: loss(n))
        count(f"chunks of {n}", lambda: loss(n, options=Options(plan="chunks")))
    count("ahead", lambda: selftest.compile_cases([problem], selftest.CASES, "triton"))
    count("cases", cases)
    for n in (300, 129):
        count(f"autograd of {n}", lambda: loss(n, schedule="autograd"))
        count(f"statistics of {n}", lambda: stats(n, plan="recompute"))
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_nothing_is_left_to_compile(tmp_path: Path) -> None:
    """With a stand-in for Triton's driver, in a process of its own, because it compiles kernels: a second loss, with
    any number of rows, compiles nothing, and neither do the cases of the self-check and other calls after it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[3]
    out = subprocess.run([sys.executable, "-c", ON_A_STAND_IN], capture_output=True, text=True, env=environment, cwd=root)
    assert out.returncode == 0, out.stderr
    chunk, cases = [line.split(": ")[1] for line in out.stderr.splitlines() if line.startswith("compiling for cpu on ")][:2]
    assert chunk == "row_offsets, 2 scaled_exp_gemm, collect_rescue_ids, row_maxima"
    assert cases.startswith("2 stream_statistics, 2 finalize, logit_gradient, ")
    counts = json.loads(out.stdout)
    exponentials = [
        "collect_rescue_ids",
        "row_maxima",
        "row_offsets",
        "scaled_exp_finalize",
        "scaled_exp_gemm",
        "scaled_exp_gemm",
    ]
    assert counts.pop("loss") == ["add_carries", "add_rows", *exponentials]
    ahead = counts.pop("ahead")
    assert set(ahead) >= {"stream_statistics", "finalize", "logit_gradient", "row_statistics", "row_gradient"}
    assert "scaled_exp_gemm" not in ahead, "the loss has compiled both"
    assert counts == {name: [] for name in counts}


class Kernel:
    """Records what is done with it; the second ``warmup`` of a form finds the first's code."""

    def __init__(self, name: str, log: list[Any], broken: bool = False) -> None:
        self.__name__, self.log, self.broken = name, log, broken
        self.fn, self.constexprs, self.arg_names = self, [], []
        self.compiled: Any = None  # what the first launch of a form returns

    def warmup(self, *values: Any, **how: Any) -> None:
        self.log.append(("compile", self.__name__, threading.get_ident()))
        if self.broken:
            raise RuntimeError("does not compile")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*values: Any, **how: Any) -> Any:
            self.log.append(("launch", self.__name__, grid))
            if self.broken:
                raise RuntimeError("does not compile")
            return self.compiled

        return launch


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels are compiled, as on a GPU."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return []


def launch(kernel: Kernel, grid: int = 1, **arguments: Any) -> Launch:
    kernel.arg_names, kernel.constexprs = list(arguments), [i for i, name in enumerate(arguments) if name.isupper()]
    return Launch(kernel, grid, arguments, {"num_warps": 4}, torch.device("cpu"))


class Compiled(Kernel):
    """Is launched without Triton's search for it."""


def test_a_form_is_searched_once(log: list[Any]) -> None:
    """Another alignment, dtype, class of a number, constant or option is another form; another tensor is none."""
    kernel, numbers = Kernel("a_kernel", log), torch.zeros(64)
    kernel.compiled = Compiled("a_kernel, compiled", log)
    base = {"x": numbers, "bias": None, "count": 48, "scale": 0.5, "BLOCK": 16, "EVEN": True}
    changes: list[dict[str, Any]] = [
        {},
        {"x": numbers[1:]},
        {"x": numbers.half()},
        {"bias": numbers},
        {"count": 47},
        {"count": 1},
    ]
    changes += [{"count": 2**31}, {"BLOCK": 32}, {"EVEN": False}]
    for change in changes:
        log.clear()
        launch(kernel, 1, **base | change)()
        launch(kernel, 2, **base | {"scale": 0.25, "x": torch.ones(64)} | change)()
        assert log == [("launch", "a_kernel", (1,)), ("launch", "a_kernel, compiled", (2, 1, 1))]
    log.clear()
    for change in ({"x": numbers[4:]}, {"x": numbers[5:]}, {"count": 96}, {"count": 45}, {"scale": 1.0}):
        launch(kernel, 3, **base | change)()
    replace(launch(kernel, 4, **base), options={"num_warps": 8})()
    assert [entry[1] for entry in log] == ["a_kernel, compiled"] * 5 + ["a_kernel"]


def test_a_form_tells_apart_all_that_triton_compiles_apart() -> None:
    """And constants are the last parameters of every kernel, as a launch assumes."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import native_specialize_impl
    from triton.tools.tensor_descriptor import TensorDescriptor

    storage = torch.zeros(4096, dtype=torch.uint8)
    values: list[Any] = [None, True, False, 0.0, 1.0, 0.7]
    values += [sign * (2**power + more) for sign in (-1, 1) for power in range(63) for more in (-1, 0, 1, 16)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.bool):
        typed = storage.view(dtype)
        values += [typed[start:] for start in range(17)]
        if dtype.is_floating_point:
            values += [
                TensorDescriptor.from_tensor(typed[:1024].view(32, 32), list(box)) for box in ((8, 16), (16, 8), (16, 32))
            ]
    for specialize in (True, False):
        found: dict[Any, Any] = {}
        for value in values:
            triton_key = native_specialize_impl(CUDABackend, value, False, specialize, True)
            assert found.setdefault(common._form(value), triton_key) == triton_key, value
    kernels = [value for module in (logit_grad, online_softmax, scaled_exp, sparse) for value in vars(module).values()]
    kernels = [kernel for kernel in kernels if getattr(kernel, "__name__", "").endswith("_kernel")]
    assert len(kernels) == 13
    for kernel in kernels:
        constants = ["constexpr" in str(one.annotation) for one in inspect.signature(kernel.fn).parameters.values()]
        assert constants == sorted(constants)


def test_launches_wait_and_then_run_in_order(log: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "eapo_kernels")
    a, b = Kernel("a_kernel", log), Kernel("b_kernel", log)
    with compiled_together(launch=True):
        for one in (launch(a, 1, BLOCK=8), launch(b, 2, bias=None), launch(a, 3, BLOCK=16), launch(a, 4, BLOCK=8)):
            one()
        with compiled_together(launch=True):
            launch(b, 5, bias=None)()
        assert log == []
    assert [name for what, name, _ in log if what == "compile"].count("a_kernel") == 3
    assert [entry[1:] for entry in log[5:]] == [(f"{n}_kernel", (i,)) for i, n in enumerate("abaab", 1)]
    (said,) = caplog.messages
    assert said.startswith("compiling for cpu on ")
    assert said.endswith("threads, or loading from Triton's cache: 2 a, b")


def test_one_thread_compiles_launches_of_one_variant(log: list[Any]) -> None:
    kernels = [Kernel(f"{i}_kernel", log) for i in range(20)]
    with compiled_together(launch=False):
        for _ in range(3):
            for kernel in kernels:
                launch(kernel)()
    assert len(log) == 60
    for kernel in kernels:
        assert len({thread for _, name, thread in log if name == kernel.__name__}) == 1


def test_launches_may_be_left_out(log: list[Any]) -> None:
    with compiled_together(launch=False):
        launch(Kernel("a_kernel", log))()
    assert [what for what, *_ in log] == ["compile"]
    with compiled_together(launch=False):
        pass
    assert len(log) == 1


def test_a_kernel_that_does_not_compile_says_so_where_it_is_launched(log: list[Any]) -> None:
    good, broken = launch(Kernel("a_kernel", log)), launch(Kernel("b_kernel", log, broken=True))
    with compiled_together(launch=False):
        broken()
        good()
    with pytest.raises(RuntimeError, match="does not compile"), compiled_together(launch=True):  # noqa: PT012, the end of the block raises
        good()
        broken()
    assert [name for what, name, _ in log if what == "launch"] == ["a_kernel", "b_kernel"]


def test_an_error_in_the_block_drops_its_launches(log: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError), compiled_together(launch=True):  # noqa: PT012, what it launches is the point
        launch(Kernel("a_kernel", log))()
        1 / 0  # noqa: B018
    assert log == []
    launch(Kernel("a_kernel", log))()
    assert [what for what, *_ in log] == ["launch"]


def test_interpreted_kernels_do_not_wait(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "INTERPRETED", True)
    with compiled_together(launch=False):
        launch(Kernel("a_kernel", log))()
        assert [what for what, *_ in log] == ["launch"]


def problem_on_a_gpu() -> selftest.Problem:
    class OnAGPU:
        is_cuda = True

    return replace(
        selftest.make_problem(verdicts.Question("triton", dim=16, vocab=40), torch.device("cpu"), full=False), hidden=OnAGPU()
    )


def test_the_cases_of_the_check_run_once_without_launches(log: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one of them fails, as it will again when it is checked."""
    kernels = [Kernel(name, log) for name in ("a_kernel", "b_kernel")]

    def fails(problem: object, backend: str) -> Any:
        raise RuntimeError("no memory")

    def case(run: Any) -> selftest.Case:
        return selftest.Case("", "", run, None)

    good = [case(lambda p, b, k=k: launch(k)()) for k in kernels]
    selftest.compile_cases([problem_on_a_gpu()], good, "triton")
    assert {entry[:2] for entry in log} == {("compile", "a_kernel"), ("compile", "b_kernel")}
    for backend in ("torch", "cuda"):
        selftest.compile_cases([problem_on_a_gpu()], [case(fails)], backend)
    selftest.compile_cases([problem_on_a_gpu()], [*good, case(fails)], "triton")
    assert len(log) == 2


def test_an_error_of_triton_is_a_crash() -> None:
    """As of a kernel that needs more shared memory than the GPU has."""
    from triton.runtime.errors import OutOfResources

    def run(problem: object, backend: str) -> Any:
        raise OutOfResources(100, 99, "shared memory")

    problem = selftest.make_problem(verdicts.Question("triton", dim=16, vocab=40), torch.device("cpu"), full=False)
    row = selftest.check_case(problem, selftest.CASES[0]._replace(run=run), "triton", full=False)
    assert (row.outcome, row.detail[:60]) == ("crashed", "OutOfResources: out of resource: shared memory, Required: 10")
