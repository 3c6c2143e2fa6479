"""Whether a backend's kernels are right on this GPU: checked once, in a child process, and kept.

``backend="auto"`` asks ``is_right`` before it takes a backend with kernels of its own. The first
question about a GPU, its software, a dtype and a class of shapes starts ``python -m eapo_kernels
selftest --child`` on the same GPU: an illegal access or a hang there does not reach this process.
The answer is a JSON file in the user's cache folder, which later processes read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .lm_head import Projection
from .vocab_shard import VocabShard

logger = logging.getLogger("eapo_kernels")

TIME_LIMIT = 300.0
"""Seconds after which the child is killed: about ten times what compiling and checking take."""

CHILD_BYTES = 2**30
"""Free GPU memory that a child needs: its context and 0.3 GiB of tensors."""

MOST_SLOWER = 1.3
"""A backend that is right but slower than the torch backend by more than this is not taken."""

KEPT = ("right", "wrong", "crashed", "timed out")
"""Outcomes that are written to a file. "unknown" is not: the next process tries again."""

MARK = "eapo_kernels selftest: "
"""Begins the child's line of JSON."""

_LAUNCHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip
"""Variables of a launcher of several processes, which a child must not see."""

_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, getattr(signal, "SIGBUS", signal.SIGSEGV)}


@dataclass(frozen=True)
class Question:
    """Which kernels on which inputs. Shapes of one class run the same compiled code.

    Attributes:
        backend: "triton" or "cuda".
        dtype: "bfloat16", "float16" or "float32", of hidden and weight.
        dim, vocab: D and V. On a split head V is the largest part, so that all ranks ask the same.
        softcap: logits are soft-capped.
        strided: hidden or weight cannot be read by tensor descriptors.
    """

    backend: str
    dtype: str = "bfloat16"
    dim: int = 4096
    vocab: int = 131072
    softcap: bool = False
    strided: bool = False

    @staticmethod
    def about(backend: str, projection: Projection) -> Question:
        p = projection
        size = p.hidden.element_size()
        strided = any(
            t.stride(1) != 1 or t.stride(0) * size % 16 or t.storage_offset() * size % 16 for t in (p.hidden, p.weight)
        )
        dtype = str(p.hidden.dtype).removeprefix("torch.")
        return Question(backend, dtype, p.dim, p.max_shard_vocab, p.softcap is not None, strided)

    @property
    def shape_class(self) -> str:
        """D, which decides the tiles; V rounded up to a power of two, and what V is divisible by."""
        return f"D={self.dim} V<={1 << max(self.vocab - 1, 0).bit_length()} V%{math.gcd(self.vocab, 256)}"

    def arguments(self) -> list[str]:
        """Of ``python -m eapo_kernels selftest``."""
        flags = [f"--{name}" for name in ("softcap", "strided") if getattr(self, name)]
        return [
            "--backend", self.backend, "--dtype", self.dtype, "--dim", str(self.dim), "--vocab", str(self.vocab), *flags
        ]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """The answer to a question.

    Attributes:
        outcome: one of ``KEPT``, or "unknown".
        detail: what was wrong and by how much, or why the check could not run.
        ratio: time of one pass over that of the torch backend; None: not measured.
        seconds: of the check.
        path: the file, or "" where none could be written.
    """

    outcome: str
    detail: str = ""
    ratio: float | None = None
    seconds: float = 0.0
    path: str = ""

    @property
    def usable(self) -> bool:
        return self.outcome == "right" and (self.ratio is None or self.ratio <= MOST_SLOWER)


_known: dict[tuple[Any, ...], Verdict] = {}
"""Verdicts of this process by (question, device), on a split head by (question, device, shard) too:
an answer never changes between a forward and its backward."""


def used() -> dict[str, str]:
    """What "auto" was in this process: inputs -> the backend, and the verdict that decided."""
    found = {}
    for (question, *_), verdict in _known.items():
        backend = question.backend if verdict.usable else "torch"
        found[f"{question.dtype} {question.shape_class}"] = f"{backend} ({question.backend} is {verdict.outcome})"
    return found


def is_right(backend: str, projection: Projection) -> bool:
    """Whether "auto" may take the backend for these inputs, which it supports.

    May take a minute at the first question about a GPU and a class of shapes. In a trace, with fake
    tensors, in a graph capture and in a backward pass only known answers count. On a split head the
    ranks exchange their answers once, and the backend is taken if it is right on all of them.
    """
    question, device, shard = Question.about(backend, projection), projection.hidden.device, projection.shard
    name = question, device
    verdict = _known.get(name)
    if verdict is None:
        if not _may_start(projection):
            _log_once(logging.INFO, f"backend {backend!r} is not checked inside a trace, capture or backward: torch is used")
            return False
        verdict = _known[name] = find_or_check(question, device)
        _tell(verdict, question, device)
    return verdict.usable if shard is None else _agreed((*name, shard), verdict, shard, projection)


