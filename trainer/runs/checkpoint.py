"""Checkpoints on disk: written atomically and verified before use.

``checkpoints/step-000012`` holds the tensors in the format of torch.distributed.checkpoint (each
rank writes its shards), ``state.pt`` with everything else, and ``manifest.json`` with sizes and
SHA-256 hashes of both. It is written under a temporary name and renamed after all files are synced
to disk, so a directory of that name is complete. Later damage is detected by ``verify``.
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
from ..records import Support

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.pt"
UNFINISHED = ".tmp"


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.suffix != UNFINISHED)


def step_of(path: Path | None) -> int:
    """Number of steps done in a checkpoint; 0 for None."""
    return int(path.name.removeprefix("step-")) if path else 0


def write(root: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and remove all but the last ``keep``. An existing checkpoint of this step
    is kept. All ranks call it.

    Args:
        tensors: nested dictionaries of tensors, sharded ones included.
        state: plain values and small tensors, equal on all ranks.
    """
    path = root / f"step-{step:06d}"
    scratch = path.with_suffix(UNFINISHED)
    if ranks.run_on_main(path.exists):
        return path
    ranks.run_on_main(lambda: _clear(root))
    try:
        with _alone():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch, sync_files=True), no_dist=ranks.size() == 1)
    except dcp.api.CheckpointException as error:  # raised on all ranks
        raise CheckpointError(f"checkpoint {path}: expected to write it, got: {_reason(error)}") from error
    own = ranks.all_gather(lambda: {file.name: _described(file) for file in scratch.glob(f"__{ranks.rank()}_*")})

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
        prune(root, keep)

    ranks.run_on_main(finish)
    return path


def prune(root: Path, keep: int) -> None:
    """Remove unfinished checkpoints, and all but the last ``keep``."""
    _clear(root)
    for old in checkpoints(root)[:-keep]:
        remove(old)


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so a partly removed one never has a valid name."""
    doomed = path.with_suffix(UNFINISHED)
    path.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def _alone() -> Iterator[None]:
    """Suppress the warning about a missing process group, which is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _clear(root: Path) -> None:
    """Create ``root`` and remove unfinished checkpoints of a crashed run."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(leftover)


def _described(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> None:
    """Read all files of a checkpoint and compare their hashes.

    Raises:
        CheckpointError: a file is missing, truncated or changed, or the format is that of another
            version.
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
    """The ``state`` given to ``write``."""
    with torch.serialization.safe_globals([datetime, date, time, timedelta, Support]):  # columns of a data file, replay buffers
        return torch.load(path / STATE, map_location="cpu", weights_only=True)


def saved_names(path: Path) -> set[str]:
    """Names of the tensors in a checkpoint, levels joined by dots."""
    return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def read_tensors(path: Path, into: dict[str, Any]) -> None:
    """Fill the tensors of ``into``, nested as in ``write``. They may be sharded differently.

    Raises:
        CheckpointError: the checkpoint lacks one of them, or has it in another shape.
    """
    try:
        with _alone():
            dcp.load(into, storage_reader=dcp.FileSystemReader(path), no_dist=ranks.size() == 1)
    except (dcp.api.CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: expected the tensors of this run, got: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1]


def read_weights(path: Path, model: torch.nn.Module) -> None:
    """Load the trained weights of a verified checkpoint into a model of the same configuration.

    Raises:
        CheckpointError: it is a checkpoint of another model.
    """
    read_tensors(path, {"weights": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}})
