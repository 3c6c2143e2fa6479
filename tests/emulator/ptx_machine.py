"""Run a kernel's PTX on the CPU, checking the rules of the hardware. See README.md."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ptx_syntax
from torch import Tensor

SOURCES = Path(__file__).with_name("src")
MAGIC = 0x70617465


class Fault(Exception):
    """The kernel did something forbidden or undefined on the hardware, or not emulated."""


class TensorMap(ctypes.Structure):
    """``TensorMap`` of src/tensor.h, in the place of the 128 bytes of a CUtensorMap."""

    _fields_ = [
        ("magic", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("item", ctypes.c_int32),
        ("swizzle", ctypes.c_int32),
        ("base", ctypes.c_uint64),
        ("size", ctypes.c_uint64 * 5),
        ("stride", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5),
        ("unused", ctypes.c_uint32),
    ]


def tensor_map(base: int, item: int, sizes: list[int], strides: list[int], box: list[int], swizzle: int) -> TensorMap:
    """A descriptor. From the innermost dimension: sizes and box in numbers, strides in bytes from
    the second dimension on.
    """
    assert len(sizes) == len(box) == len(strides) + 1
    assert base % 16 == 0, "TMA wants 16-byte aligned matrices"
    assert all(stride % 16 == 0 for stride in strides), "and rows a multiple of 16 bytes apart"
    assert all(stride < 2**40 for stride in strides)
    assert all(1 <= one <= 2**32 for one in sizes)
    assert all(1 <= one <= 256 for one in box)
    made = TensorMap(magic=MAGIC, rank=len(sizes), item=item, swizzle=swizzle, base=base)
    made.size[: len(sizes)] = sizes
    made.stride[: len(sizes)] = [item, *strides]
    made.box[: len(box)] = box
    return made


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator, compiled once a process, its files side by side."""
    compiler = shutil.which("g++")
    assert compiler is not None, "the emulator needs g++"
    options = ["-std=c++17", "-O2", "-march=native", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC"]

    def build(*arguments: str) -> None:
        done = subprocess.run([compiler, *options, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
        objects = {str(source): f"{folder}/{source.stem}.o" for source in SOURCES.glob("*.cpp")}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: build("-c", source, "-o", objects[source]), objects))
        build("-shared", *objects.values(), "-o", f"{folder}/emulator.so")
        loaded = ctypes.CDLL(f"{folder}/emulator.so")
    loaded.create_program.restype = ctypes.c_void_p
    loaded.last_error.restype = ctypes.c_char_p
    return loaded


class Kernel:
    """A kernel that can be run."""

    def __init__(self, text: str, name: str | None = None) -> None:
        self.text = text
        self.syntax = ptx_syntax.parse(text, name)
        emulator = library()
        self._program = ctypes.c_void_p(emulator.create_program(self.syntax.registers, self.syntax.predicates))
        self._finalizer = weakref.finalize(self, emulator.destroy_program, self._program)
        for one in self.syntax.instructions:
            n = len(one.operands)
            kinds = (ctypes.c_int * n)(*(int(o.kind) for o in one.operands))
            indices = (ctypes.c_int * n)(*(o.index for o in one.operands))
            values = (ctypes.c_int64 * n)(*(o.value for o in one.operands))
            if emulator.add(
                self._program, one.mnemonic.encode(), one.guard, int(one.negated), one.line, n, kinds, indices, values
            ):
                raise Fault(self._explain(f"line {one.line}: {emulator.last_error().decode()}"))

    def run(
        self,
        parameters: bytes,
        tensors: Iterable[tuple[Tensor, bool]],
        *,
        grid: int,
        block: int,
        shared_bytes: int,
        seed: int = 0,
        lateness: float = 0.5,
    ) -> None:
        """Execute ``grid`` programs of ``block`` threads, one cluster after the other.

        tensors: the tensors that may be accessed, each with whether it may be written.
        shared_bytes: dynamic shared memory. seed: of the order of warps and asynchronous work.
        lateness: 0 if asynchronous operations complete at once, near 1 as late as allowed.
        Raises Fault.
        """
        ranges = []
        for tensor, writable in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                ranges += [storage.data_ptr(), storage.nbytes(), int(writable)]
        failed = library().run(
            self._program, (ctypes.c_uint64 * len(ranges))(*ranges), len(ranges) // 3, parameters, len(parameters), grid, block,
            self.syntax.cluster, ctypes.c_uint32(ptx_syntax.SHARED_BASE),
            ctypes.c_uint32(self.syntax.static_shared + shared_bytes), ctypes.c_uint64(seed), ctypes.c_double(lateness),
        )  # fmt: skip
        if failed:
            raise Fault(self._explain(library().last_error().decode()))

    def _explain(self, error: str) -> str:
        """With the text of the line that the message begins with."""
        words = error.split(":", 1)
        if words[0].startswith("line "):
            return f"{words[0]} `{self.text.splitlines()[int(words[0][5:]) - 1].strip()}`:{words[1]}"
        return error