def _agreed(name: tuple[Any, ...], verdict: Verdict, shard: VocabShard, projection: Projection) -> bool:
    """Whether the verdict is usable on all ranks of a split head. One all-gather a head."""
    if name not in _known:
        if not _may_start(projection):
            return False
        usable = shard.all_gather(projection.hidden.new_full((1, 1), float(verdict.usable), dtype=torch.float32))
        others = replace(verdict, outcome="unknown", detail="another rank of the group does not use these kernels")
        _known[name] = verdict if bool(usable.min() > 0) else others
    return _known[name].usable


def _may_start(projection: Projection) -> bool:
    """Whether a child process may be started here."""
    from torch._subclasses.fake_tensor import FakeTensor

    hidden = projection.hidden
    if torch.compiler.is_compiling() or isinstance(hidden, FakeTensor) or torch._C._current_graph_task_id() != -1:
        return False
    return not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())


def find_or_check(question: Question, device: torch.device) -> Verdict:
    """The kept verdict, or a new one. Several processes of a node: one checks, the others wait."""
    from filelock import FileLock, Timeout

    key = identity(question, device)
    found = read(key)
    if found is not None:
        return found
    try:
        folder = temporary_folder()
        with FileLock(folder / f"{_file_name(key)}.lock", timeout=2 * TIME_LIMIT):
            found = read(key)
            return found if found is not None else keep(key, _check(question, device))
    except Timeout:
        return Verdict("unknown", f"another process has been checking for {2 * TIME_LIMIT:.0f} s")
    except OSError:  # no folder for a lock: several processes may check at once
        return keep(key, _check(question, device))


def identity(question: Question, device: torch.device) -> dict[str, str]:
    """Everything that a verdict depends on."""
    return describe_gpu(device) | {
        "python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton"),
        "sources": sources(question.backend), "backend": question.backend, "dtype": question.dtype,
        "shapes": question.shape_class, "form": f"softcap={question.softcap} strided={question.strided}",
    }  # fmt: skip


def describe_gpu(device: torch.device) -> dict[str, str]:
    """Name, compute capability and driver of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    try:
        driver = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:  # not Linux, or a container without it
        driver = ""
    api = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "driver": f"{api} {driver}".strip()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@functools.cache
def sources(backend: str) -> str:
    """Hash of the code that the verdict is about, measured tiles included."""
    package = Path(__file__).parents[1]
    files = [*(package / "ops").rglob("*.py"), *(package / "ops").rglob("*.json"), *cache_folder().glob("tiles-*.json")]
    if backend == "cuda":
        files += [file for file in source_folder().iterdir() if file.suffix in (".cu", ".h")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def source_folder() -> Path:
    """The folder of the CUDA C++ sources: ``_csrc`` in a wheel's package, ``csrc`` in a checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "_csrc"
    return shipped if shipped.is_dir() else package.parent / "csrc"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/eapo_kernels`` or ``~/.cache/eapo_kernels``. A relative XDG_CACHE_HOME is
    ignored, as its specification says. The folder may be missing, or not be writable."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path(os.path.expanduser("~")) / ".cache") / "eapo_kernels"  # noqa: PTH111, raises nothing without a home


def tuned_file(device: torch.device) -> Path:
    """Where ``selftest --tune`` keeps the fastest tiles and the fastest backend of a GPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return cache_folder() / f"tiles-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"


@functools.cache
def fastest(device: torch.device) -> str:
    """The backend that was the fastest when the device was tuned; without that "triton"."""
    try:
        return "cuda" if json.loads(tuned_file(device).read_text())["environment"]["backend"] == "cuda" else "triton"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "triton"


def temporary_folder() -> Path:
    """A folder in the node's temporary one that only this user can write. Raises OSError."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"eapo_kernels-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != user:
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _file_name(key: dict[str, str]) -> str:
    return f"verdict-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


