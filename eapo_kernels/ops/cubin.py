"""What a compiled kernel needs, read from its cubin with ``cuobjdump``; needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Code:
    """A kernel's machine code, counted.

    Attributes:
        registers: per thread at launch.
        highest: number of registers that an instruction names, where warp groups trade registers after launch.
        stack: bytes of local memory per thread.
        static_shared: bytes of shared memory per program that the launch does not name; on compute capability 9.0 with the 1024
            that the system keeps of a program that uses any.
        instructions: how often each mnemonic occurs, without its modifiers.
        mnemonics: the same with modifiers.
    """

    registers: int
    highest: int
    stack: int
    static_shared: int
    instructions: Counter[str]
    mnemonics: Counter[str]

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]


def inspect(cubin: bytes, tool: str) -> Code:
    """Read a cubin with one kernel. tool: path of ``cuobjdump``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", str(path)]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump)
    assert found is not None, dump[:1000]
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]*)", dump, re.MULTILINE)
    named = [int(number) for number in re.findall(r"\bR(\d+)\b", dump)]
    instructions = Counter(name.split(".")[0] for name in names)
    return Code(int(found[1]), 1 + max(named, default=-1), int(found[2]), int(found[3]), instructions, Counter(names))
