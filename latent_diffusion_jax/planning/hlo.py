"""Compiled programs as XLA prints them, read into instructions with shapes and sizes.

Only what an estimate of cost needs: names, operations, operands, shapes with their layouts in
memory, and the computations that an instruction calls.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64,
}  # fmt: skip
HBM = 0  # the memory space that shapes without another are in

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array.

    Attributes:
      dtype: XLA's name of it.
      dims: sizes.
      layout: as printed, such as `2,1,0:T(8,128)(2,1)S(1)`.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def memory_space(self) -> int:
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found.group(1)) if found else HBM

    @property
    def size(self) -> int:
        """Bytes in memory, tiles filled up."""
        order, _, rest = self.layout.partition(":")
        dims = list(self.dims)
        tile = re.search(r"T\(([\d,]+)\)", rest)
        if tile and order:
            minor_first = [int(i) for i in order.split(",") if i]
            for step, axis in zip(reversed(_numbers(tile.group(1))), minor_first, strict=False):
                dims[axis] = -(-dims[axis] // step) * step
        return math.prod(dims) * BITS.get(self.dtype, 8) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: of its result.
      opcode: `fusion`, `convolution`, ...
      shapes: of its result, the parts of a tuple one after the other.
      operands: names of instructions of the same computation.
      attributes: what follows the operands, as printed.
      called: names of computations.
      literal: of a constant, its value as printed; of a parameter, its number.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    called: tuple[str, ...]
    literal: str = ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes; None where it is not there."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """The traced operation that it comes from; "" where XLA made it up."""
        return self.attribute(r'op_name="([^"]*)"') or ""


Computation = dict[str, Instruction]  # in the order in which they are carried out


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which of them it starts with."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """What `compiled.as_text()` gives.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _joined(text):
        if line.startswith(" "):
            instruction = _instruction(line) if current is not None else None
            if instruction is not None:
                assert current is not None
                current[instruction.name] = instruction
            continue
        header = _HEADER.match(line)
        current = computations.setdefault(header.group(2), {}) if header else None
        if header and header.group(1):
            entry = header.group(2)
    if not entry:
        raise ValueError("not a compiled program: it has no entry computation")
    return Module(computations, entry)


def _joined(text: str) -> Iterator[str]:
    """Lines, those of an instruction together: what is printed of kernels has line breaks."""
    waiting: list[str] = []
    for line in text.splitlines():
        if waiting and not line.startswith(" ") and line != "}" and not _HEADER.match(line):
            waiting.append(line)
            continue
        if waiting:
            yield "".join(waiting)
        waiting = [line]
    yield "".join(waiting)


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if not start:
        return None
    place = start.end()
    end = _closing(line, place) + 1 if line[place] == "(" else line.index(" ", place)
    shapes = tuple(_shapes(line[place:end]))
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    literal = inside if opcode.group(1) in ("constant", "parameter") else ""
    operands = () if literal else tuple(re.findall(r"%([\w.\-]+)", inside))
    attributes = line[close + 1 :]
    called = _CALLED.findall(attributes)
    for group in _BRANCHES.findall(attributes):
        called += [name.strip().lstrip("%") for name in group.split(",")]
    return Instruction(
        start.group(1), opcode.group(1), shapes, operands, attributes, tuple(called), literal
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype != "token":
            yield Shape(dtype, _numbers(dims.replace("<=", "")), layout)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in {text[start : start + 80]!r}")