def read(key: dict[str, str]) -> Verdict | None:
    """The kept verdict; None if there is none or the file is not one of ours."""
    for folder in (cache_folder, temporary_folder):
        try:
            path = folder() / _file_name(key)
            content = json.loads(path.read_text())
            if content["key"] == key and content["verdict"]["outcome"] in KEPT:
                return Verdict(**content["verdict"] | {"path": str(path)})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def keep(key: dict[str, str], verdict: Verdict) -> Verdict:
    """Write a verdict, whole or not at all; it is returned with its path."""
    if verdict.outcome not in KEPT:
        return verdict
    content = {"key": key, "verdict": asdict(verdict), "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for folder in (cache_folder, temporary_folder):
        try:
            path = folder() / _file_name(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(content, indent=1) + "\n")
            part.replace(path)
        except OSError:  # a read-only home: the next folder, else this process's memory
            continue
        return replace(verdict, path=str(path))
    return verdict


def _check(question: Question, device: torch.device) -> Verdict:
    """Run the child, unless it could not work."""
    gpu = describe_gpu(device)["gpu"]
    logger.info("checking the %s kernels on %s once, about 20 s (docs/gpu.md): %s", question.backend, gpu, question)
    try:
        free = _free_bytes(device)
        if free < CHILD_BYTES:
            return Verdict("unknown", f"{free / 2**20:.0f} MiB of GPU memory are free, the check needs {CHILD_BYTES // 2**20}")
        return run_child(command(question, device), environment(device))
    except (OSError, RuntimeError) as error:
        return Verdict("unknown", f"the check could not be started: {error}")


def _free_bytes(device: torch.device) -> int:
    """Free memory of the device, after PyTorch has returned what it keeps unused."""
    if device.type != "cuda":
        return CHILD_BYTES
    if torch.cuda.mem_get_info(device)[0] < CHILD_BYTES:
        torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def command(question: Question, device: torch.device) -> list[str]:
    """The child's command line. -P: not from the working directory, but from PYTHONPATH."""
    module = [sys.executable, "-P", "-m", "eapo_kernels", "selftest"]
    return [*module, "--child", "--device", device.type, *question.arguments()]


def environment(device: torch.device) -> dict[str, str]:
    """The child's environment: this package, this GPU, no launcher of several processes."""
    clean = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC_")}
    clean.pop("EAPO_KERNELS_BACKEND", None)
    package = str(Path(__file__).parents[2])
    if package not in sysconfig.get_paths().values():  # installed packages are found anyway, behind the standard library
        clean["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [clean.get("PYTHONPATH")])])
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        visible = [name for name in clean.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        # An entry of the list works for parts of a GPU too (MIG), whose own identifier PyTorch does not give.
        clean["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    return clean


def run_child(arguments: Sequence[str], variables: dict[str, str], limit: float | None = None) -> Verdict:
    """What a child says, or what its end says about it. Raises OSError if it cannot be started."""
    start, limit = time.monotonic(), TIME_LIMIT if limit is None else limit
    child = subprocess.Popen(
        arguments, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(child)
        return Verdict("timed out", f"the check did not end within {limit:.0f} s", seconds=limit)
    except BaseException:  # the caller is interrupted
        _kill(child)
        raise
    seconds = round(time.monotonic() - start, 1)
    for line in reversed(out.splitlines()):
        if line.startswith(MARK):
            try:
                said = json.loads(line.removeprefix(MARK))
                return Verdict(said["outcome"], said["detail"], said["ratio"], seconds)
            except (ValueError, KeyError, TypeError):
                break
    last = " | ".join(errors.strip().splitlines()[-3:])
    if -child.returncode in _CRASHES:
        return Verdict("crashed", f"the check ended by {signal.Signals(-child.returncode).name}: {last}", seconds=seconds)
    return Verdict("unknown", f"the check gave no answer (exit code {child.returncode}): {last}", seconds=seconds)


def _kill(child: subprocess.Popen[str]) -> None:
    """End a child and the compilers that it started."""
    if hasattr(os, "killpg"):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.communicate()


def _tell(verdict: Verdict, question: Question, device: torch.device) -> None:
    """Log a verdict, and warn where the user should do something about it."""
    gpu, by_hand = describe_gpu(device)["gpu"], "python -m eapo_kernels selftest " + " ".join(question.arguments())
    what = f"the {question.backend} kernels on {gpu} ({question.dtype}, {question.shape_class})"
    if verdict.outcome == "right":
        slower = "" if verdict.usable else f", but {verdict.ratio:.2f} times as slow as the torch backend, which is used"
        logger.info("%s: right%s (%s)", what, slower, verdict.path or "not kept")
    elif verdict.outcome == "unknown":
        message = f"{what} could not be checked: {verdict.detail}. This process uses torch; `{by_hand}` tries again."
        _log_once(logging.WARNING, message)
    else:
        message = (
            f"{what}: {verdict.outcome}. {verdict.detail}. The torch backend is used instead: right, but slower. "
            f"Verdict: {verdict.path or 'could not be written'}. Please report it with the output of `{by_hand}`."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
