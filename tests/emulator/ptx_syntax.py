"""A parser of PTX text: a kernel's parameters, and its instructions with slots in the place of
register names.

The meaning of instructions is in ``src``. Grammar: the PTX ISA manual, chapters 4, 5 and 9.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from enum import IntEnum


class Kind(IntEnum):
    """``Kind`` of src/program.h."""

    REGISTER = 0
    PREDICATE = 1
    NOT_PREDICATE = 2
    IMMEDIATE = 3
    SPECIAL = 4
    LABEL = 5
    ADDRESS = 6
    PARAMETER = 7
    SINK = 8


SPECIAL = (
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x",
    "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank", "%cluster_nctarank", "%clusterid.x", "%nclusterid.x",
    "%clock",
)  # fmt: skip
"""``Special`` of src/program.h, in its order."""

PACK, UNPACK = 1, 2
"""Values of the sink that begins a ``mov`` with a vector."""

_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Operand:
    """See src/program.h."""

    kind: Kind
    index: int = -1
    value: int = 0


@dataclass
class Instruction:
    """A mnemonic, its guard (slot of a predicate, or -1) and operands, vectors flattened."""

    mnemonic: str
    operands: list[Operand]
    guard: int
    negated: bool
    line: int
    target: tuple[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Parameter:
    """A parameter with its place among the kernel's parameters in bytes; ``type`` as written
    (``u64``, ``b8``).
    """

    name: str
    type: str
    offset: int
    size: int


@dataclass
class Kernel:
    """A ``.entry`` with its numbers of registers and predicates, bytes of static shared memory, and
    programs of a cluster.
    """

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    registers: int = 0
    predicates: int = 0
    static_shared: int = 0
    cluster: int = 1


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel ``name`` of a module, or its only kernel. Raises ValueError on unknown syntax."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text).replace("\0", "")
    wanted = re.escape(name) if name else r"[\w$]+"
    entry = re.search(rf"\.entry\s+({wanted})\s*\(([^)]*)\)([^{{]*){{", text)
    if entry is None:
        raise ValueError(f"expected a kernel {name or ''} in the module")
    kernel = Kernel(entry[1], _parameters(entry[2]))
    if cluster := re.search(r"\.reqnctapercluster\s+(\d+)", entry[3]):
        kernel.cluster = int(cluster[1])
    return _Body(text, entry.end(), kernel, _shared_symbols(text, kernel)).parse()


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for one in filter(None, (part.strip() for part in text.split(","))):
        words = re.fullmatch(r"\.param\s+(.*?)([\w$]+)\s*(?:\[(\d+)\])?", one, re.S)
        if words is None:
            raise ValueError(f"parameter {one!r} is not understood")
        directives = words[1]
        kind = re.search(r"\.([bufs]\d+)", directives)
        assert kind is not None, one
        item = _SIZES[kind[1][1:]]
        explicit = re.match(
            r"\s*\.align\s+(\d+)", directives
        )  # before the type: the parameter's own; after .ptr: what it points to
        align = int(explicit[1]) if explicit else item
        offset = -(-offset // align) * align
        size = item * int(words[3] or 1)
        found.append(Parameter(words[2], kind[1], offset, size))
        offset += size
    return found


def _shared_symbols(text: str, kernel: Kernel) -> dict[str, int | None]:
    """Offsets of the shared variables of the module and of the kernel, static ones first."""
    symbols: dict[str, int | None] = {}
    dynamic = []
    for match in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        align, name, size = int(match[1]), match[2], match[3]
        if not size:
            dynamic.append(name)
            continue
        kernel.static_shared = -(-kernel.static_shared // align) * align
        symbols[name] = kernel.static_shared
        kernel.static_shared += int(size)
    kernel.static_shared = -(-kernel.static_shared // 16) * 16
    return symbols | dict.fromkeys(dynamic, kernel.static_shared)


class _Body:
    """Reads the instructions between an entry's braces."""

    def __init__(self, text: str, start: int, kernel: Kernel, symbols: dict[str, int | None]) -> None:
        self.text, self.at, self.kernel, self.symbols = text, start, kernel, symbols
        self.offsets = {p.name: p.offset for p in kernel.parameters}
        self.scopes, self.last_scope = [0], 0
        self.names: dict[tuple[int, str], Operand] = {}
        self.ranges: dict[tuple[int, str], bool] = {}  # prefixes like %r of %r<100>: whether they are predicates
        self.labels: dict[tuple[int, str], int] = {}

    def parse(self) -> Kernel:
        while self.scopes:
            self._statement()
        for instruction in self.kernel.instructions:
            if instruction.target is None:
                continue
            label, scopes = instruction.target
            places = [self.labels[scope, label] for scope in reversed(scopes) if (scope, label) in self.labels]
            if not places:
                raise ValueError(f"line {instruction.line}: no label {label}")
            instruction.operands = [Operand(Kind.LABEL, value=places[0])]
        return self.kernel

    def _statement(self) -> None:
        match = re.compile(r"\s*").match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith(("{", "}"), self.at):
            if self.text[self.at] == "{":
                self.last_scope += 1
                self.scopes.append(self.last_scope)
            else:
                self.scopes.pop()
            self.at += 1
            return
        if label := re.compile(r"([\w$%]+)\s*:(?!:)").match(self.text, self.at):
            self.labels[self.scopes[-1], label[1]] = len(self.kernel.instructions)
            self.at = label.end()
            return
        line = self.text.count("\n", 0, self.at) + 1
        if re.compile(r"\.(loc|file)\b").match(self.text, self.at):
            self.at = self.text.index("\n", self.at)
            return
        end = self.text.index(";", self.at)
        statement, self.at = self.text[self.at : end].strip(), end + 1
        if not statement:
            return
        if statement.startswith("."):
            self._declaration(statement, line)
        else:
            self._instruction(statement, line)

    def _declaration(self, statement: str, line: int) -> None:
        if statement.startswith((".pragma", ".shared")):  # the kernel's own shared variables count like the module's
            return
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if match is None:
            raise ValueError(f"line {line}: {statement!r} is not understood")
        for name in (one.strip() for one in match[2].split(",")):
            if numbered := re.fullmatch(r"([%\w$]+)<\d+>", name):
                self.ranges[self.scopes[-1], numbered[1]] = match[1] == "pred"
            else:
                self._declare(self.scopes[-1], name, match[1] == "pred")

    def _declare(self, scope: int, name: str, predicate: bool) -> Operand:
        if predicate:
            operand = Operand(Kind.PREDICATE, self.kernel.predicates)
            self.kernel.predicates += 1
        else:
            operand = Operand(Kind.REGISTER, self.kernel.registers)
            self.kernel.registers += 1
        self.names[scope, name] = operand
        return operand

    def _register(self, name: str) -> Operand | None:
        prefix = re.sub(r"\d+$", "", name)
        for scope in reversed(self.scopes):
            if (scope, name) in self.names:
                return self.names[scope, name]
            if (scope, prefix) in self.ranges and prefix != name:
                return self._declare(scope, name, self.ranges[scope, prefix])
        return None

    def _instruction(self, statement: str, line: int) -> None:
        guard, negated = -1, False
        if match := re.match(r"@(!?)([%\w$]+)\s+", statement):
            register = self._register(match[2])
            if register is None or register.kind != Kind.PREDICATE:
                raise ValueError(f"line {line}: no predicate {match[2]}")
            guard, negated = register.index, match[1] == "!"
            statement = statement[match.end() :]
        mnemonic, _, rest = statement.partition(" ") if " " in statement.split("\t")[0] else statement.partition("\t")
        parts = _split(rest.strip())
        instruction = Instruction(mnemonic.strip(), [], guard, negated, line)
        self.kernel.instructions.append(instruction)
        if mnemonic.split(".")[0] == "bra":
            instruction.target = (parts[0].strip(), tuple(self.scopes))
            return
        try:
            if mnemonic.startswith("mov.") and any(part.lstrip().startswith("{") for part in parts):
                unpack = parts[0].lstrip().startswith("{")
                instruction.operands.append(Operand(Kind.SINK, value=UNPACK if unpack else PACK))
            for part in parts:
                instruction.operands += self._operands(part.strip())
        except ValueError as error:
            raise ValueError(f"line {line}: {statement!r}: {error}") from error

    def _operands(self, text: str) -> list[Operand]:
        if text.startswith("{"):
            return [one for part in _split(text[1:-1]) for one in self._operands(part.strip())]
        if text.startswith("["):
            first, *others = _split(text[1:-1])
            return [self._address(first.strip())] + [one for part in others for one in self._operands(part.strip())]
        if "|" in text:
            return [one for part in text.split("|") for one in self._operands(part.strip())]
        if text == "_":
            return [Operand(Kind.SINK)]
        if text.startswith("!"):
            register = self._register(text[1:])
            if register is None:
                raise ValueError(f"{text} is not declared")
            return [Operand(Kind.NOT_PREDICATE, register.index)]
        if (register := self._register(text)) is not None:
            return [register]
        if text in SPECIAL or text in ("%clock64", "%globaltimer"):
            return [Operand(Kind.SPECIAL, SPECIAL.index(text if text in SPECIAL else "%clock"))]
        if (number := _number(text)) is not None:
            return [Operand(Kind.IMMEDIATE, value=number)]
        return [self._symbol(text)]

    def _address(self, text: str) -> Operand:
        match = re.fullmatch(r"([^+\s]+)\s*(?:\+\s*(-?\w+))?", text)
        if match is None:
            raise ValueError(f"address {text!r} is not understood")
        base, offset = match[1], int(match[2] or "0", 0)
        if (register := self._register(base)) is not None:
            return Operand(Kind.ADDRESS, register.index, offset)
        if (number := _number(base)) is not None:
            return Operand(Kind.ADDRESS, -1, number + offset)
        return self._symbol(base, offset)

    def _symbol(self, name: str, offset: int = 0) -> Operand:
        if name in self.offsets:
            return Operand(Kind.PARAMETER, value=self.offsets[name] + offset)
        place = self.symbols.get(name)
        if place is None:
            raise ValueError(f"{name} is not known")
        return Operand(Kind.ADDRESS, -1, SHARED_BASE + place + offset)


SHARED_BASE = 1024
"""Address of the first byte of a program's shared memory; the hardware keeps the first 1024 for
itself.
"""


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text else []


def _number(text: str) -> int | None:
    """The bits of a literal, as a signed 64-bit number."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return int(struct.unpack("<q", struct.pack("<Q", int(text[2:], 16)))[0])
    if match := re.fullmatch(r"(-?)(0x[0-9a-fA-F]+|\d+)U?", text):
        value = int(match[1] + match[2], 0)
        return value - (1 << 64) if value >= 1 << 63 else value
    return None
