"""Every provider against float64, and the calls of those that cannot run here against their
source."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.case import MODES, OBJECTIVES, SPARSE_MODES, TOLERANCE, Case, Reference, Results, make_case, reference_of
from benchmarks.providers import WITH_GRADIENTS, Provider, bare_gemms, import_alone, installed, load_providers, needs
from benchmarks.providers.unfused import token_op

ROOT = Path(__file__).parent.parent.parent
PROVIDERS = {provider.name: provider for provider in load_providers()}
PEERS = ("liger_kernel", "trl", "verl", "cut_cross_entropy", "quack", "unsloth_zoo", "transformers")

FLOAT32 = 1e-4
TF32 = {"verl_triton": 5e-3}
"""Its kernel multiplies float32 as TF32."""

COMPILED = ("unfused_compile", "cce_torch_compile", "liger_grpo", "liger_grpo_whole")
"""Providers behind torch.compile, which takes ten seconds each time: one of them is compiled, in
its hardest mode."""

FILTERED = {"cce": 0.5}
"""Its default drops gradient tiles: only the order of magnitude is held."""

N, D, V = 128, 128, 768
"""What every peer's tiles divide."""


@cache
def _case(dtype: torch.dtype, device: str, mode: str) -> tuple[Case, Reference]:
    case = make_case(N, D, V, dtype, device=device).for_mode(mode)
    return case, reference_of(case)


def _bounds(provider: Provider, case: Case, reference: Reference, mode: str) -> dict[str, float]:
    """float32: 1e-4. Half precision: three times unfused PyTorch's error on the same job, and the
    rounding of one result."""
    if case.dtype == torch.float32:
        return dict.fromkeys(("logp", "entropy", "loss", "d_hidden", "d_weight"), TF32.get(provider.name, FLOAT32))
    plain = reference.errors(PROVIDERS["unfused_eager"].prepare(case, mode)(), "policy")
    return {name: FILTERED.get(provider.name, 3 * error + 2e-2) for name, error in plain.items()}


def _run(provider: Provider, device: str, mode: str) -> tuple[Case, Reference, Results]:
    """The provider's results in float32, or in bfloat16 where it accepts nothing else."""
    case, reference = _case(torch.float32, device, mode)
    try:
        return case, reference, provider.prepare(case, mode)()
    except ValueError as refused:
        if "expected bfloat16" not in str(refused):
            raise
    case, reference = _case(torch.bfloat16, device, mode)
    return case, reference, provider.prepare(case, mode)()


def _check(provider: Provider, case: Case, reference: Reference, mode: str, results: Results) -> None:
    gradients = {"fwd": set(), "frozen_head": {"loss", "d_hidden"}}.get(mode, {"loss", "d_hidden", "d_weight"})
    assert gradients <= set(results)
    assert "entropy" not in results or "entropy" in provider.job
    bounds = _bounds(provider, case, reference, mode)
    if mode == "sparse_gradient" and provider.name.startswith("eapo"):
        bounds |= dict.fromkeys(("d_hidden", "d_weight"), bounds["d_hidden"] + TOLERANCE)
    errors = reference.errors(results, provider.objective)
    assert not {name: error for name, error in errors.items() if not error <= bounds[name]}
    if "d_hidden" in results:
        assert torch.all(results["d_hidden"][~case.valid] == 0)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(p.name, mode) for p in PROVIDERS.values() for mode in p.modes if not p.name.startswith("bare")],
)
def test_results_and_masked_rows(name: str, mode: str, device: str) -> None:
    provider = PROVIDERS[name]
    if reason := provider.unavailable(device):
        pytest.skip(reason)
    eager = name in COMPILED and (name, mode) != ("unfused_compile", "half_zero_rows")
    with torch.compiler.set_stance("force_eager" if eager else "default"):
        case, reference, results = _run(provider, device, mode)
    assert results
    _check(provider, case, reference, mode, results)


def test_declarations() -> None:
    assert len(PROVIDERS) == len(load_providers())
    for provider in PROVIDERS.values():
        assert set(provider.modes) <= {*MODES, *SPARSE_MODES}
        assert provider.objective in OBJECTIVES
        assert (provider.objective == "cross_entropy") == ("mean cross-entropy" in provider.job)
        assert provider.objective == "policy" or "fwd" not in provider.modes


