"""The files of measured tiles: merging new lines into one and writing it whole or not at all. ``measured_tiles`` reads them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from eapo_kernels.ops import measured_tiles
from eapo_kernels.ops.cuda import measured as cuda_measured
from eapo_kernels.ops.triton import tiles as triton_configs
from eapo_kernels.ops.triton import tiles as triton_measured

from .search import Job

ENVIRONMENT = ("gpu", "driver", "torch", "triton", "commit", "date")


@dataclass(frozen=True)
class Table:
    """One backend's file.

    Attributes:
        key: what a line is known by: the fields of the backend's ``Entry`` but the tile.
        entries: the package's reader, which checks every line and keeps what it read.
        caches: what the package keeps besides.
    """

    key: tuple[str, ...]
    entries: Any
    caches: tuple[Any, ...] = ()

    def merge(self, old: dict[str, Any] | None, environment: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
        """``old`` with ``lines``, which replace those of the same key, in a fixed order; the environment is the new one's."""
        kept = {tuple(entry[name] for name in self.key): entry for entry in [*(old["lines"] if old else []), *lines]}
        return {
            "environment": {name: environment.get(name) for name in ENVIRONMENT},
            "lines": [kept[key] for key in sorted(kept)],
        }

    def read(self, path: Path) -> dict[str, Any] | None:
        """The file if it is there. Raises EapoError when it is malformed."""
        if not path.exists():
            return None
        self._forget()
        self.entries(path)  # checks every line
        return measured_tiles.load(path)

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Write the file, a line of the table on a line of its own, and let ``configs.find`` see it in this process."""
        rows = ",\n  ".join(json.dumps(entry) for entry in content["lines"])
        text = f'{{\n "environment": {json.dumps(content["environment"])},\n "lines": [\n  {rows}\n ]\n}}\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".partial")
        scratch.write_text(text)
        scratch.replace(path)
        self._forget()

    def _forget(self) -> None:
        for kept in (self.entries, *self.caches):
            kept.cache_clear()

    def line(self, job: Job, tile: Any, ms: float, environment: dict[str, Any]) -> dict[str, Any]:
        """One line: the key, the fields of the tile that are not defaults, and how it was measured.

        GPU and commit stand in every line because lines of several runs share a file.
        """
        optional = {f.name: f.default for f in fields(tile)}
        values = {name: value for name, value in asdict(tile).items() if value != optional[name]}
        how = {"ms": round(ms, 5), "shape": {"N": job.n, "D": job.d, "V": job.v, "dtype": job.dtype}}
        by = {name: environment.get(name) for name in ("gpu", "commit")}
        return dict(zip(self.key, job.key, strict=True)) | {"tile": values} | how | by


TRITON = Table(("kernel", "family", "itemsize", "dim", "vocab"), triton_measured.entries, (triton_configs.find,))
CUDA = Table(("kernel", "dim", "rows"), cuda_tiles.measured)
