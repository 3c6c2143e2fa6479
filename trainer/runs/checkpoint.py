"""Checkpoints on disk: what may be there after a crash, and how a damaged one is noticed.

``checkpoints/step-000012`` holds the tensors as torch.distributed.checkpoint writes them (each rank its share), ``state.pt``
with everything else, and ``manifest.json`` with the size and SHA-256 of both. It is written under another name and renamed when
all of it is on the disk, so a directory of that name is whole unless something damaged it afterwards; then reading says what.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from .. import ranks
from ..errors import CheckpointError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.pt"
UNFINISHED = ".tmp"


def checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints below ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.suffix != UNFINISHED)


def step_of(path: Path | None) -> int:
    """The steps that are done in a checkpoint; 0 without one."""
    return int(path.name.removeprefix("step-")) if path else 0


def write(root: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and remove all but the last ``keep``. One of this step that is there already stays. All ranks call it.

    Args:
        tensors: nested dictionaries of tensors, also sharded ones.
        state: what is equal on all ranks or gathered: plain values and small tensors.
    """
    path = root / f"step-{step:06d}"
    scratch = path.with_suffix(UNFINISHED)
    if ranks.on_first(path.exists):
        return path
    ranks.on_first(lambda: _clear(root))
    with _alone():
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch, sync_files=True), no_dist=ranks.size() == 1)
    own = ranks.gather(lambda: {file.name: _described(file) for file in scratch.glob(f"__{ranks.rank()}_*")})

    def finish() -> None:
        torch.save(state, scratch / STATE)
        files = {name: facts for part in own for name, facts in part.items()}
        files.update({name: _described(scratch / name) for name in (".metadata", STATE)})
        manifest = {"format": FORMAT, "step": step, "ranks": ranks.size(), "files": files}
        (scratch / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for name in (".metadata", STATE, MANIFEST, "."):
            _sync(scratch / name)
        scratch.rename(path)
        _sync(root)
        for old in checkpoints(root)[:-keep]:
            remove(old)

    ranks.on_first(finish)
    return path


def remove(path: Path) -> None:
    """Remove a checkpoint; at no moment is there half of one under its name."""
    doomed = path.with_suffix(UNFINISHED)
    path.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that there is no process group, which is said outright."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _clear(root: Path) -> None:
    """Make ``root``, without what a crash left unfinished in it."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"*{UNFINISHED}"):
        shutil.rmtree(leftover)


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Read all of a checkpoint once.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or another version of this trainer wrote it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, written = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: expected a readable {MANIFEST}, got {error}") from error
    if written != FORMAT:
        raise CheckpointError(f"checkpoint {path}: expected format {FORMAT}, got {written}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: expected the file {name}, got none")
        if file.stat().st_size != expected["size"]:
            got = f"{file.stat().st_size} (truncated?)"
            raise CheckpointError(f"checkpoint {path}: {name}: expected {expected['size']} bytes, got {got}")
        if _described(file) != expected:
            raise CheckpointError(f"checkpoint {path}: {name}: expected the bytes that were written, got others (corrupted)")


def read_state(path: Path) -> dict[str, Any]:
    """What ``write`` was given as ``state``."""
    with torch.serialization.safe_globals([datetime, date, time, timedelta]):  # columns of a data file may hold them
        return torch.load(path / STATE, map_location="cpu", weights_only=True)


def saved_names(path: Path) -> set[str]:
    """Names of the tensors in a checkpoint, levels joined by dots."""
    return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def read_tensors(path: Path, into: dict[str, Any]) -> None:
    """Fill the tensors of ``into``, nested as they were given to ``write``; shards may be cut otherwise than they were.

    Raises:
        CheckpointError: the checkpoint lacks one of them, or has it in another shape.
    """
    try:
        with _alone():
            dcp.load(into, storage_reader=dcp.FileSystemReader(path), no_dist=ranks.size() == 1)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"checkpoint {path}: expected the tensors of this run, got: {reason}") from error


def read_weights(path: Path, model: torch.nn.Module) -> None:
    """Put the trained weights of a run's (verified) checkpoint into a model like that run's.

    Raises:
        CheckpointError: it is another model's.
    """
    read_tensors(path, {"weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}})
