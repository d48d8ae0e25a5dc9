"""Collectives of compiled programs: who takes part, and how long the links between chips take."""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from latent_diffusion_jax.planning.hlo import Instruction, Shape
from latent_diffusion_jax.runtime.chips import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Slices:
    """The chips that a program runs on.

    Attributes:
      chip: their kind.
      shape: of one slice's torus or grid.
      count: of slices, joined by the data centre's network.
      slice_of: which of them each chip of a program belongs to, by its number there; default one
        slice after the other.
    """

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1
    slice_of: tuple[int, ...] = ()

    def spanned(self, group: Iterable[int]) -> int:
        """How many slices chips of a program are in."""
        if self.slice_of:
            return len({self.slice_of[chip] for chip in group})
        return len({chip // self.chips_of_slice for chip in group})

    @property
    def chips_of_slice(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chips(self) -> int:
        return self.chips_of_slice * self.count

    def bandwidth(self, chips: int) -> float:
        """Bytes a second that reach the worst placed of so many chips of a slice.

        A whole slice uses its links along all axes; a part is taken to lie along the longest one.
        An axis has links all round where it fills a pod (v5e, v6e) or cubes of four (v4, v5p).
        """
        whole = 16 if self.chip.link_axes == 2 else 4
        ways = [2 if size % whole == 0 else 1 for size in sorted(self.shape) if size > 1]
        used = ways if chips >= self.chips_of_slice else ways[-1:]
        return self.chip.link_bandwidth * max(sum(used), 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, on each chip.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of what is gathered or reduced, whole.
      group: ids of chips that take part together.
      hidden: computation goes on meanwhile.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    hidden: bool

    def seconds(self, slices: Slices) -> float:
        """By rings over the links within slices, then over the network between them."""
        spanned = slices.spanned(self.group)
        local = max(len(self.group) // spanned, 1)
        passes = 2.0 if self.kind == "all-reduce" else 1.0
        seconds = 0.0
        if self.kind == "collective-permute":
            between = slices.chip.host_bandwidth if spanned > 1 else slices.chip.link_bandwidth
            return self.size / between
        if local > 1:
            share = (local - 1) / local
            if self.kind == "all-to-all":
                share /= 4  # a ring's halves carry each other's pieces half of its length
            seconds += passes * share * self.size / slices.bandwidth(local)
        if spanned > 1:
            share = (spanned - 1) / spanned / local
            seconds += passes * share * self.size / slices.chip.host_bandwidth
        return seconds


def find_collective(instruction: Instruction, num_chips: int, hidden: bool) -> Collective | None:
    """The collective that an instruction is, or starts; None where it is none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    shapes = results(instruction)
    size = sum(shape.size for shape in shapes if shape.dtype != "token" and shape.dims)
    group = first_group(instruction.attributes, num_chips)
    if kind == "reduce-scatter":
        size *= len(group)
    return Collective(kind, size, group, hidden or instruction.opcode.endswith("-start"))


def results(instruction: Instruction) -> tuple[Shape, ...]:
    """What a collective makes; one that is started names its operands first."""
    shapes, kind = instruction.shapes, instruction.opcode
    if not kind.endswith("-start") or kind == "all-reduce-start":
        return shapes
    return shapes[1:2] if kind == "collective-permute-start" else shapes[len(shapes) // 2 :]


def first_group(attributes: str, num_chips: int) -> tuple[int, ...]:
    """The first of an instruction's groups of chips, in any of the ways that XLA prints them.

    Of a permutation it is the pair that is farthest apart.

    Raises:
      ValueError: the groups are printed in a way that is not known.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", attributes)
    if mesh:
        return _group_of_mesh(*mesh.groups())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        ids = _iota(iota.group(3)).reshape(int(iota.group(1)), int(iota.group(2)))
        return tuple(int(i) for i in ids[0])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(i) for i in listed.group(1).split(","))
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]+\})\}", attributes)
    if pairs:
        found = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs.group(1))]
        return max(found, key=lambda pair: abs(pair[0] - pair[1]))
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"groups of chips that are not understood: {attributes[:200]}")
    return tuple(range(num_chips))


def _group_of_mesh(named: str, order: str, groups: str) -> tuple[int, ...]:
    """Of mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, whose parts these are."""
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", named)]
    taken = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", groups)
    shape: list[int] = []
    chosen: list[int] = []
    for name, size in axes:
        part = next((found for found in taken if found[0] == name), None)
        if part and part[1]:  # 'axis':(m)s, the part of size s that has m steps before it
            before, inside = int(part[1]), int(part[2])
            chosen.append(len(shape) + 1)
            shape += [before, inside, size // before // inside]
            continue
        if part:
            chosen.append(len(shape))
        shape.append(size)
    ids = np.arange(math.prod(shape))
    if order:
        device_ids = re.fullmatch(r", device_ids=\((.*)\)", order)
        if not device_ids:
            raise ValueError(f"groups of chips that are not understood: {named}{order}")
        ids = _iota(device_ids.group(1))
    ids = ids.reshape(shape)
    rest = [axis for axis in range(len(shape)) if axis not in chosen]
    group = ids.transpose(*rest, *chosen).reshape(-1, math.prod(shape[a] for a in chosen))[0]
    return tuple(int(i) for i in group)


def _iota(text: str) -> np.ndarray:
    """What [4,2]T(1,0) stands for: 0, 1, ... in an array of that shape, its axes put in order."""
    found = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not found:
        raise ValueError(f"an order of chips that is not understood: {text[:200]}")
    shape = [int(i) for i in found.group(1).split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(i) for i in found.group(2).split(",")]) if found.group(2) else ids
