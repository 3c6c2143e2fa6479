"""What the shipped kernels compile to: registers, spills, shared memory, instructions. Needs no GPU.

The table that ``python -m eapo_kernels.ops.cuda --report`` prints; csrc/README.md says how to read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import cubin
from . import build, tiles
from .tiles import Build


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        code: its machine code, counted.
        shared: bytes of shared memory per program, dynamic and static, without what the system keeps.
    """

    code: cubin.Code
    shared: int


RESERVED = 1024
"""Bytes of shared memory that the system keeps of a program that uses any."""


def disassembler() -> str:
    """Path of the ``cuobjdump`` that comes with triton."""
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)


def usage(item: Build, cache: Path | None = None) -> Usage:
    """Build (or take from the cache) and read."""
    code = cubin.inspect(build.cubin(item, cache=cache), disassembler())
    return Usage(code, item.shared_bytes + max(0, code.static_shared - RESERVED))


def rows() -> Iterator[str]:
    """The table in Markdown, a line at a time."""
    yield (
        "| kernel | registers at launch, highest used | spills | shared | wgmma | TMA loads + stores | stmatrix | MUFU "
        "| 16-byte loads |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for item in tiles.builds():
        u = usage(item)
        count = u.code.instructions
        yield (
            f"| {item} | {u.code.registers}, {u.code.highest} | {u.code.spills} ({u.code.stack} B) | {u.shared} "
            f"| {count['HGMMA']} | {count['UTMALDG']} + {count['UTMASTG']} | {count['STSM']} | {count['MUFU']} "
            f"| {u.code.mnemonics['LDG.E.128']} |"
        )