@pytest.mark.parametrize("name", PROVIDERS)
def test_reasons_are_one_readable_sentence(name: str, device: str) -> None:
    reason = PROVIDERS[name].unavailable(device)
    if reason is not None:
        assert 10 < len(reason) < 300
        assert "\n" not in reason
        assert reason == reason.strip()


def test_importing_the_providers_imports_no_peer() -> None:
    code = "import sys; from benchmarks.providers import load_providers; load_providers(); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    tops = {module.partition(".")[0] for module in out.stdout.split()}
    assert "benchmarks" in tops
    assert not tops & set(PEERS)


def test_reasons_of_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs("no-such-peer", cuda=True)("cpu") == "no-such-peer needs a CUDA device"
    assert needs("no-such-peer", install="pip install it")("cpu") == "no-such-peer is not installed: pip install it"
    assert needs("pytest", "pytest")("cpu") is None
    reason = needs("pytest", "pytest.no_such_module", install="pip install more")("cpu")
    assert reason is not None
    assert reason.startswith("pytest is installed but pytest.no_such_module cannot be imported: No module named")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    reason = needs("pytest", cuda=True, capability=(9, 0))("cuda")
    assert reason == "pytest needs a GPU of compute capability 9.0, this one has 8.0"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ImportError(), "ImportError"),
        (AssertionError(" \n"), "AssertionError"),
        (KeyError("HOME"), "'HOME'"),
        (TypeError("one\ntwo"), "one"),
        (ValueError("two"), "two"),
    ],
    ids=repr,
)
def test_reasons_of_imports_that_fail_in_their_own_way(error: Exception, why: str) -> None:
    def load(module: str) -> ModuleType:
        raise error

    reason = needs("pytest", "pytest.more", install="pip install more", load=load)("cpu")
    assert reason == f"pytest is installed but pytest.more cannot be imported: {why} (pip install more)"


def test_import_alone_runs_no_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "loud_peer" / "ops"
    inner.mkdir(parents=True)
    for folder in (inner.parent, inner):
        (folder / "__init__.py").write_text("raise RuntimeError('patches everything')")
    (inner / "quiet.py").write_text("answer = 42")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_alone("loud_peer.ops.quiet").answer == 42
    assert import_alone("loud_peer.ops.quiet") is sys.modules["loud_peer.ops.quiet"]
    with pytest.raises(ModuleNotFoundError):
        import_alone("no_such_peer.ops.quiet")
    for module in ("loud_peer", "loud_peer.ops", "loud_peer.ops.quiet"):
        monkeypatch.delitem(sys.modules, module)


@dataclass(frozen=True)
class Call:
    """Where a peer's function stands and which of its arguments are ours.

    Attributes:
        package: as pip knows it.
        module, function: what the adapter imports.
        arguments: names of hidden, weight, targets.
        method: where the signature is, when the function is the ``apply`` of an autograd function.
    """

    package: str
    module: str
    function: str
    arguments: tuple[str, str, str]
    method: str | None = None


_LIGER = Call(
    "liger-kernel",
    "liger_kernel.transformers.functional",
    "liger_fused_linear_cross_entropy",
    ("input", "weight", "target"),
)
_CCE = Call("cut-cross-entropy", "cut_cross_entropy.linear_cross_entropy", "linear_cross_entropy", ("e", "c", "targets"))
_QUACK = "quack.linear_cross_entropy"
CALLS = {
    "liger_flce": _LIGER,
    "liger_flce_tuned": _LIGER,
    "liger_flce_none": _LIGER,
    "liger_flce_none_tuned": _LIGER,
    "liger_cute_flce": Call(
        "liger-kernel",
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "liger_fused_linear_cross_entropy_sm90",
        ("_input", "weight", "target"),
    ),
    "cce": _CCE,
    "cce_exact": _CCE,
    "quack": Call("quack-kernels", _QUACK, "chunked_linear_cross_entropy", ("x", "weight", "target")),
    "quack_base": Call("quack-kernels", _QUACK, "chunked_linear_cross_entropy", ("x", "weight", "target")),
    "quack_per_token": Call("quack-kernels", _QUACK, "linear_cross_entropy_func", ("x", "weight", "target")),
    "verl_triton": Call(
        "verl",
        "verl.utils.kernel.linear_cross_entropy",
        "linear_cross_entropy",
        ("hidden", "weight", "labels"),
        "LinearCrossEntropy.forward",
    ),
}


