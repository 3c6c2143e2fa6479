"""What the compilers make of the kernels: registers, spills, shared memory, instructions. Needs no
GPU.

``python -m benchmarks.compiled_code [sm80] [sm90] [sm100] [cuda]`` prints a table for each. What is
compiled are the launches of ``benchmarks.kernels``, on tensors without storage. Triton's part does
not work in a process that interprets.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {"sm80": 80, "sm90": 90, "sm100": 100}
"""Family of the table of tiles -> compute capability that is compiled for."""

VARIANTS = ("plain", "full")
"""plain: entropy, nothing else. full: every switch on, sizes that are no multiple of the tile's;
see ``kernels.example``."""

RESERVED = 1024
"""Bytes of shared memory that the system keeps of a program that uses any."""

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        registers: per thread at launch.
        highest: number of registers that an instruction names, where warp groups trade registers
            after launch.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory per program, without what the system keeps.
        threads: per program.
        mnemonics: how often each instruction occurs, with its modifiers.
    """

    registers: int
    highest: int
    stack: int
    shared: int
    threads: int
    mnemonics: Counter[str]

    @property
    def instructions(self) -> Counter[str]:
        """The same without modifiers."""
        counts: Counter[str] = Counter()
        for name, count in self.mnemonics.items():
            counts[name.split(".")[0]] += count
        return counts

    @property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def doubles(self) -> int:
        """fp64 arithmetic instructions."""
        return sum(self.instructions[name] for name in ("DADD", "DMUL", "DFMA", "DSETP"))

    @property
    def tensor(self) -> dict[str, int]:
        """Tensor-core instructions, by mnemonic."""
        return {name: self.instructions[name] for name in ("HGMMA", "HMMA", "UTCHMMA") if self.instructions[name]}

    @property
    def tma(self) -> tuple[int, int]:
        """Bulk tensor loads and stores."""
        return self.instructions["UTMALDG"], self.instructions["UTMASTG"]


def disassembler() -> str:
    """Path of the ``cuobjdump`` that comes with triton."""
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)


def inspect(cubin: bytes, threads: int, shared: int) -> Usage:
    """Read a cubin with one kernel. shared: bytes that the launch names; what the code itself
    declares is added."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [disassembler(), "--dump-resource-usage", "--dump-sass", str(path)]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump)
    assert found is not None, dump[:1000]
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Za-z0-9_.]*)", dump, re.MULTILINE)
    highest = 1 + max((int(number) for number in re.findall(r"\bR(\d+)\b", dump)), default=-1)
    declared = max(0, int(found[3]) - RESERVED)
    return Usage(int(found[1]), highest, int(found[2]), shared + declared, threads, Counter(names))


def compile_triton(launch: Any, architecture: int) -> Any:
    """Compile what the launch would run: the signature follows from its arguments as the
    just-in-time compiler reads them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        aligned = specialize
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
            aligned = False
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialize and value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def triton_usage(launch: Any, architecture: int) -> Usage:
    """Compile a launch of a Triton kernel for a compute capability, and read its code."""
    compiled = compile_triton(launch, architecture)
    usage = inspect(compiled.asm["cubin"], 32 * compiled.metadata.num_warps, 0)
    return Usage(**vars(usage) | {"shared": compiled.metadata.shared})


def cuda_usage(item: Any, cache: Path | None = None) -> Usage:
    """Build a CUDA kernel (or take it from the cache), and read its code. item: an
    ``ops.cuda.tiles.Build``."""
    from eapo_kernels.ops.cuda import build
    from eapo_kernels.ops.cuda import tiles as cuda_tiles

    return inspect(build.cubin(item, cache=cache), cuda_tiles.THREADS, item.shared_bytes)


def triton_rows(family: str) -> Iterator[str]:
    """The table of a family in Markdown, a line at a time."""
    from . import kernels

    yield "| kernel | bytes | tile | variant | registers | spills | shared | tensor cores | TMA loads + stores |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for entry in kernels.TABLE:
        for variant in VARIANTS if entry.family == family else ():
            t, u = entry.tile, triton_usage(kernels.example(entry, variant), ARCHITECTURES[family])
            shape = f"{t.block_n}x{t.block_v}x{t.block_d}, {t.warps} warps, {t.stages} stages"
            tensor = " ".join(f"{count} {name}" for name, count in u.tensor.items()) or "-"
            yield (
                f"| {entry.kernel} | {entry.itemsize} | {shape} | {variant} | {u.registers} | {u.spills} ({u.stack} B) "
                f"| {u.shared} | {tensor} | {u.tma[0]} + {u.tma[1]} |"
            )


def cuda_rows() -> Iterator[str]:
    """The table of the CUDA kernels in Markdown, a line at a time."""
    from eapo_kernels.ops.cuda import tiles as cuda_tiles

    yield "| kernel | registers at launch, highest used | spills | shared | wgmma | TMA loads + stores | stmatrix | MUFU |"
    yield "|---|---|---|---|---|---|---|---|"
    for item in cuda_tiles.builds():
        u = cuda_usage(item)
        count = u.instructions
        yield (
            f"| {item} | {u.registers}, {u.highest} | {u.spills} ({u.stack} B) | {u.shared} | {count['HGMMA']} "
            f"| {u.tma[0]} + {u.tma[1]} | {count['STSM']} | {count['MUFU']} |"
        )


if __name__ == "__main__":
    for _chosen in sys.argv[1:] or [*ARCHITECTURES, "cuda"]:
        print(f"\n{_chosen}, torch {torch.__version__}\n")
        for _row in cuda_rows() if _chosen == "cuda" else triton_rows(_chosen):
            print(_row, flush=True)
