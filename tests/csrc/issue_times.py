"""How long a warp takes for its epilogue, from the machine code.

ptxas writes beside each instruction how many clocks to wait after it, which scoreboards it sets and which it waits for.
Issued in order by these, with the rates of the units of sm_90.

What is assumed: maxima and integers every 2 clocks, exponentials every 8 with results after ``LATENCY``; other latencies below.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LATENCY = 20
OTHERS = {
    "SHFL": 24,
    "LDC": 40,
    "STSM": 33,
    "S2R": 30,
    "S2UR": 30,
    "R2UR": 12,
    "SYNCS": 30,
    "BAR": 20,
    "FENCE": 20,
    "MEMBAR": 30,
}
HALF_RATE = frozenset(
    ("FMNMX", "FSEL", "ISETP", "LOP3", "SEL", "FSETP", "PRMT", "F2FP", "VIADD", "VIMNMX", "IADD3", "PLOP3", "LEA", "SHF", "MOV")
)


class Instruction(NamedTuple):
    address: int
    text: str
    stall: int
    sets: tuple[int, int]  # scoreboards: of the result, of the operands' reading; 7: none
    waits: int  # bits

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split()[0].split(".")[0]


def parse(dump: str) -> list[Instruction]:
    """The instructions of ``cuobjdump --dump-sass``: two lines each, the control bits in the second."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/", dump)
    bits = [(int(address, 16), text, int(high, 16)) for address, text, high in found]
    return [Instruction(a, t, h >> 41 & 15, (h >> 46 & 7, h >> 49 & 7), h >> 52 & 63) for a, t, h in bits]


def epilogue(code: list[Instruction]) -> list[Instruction]:
    """From the wait for all products to the jump back to the next tile, long jumps (over what few tiles need) taken."""
    place = {one.address: i for i, one in enumerate(code)}
    i = max(i for i, one in enumerate(code) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in one.text)
    path = []
    while True:
        one = code[i]
        path.append(one)
        jump = re.search(r"BRA .*?0x([0-9a-f]+)$", one.text)
        to = int(jump[1], 16) if jump else 0
        if jump and to < one.address:
            return path
        i = place[to] if jump and (to - one.address > 0x400 or not one.text.startswith("@")) else i + 1


def clocks(path: list[Instruction], warps: int = 1) -> int:
    """Until the last of so many warps on a sub-core has issued the path; whoever can issue first does."""
    at, ready, boards = [0] * warps, [0] * warps, [[0] * 8 for _ in range(warps)]
    unit = {"MUFU": 0, "half": 0, "issue": 0}
    while min(at) < len(path):
        choices = []
        for warp in range(warps):
            if at[warp] < len(path):
                one = path[at[warp]]
                kind = "MUFU" if one.name == "MUFU" else "half" if one.name in HALF_RATE else "issue"
                waits = [boards[warp][b] for b in range(6) if one.waits >> b & 1]
                choices.append((max(ready[warp], unit["issue"], unit[kind], *waits), warp, kind))
        time, warp, kind = min(choices)
        one = path[at[warp]]
        unit["issue"] = time + 1
        unit[kind] = time + {"MUFU": 8, "half": 2, "issue": 1}[kind]
        result, operands = one.sets
        latency = LATENCY if kind == "MUFU" else OTHERS.get(one.name, 30)
        boards[warp][result] = max(boards[warp][result], time + latency)
        boards[warp][operands] = max(boards[warp][operands], time + 12)
        ready[warp] = time + max(one.stall, 1)
        at[warp] += 1
    return max(ready)