def test_every_provider_that_needs_a_gpu_has_its_call_checked() -> None:
    need_a_gpu = {p.name for p in PROVIDERS.values() if "CUDA device" in (p.unavailable("cpu") or "")}
    assert need_a_gpu == set(CALLS)


def _signature(call: Call) -> inspect.Signature:
    """The function's signature as its source has it, without importing or running any of the
    peer."""
    top, _, rest = call.module.partition(".")
    spec = find_spec(top)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest.split(".")).with_suffix(".py")
    node: ast.AST = ast.parse(path.read_text())
    for name in (call.method or call.function).split("."):
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == name)
    assert isinstance(node, ast.FunctionDef)
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    stub = ast.FunctionDef(node.name, arguments, [ast.Pass()], [], type_params=[])
    namespace: dict[str, Any] = {"IGNORE_INDEX": -100, "LCE_IMPL_DEFAULT": None}
    exec(compile(ast.fix_missing_locations(ast.Module([stub], [])), str(path), "exec"), namespace)
    signature = inspect.signature(namespace[node.name])
    without_context = list(signature.parameters.values())[1 if call.method else 0 :]
    return signature.replace(parameters=without_context)


def _stand_in(call: Call, signature: inspect.Signature, seen: list[inspect.BoundArguments]) -> Callable[..., Any]:
    """A function of the peer's signature that does the job in plain PyTorch."""

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(bound)
        hidden, weight, targets = (bound.arguments[name] for name in call.arguments)
        hidden, targets = hidden.flatten(0, -2), targets.flatten()
        if call.package == "verl":
            assert bound.arguments["reduction"] == "none"
            return token_op(hidden, weight, targets)
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction=bound.arguments["reduction"])

    return function


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name in CALLS for mode in PROVIDERS[name].modes])
def test_calls_bind_to_the_peers_signature(name: str, mode: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, provider = CALLS[name], PROVIDERS[name]
    if installed(call.package) == "missing":
        assert "CUDA device" in (provider.unavailable("cpu") or "")
        pytest.skip(f"{call.package} is not installed")
    seen: list[inspect.BoundArguments] = []
    module = ModuleType(call.module)
    setattr(module, call.function, _stand_in(call, _signature(call), seen))
    monkeypatch.setitem(sys.modules, call.module, module)
    if call is _CCE:
        monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    case, reference, results = _run(provider, device, mode)
    assert len(seen) == 1
    _check(provider, case, reference, mode, results)
    assert seen[0].arguments.get("ignore_index", -100) == -100


def test_modes_without_log_probs() -> None:
    for provider in PROVIDERS.values():
        if provider.objective == "cross_entropy" or provider.name.startswith("liger_grpo"):
            assert provider.modes == WITH_GRADIENTS


def test_the_floor_adds_up_only_what_further_chunks_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[str, int]] = []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **options: Any) -> Any:
            products.append((name, len(options["out"])))
            return call(*args, **options)

        return count

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(name, getattr(torch, name)))
    monkeypatch.setattr(bare_gemms, "workspace_bytes", lambda wanted, device: 100 * V * 4)
    case = _case(torch.float32, "cpu", "fwd_bwd")[0]
    first, second = [("mm", 64), ("mm", 64), ("mm", V)], [("mm", 64), ("mm", 64), ("addmm", V)]
    for _ in range(2):
        products.clear()
        PROVIDERS["bare_gemms"].prepare(case, "fwd_bwd")()
        assert products == first + second
    products.clear()
    PROVIDERS["bare_gemms_whole"].prepare(case, "fwd_bwd")()
    assert products == [("mm", N), ("mm", N), ("mm", V)]
    monkeypatch.setattr(bare_gemms, "_WHOLE_BYTES", N * V * 4 - 1)
    with pytest.raises(ValueError, match=r"logits: expected at most \d+ bytes at once, got 393216"):
        PROVIDERS["bare_gemms_whole"].prepare(case, "fwd_bwd")
