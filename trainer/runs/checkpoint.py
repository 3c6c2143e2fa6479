"""Checkpoints on disk: written atomically and checked before use.

``checkpoints/step-000012`` holds tensors in the format of torch.distributed.checkpoint (each rank
writes its shards), ``state.pt`` with everything else, and ``manifest.json`` with the settings of
the run and the size of every file. It is written under a temporary name and renamed after all files
are synced to disk, so a directory of that name is complete. A file that is lost or cut afterwards
is found by its size; bytes that change on disk are not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from .. import ranks
from ..errors import CheckpointError
from .locate import NAME, checkpoints

MANIFEST, STATE, UNFINISHED = "manifest.json", "state.pt", ".tmp"


def write(
    root: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], settings: dict[str, Any], *, keep: int
) -> Path:
    """Write a checkpoint and remove all but the last ``keep``. An existing checkpoint of this step
    is kept. All ranks call it.

    Args:
        tensors: nested dictionaries of tensors, sharded ones included.
        state: plain values and small tensors, equal on all ranks.
        settings: of the run, for ``verify``.

    Raises:
        CheckpointError: on all ranks, when a rank cannot write its tensors.
    """
    path = root / f"step-{step:06d}"
    scratch = path.with_suffix(UNFINISHED)
    if ranks.run_on_main(path.exists):
        return path
    ranks.run_on_main(lambda: prune(root))

    def finish() -> None:
        with _reported(path, "to write it"):
            torch.save(state, scratch / STATE)
            sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
            (scratch / MANIFEST).write_text(json.dumps({"settings": settings, "files": sizes}, indent=1) + "\n")
            for name in (STATE, MANIFEST, "."):
                _sync(scratch / name)
            scratch.rename(path)
            _sync(root)
            prune(root, keep)

    try:
        with _reported(path, "to write it"):
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(scratch, sync_files=True), no_dist=ranks.size() == 1)
        ranks.run_on_main(finish)
    except BaseException:
        if ranks.is_main():  # a full disk needs the room
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    return path


def prune(root: Path, keep: int = 0) -> None:
    """Remove unfinished checkpoints, and all but the last ``keep`` where it is not 0."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(f"step-*{UNFINISHED}"):
        if NAME.fullmatch(leftover.stem):
            shutil.rmtree(leftover)
    for old in checkpoints(root)[:-keep] if keep else ():
        remove(old)


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first, so a partly removed one never has a valid name."""
    shutil.rmtree(path.rename(path.with_suffix(UNFINISHED)))


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path) -> dict[str, Any]:
    """Check that all files of a checkpoint are there in full. Returns the settings of its run.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: expected a readable {MANIFEST}, got {error}") from error
    for name, size in manifest["files"].items():
        got = (path / name).stat().st_size if (path / name).is_file() else None
        if got != size:
            found = "no file" if got is None else f"{got} (truncated?)"
            raise CheckpointError(f"checkpoint {path}: {name}: expected {size} bytes, got {found}")
    return manifest["settings"]


def saved_names(path: Path) -> set[str]:
    """Names of the tensors in a checkpoint, levels joined by dots."""
    return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def read_tensors(path: Path, into: dict[str, Any]) -> None:
    """Fill the tensors of ``into``, nested as in ``write``. They may be sharded differently.

    Raises:
        CheckpointError: the checkpoint lacks one of them, or has it in another shape.
    """
    with _reported(path, "the tensors of this run"):
        dcp.load(into, storage_reader=dcp.FileSystemReader(path), no_dist=ranks.size() == 1)


def random_state() -> dict[str, Any]:
    """State of the global generators in this process, as values that ``torch.load`` accepts with
    weights_only. The trainer derives its own numbers from seeds; users' rewards may use these.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore ``random_state()``; the state of a GPU is skipped on a machine without one."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def _reported(path: Path, expected: str) -> Iterator[None]:
    """Errors of torch.distributed.checkpoint, which it raises on all ranks, as one line. Without a
    process group it warns that there is none, which is intended here.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except (dcp.api.CheckpointException, RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"checkpoint {path}: expected {expected}, got: {reason}") from error
