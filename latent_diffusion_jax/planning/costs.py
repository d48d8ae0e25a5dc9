"""What a compiled program costs on a chip: operations, bytes, collectives and a roofline.

The program is read as XLA prints it (`planning.hlo`) and walked in the order in which it runs. An
operation takes the longest of

  compute   its products of matrices, dimensions filled up to the tiles of the matrix unit,
  memory    the bytes that it reads from HBM and writes to it, at the full bandwidth,

and a collective what the links take, less what is computed meanwhile where XLA starts it early.
Copies to and from on-chip memory that XLA runs in the background count as bytes alone.

Weaknesses: nothing is said of vector units (exponentials in attention, normalisation: mostly bound
by memory), of latencies of small operations, of the way to the host's memory (remat "offload"), or
of how well the compiler fills the pipelines. A real step is slower.
"""

import dataclasses
import math
from collections.abc import Iterator

from latent_diffusion_jax.planning.hlo import HBM, Computation, Instruction, Module, Shape
from latent_diffusion_jax.planning.links import KINDS, Collective, Slices, find_collective, results
from latent_diffusion_jax.runtime.flops import valid_products

TILE = {"v6e": 256}  # of the matrix unit; 128 of all others
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "add-dependency", "opt-barrier", "domain", "async-update",
)  # fmt: skip
_STARTS = tuple(f"{kind}-start" for kind in KINDS)
FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding", "SliceBitcast", "MoveToDevice")
PASSES = {"highest": 6, "high": 3}  # of the matrix unit over bfloat16 parts of float32


@dataclasses.dataclass
class Cost:
    """Of a program or a part of it, on one chip.

    Attributes:
      flops: products of matrices, as in the program: what is recomputed counts again.
      bytes: read from HBM and written to it.
      seconds: estimated; collectives that are not hidden included.
      bound: the seconds of operations by what bounds them: compute, memory or links.
      collectives: with how often each is run; one that XLA splits over operations is one.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    bound: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"compute": 0.0, "memory": 0.0, "links": 0.0}
    )
    collectives: list[tuple[Collective, float]] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        for name, seconds in other.bound.items():
            self.bound[name] += times * seconds
        self.collectives += [(found, count * times) for found, count in other.collectives]


def estimate(module: Module, slices: Slices, rounds: int = 1) -> Cost:
    """The cost of a compiled program on each chip.

    Args:
      module: what `hlo.parse` gave.
      slices: that it was compiled for.
      rounds: of loops whose number the program does not say, such as a sampler's steps.
    """
    return _Walk(module, slices, rounds).cost(module.entry)


class _Walk:
    def __init__(self, module: Module, slices: Slices, rounds: int):
        self._computations = module.computations
        self._slices, self._chip, self._rounds = slices, slices.chip, rounds
        self._known: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        if name not in self._known:
            self._known[name] = self._cost(self._computations[name])
        return self._known[name]

    def _cost(self, computation: Computation) -> Cost:
        total, background = Cost(), 0.0
        hidden: dict[str, tuple[Collective, float]] = {}  # by channel: seconds computed meanwhile
        started: dict[str, float] = {}  # by what starts them: seconds that links have to go yet
        for instruction in computation.values():
            if instruction.opcode in FREE:
                continue
            before = total.seconds - total.bound["links"]
            if instruction.opcode.endswith("-done"):
                self._exposed(total, started.pop(instruction.operands[0], 0.0))
            elif instruction.opcode == "while":
                body, condition = self._loop(instruction)
                total.add(self.cost(body), self._trips(condition))
            elif instruction.opcode == "conditional":
                branches = [self.cost(name) for name in instruction.called]
                total.add(max(branches, key=lambda cost: cost.seconds))
            elif instruction.opcode == "call":
                total.add(self.cost(instruction.called[0]))
            elif instruction.opcode in ("copy-start", "slice-start"):
                moved = self._moved(instruction, computation)
                total.bytes += moved
                background += moved
            elif instruction.opcode in _STARTS:
                (found,) = (found for _, found in self._collectives(instruction, computation))
                moved = self._moved(instruction, computation)
                total.bytes += moved
                background += moved
                total.collectives.append((found, 1.0))
                started[instruction.name] = found.seconds(self._slices)
            else:
                seconds = self._operation(instruction, computation, total)
                for channel, found in self._collectives(instruction, computation):
                    if not found.hidden:
                        total.collectives.append((found, 1.0))
                        self._exposed(total, found.seconds(self._slices))
                    else:
                        earlier = hidden.get(channel, (found, 0.0))[1]
                        hidden[channel] = found, earlier + seconds
            left = total.seconds - total.bound["links"] - before
            for name, seconds in started.items():  # one after the other: they share the links
                started[name] = max(seconds - left, 0.0)
                left = max(left - seconds, 0.0)
        for seconds in started.values():  # whose end is not found
            self._exposed(total, seconds)
        for found, meanwhile in hidden.values():
            total.collectives.append((found, 1.0))
            self._exposed(total, max(found.seconds(self._slices) - meanwhile, 0.0))
        # What is copied in the background shares the bandwidth with everything else.
        missing = total.bytes / self._chip.memory_bandwidth - total.seconds
        if background and missing > 0.0:
            total.seconds += missing
            total.bound["memory"] += missing
        return total

    def _exposed(self, total: Cost, seconds: float) -> None:
        total.seconds += seconds
        total.bound["links"] += seconds

    def _operation(self, instruction: Instruction, computation: Computation, total: Cost) -> float:
        """Adds an operation that is no loop, and gives its seconds."""
        flops, filled = self._products(instruction, computation)
        touched = self._touched(instruction, computation)
        compute, memory = filled / self._chip.flops, touched / self._chip.memory_bandwidth
        seconds = max(compute, memory)
        total.flops += flops
        total.bytes += touched
        total.seconds += seconds
        total.bound["compute" if compute >= memory else "memory"] += seconds
        return seconds

    def _products(self, instruction: Instruction, computation: Computation) -> tuple[float, float]:
        """Operations of an instruction's products; the same with tiles filled up."""
        flops = filled = 0.0
        tile = TILE.get(self._chip.name, 128)
        for inner, around in self._inside(instruction, computation):
            if inner.opcode in ("convolution", "dot"):
                found = convolution_flops(inner, around, tile)
            elif inner.opcode == "custom-call":
                found = kernel_flops(inner, around, tile)
            else:
                continue
            flops, filled = flops + found[0], filled + found[1]
        return flops, filled

    def _inside(
        self, instruction: Instruction, computation: Computation
    ) -> Iterator[tuple[Instruction, Computation]]:
        """The instruction, or those that it fuses; each with the computation that it is in."""
        if instruction.opcode not in ("fusion", "async-start"):
            yield instruction, computation
            return
        for name in instruction.called:
            for inner in self._computations[name].values():
                yield from self._inside(inner, self._computations[name])

    def _collectives(
        self, instruction: Instruction, computation: Computation
    ) -> Iterator[tuple[str, Collective]]:
        fused = instruction.opcode in ("fusion", "async-start")
        scattered = any("all-reduce-scatter" in name for name in instruction.called)
        if not fused and find_collective(instruction, 1, False) is None:
            return
        for inner, _ in self._inside(instruction, computation):
            found = find_collective(inner, self._slices.num_chips, fused and not scattered)
            if found is None:
                continue
            if scattered:
                found = dataclasses.replace(found, kind="reduce-scatter")
            yield inner.attribute(r"channel_id=(\d+)") or inner.name, found

    def _moved(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes of HBM that are read or written in the background."""
        if instruction.opcode == "slice-start":
            return float(min(s.size for s in instruction.shapes if s.dims))
        if instruction.opcode in _STARTS:
            operands = [s for name in instruction.operands for s in computation[name].shapes]
            arrays = (*operands, *results(instruction))
            return float(sum(s.size for s in arrays if s.memory_space == HBM))
        return float(sum(s.size for s in instruction.shapes[:2] if s.memory_space == HBM))

    def _touched(self, instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode == "custom-call" and (
            instruction.attribute(r'custom_call_target="([^"]*)"') in FREE_CALLS
        ):
            return 0.0
        reads = [
            sum(s.size for s in computation[name].shapes if s.memory_space == HBM)
            if computation[name].opcode != "tuple"
            else 0
            for name in instruction.operands
        ]
        writes = sum(s.size for s in instruction.shapes if s.memory_space == HBM)
        if instruction.opcode == "fusion":
            fused = self._computations[instruction.called[0]]
            reads = [
                min(read, part) if part is not None else read
                for read, part in zip(reads, _read_in_parts(fused), strict=False)
            ]
            updated = _updated_in_place(fused)
            if updated is not None:
                writes = min(writes, updated)
        elif instruction.opcode in ("dynamic-slice", "slice", "gather"):
            reads = [min(read, writes or read) for read in reads]
        elif instruction.opcode == "dynamic-update-slice":
            update = sum(s.size for s in computation[instruction.operands[1]].shapes)
            reads, writes = [], 2 * update if writes else 0
        return float(sum(reads) + writes)

    def _loop(self, instruction: Instruction) -> tuple[str, str]:
        body = instruction.attribute(r"body=%?([\w.\-]+)")
        condition = instruction.attribute(r"condition=%?([\w.\-]+)")
        assert body is not None and condition is not None
        return body, condition

    def _trips(self, condition: str) -> float:
        """Rounds of a loop that counts from 0 to a constant; else those that were said."""
        computation = self._computations[condition]
        for instruction in computation.values():
            if instruction.opcode != "compare" or "direction=LT" not in instruction.attributes:
                continue
            limit = computation.get(instruction.operands[1])
            if limit is not None and limit.literal.isdigit():
                return float(limit.literal)
        return float(self._rounds)


def convolution_flops(
    instruction: Instruction, computation: Computation, tile: int
) -> tuple[float, float]:
    """Operations of a convolution, as which XLA writes products of matrices on TPUs too.

    Returns:
      (operations, operations with the features filled up to the matrix unit's tiles and by the
      number of passes that the precision asks for). Products with padding do not count.
    """
    lhs, rhs = (computation[name].shapes[0] for name in instruction.operands[:2])
    out = instruction.shapes[0]
    labels = instruction.attribute(r"dim_labels=(\w+_\w+->\w+)")
    if labels is None:
        return _dot_flops(instruction, lhs, out, tile)
    left, right = labels.split("_")
    right, result = right.split("->")
    window = _window(instruction)
    places = outputs = features = 1
    for axis in sorted(label for label in result if label.isdigit()):
        options = {name: values[int(axis)] for name, values in window.items()}
        size = lhs.dims[left.index(axis)]
        if size == 1:  # heads, say: more features of the kernel, written as an axis of space
            features *= out.dims[result.index(axis)]
        else:
            outputs *= out.dims[result.index(axis)]
        places *= valid_products(
            size,
            rhs.dims[right.index(axis)],
            out.dims[result.index(axis)],
            stride=options["stride"],
            padding=options["pad"],
            lhs_dilation=options["lhs_dilate"],
            rhs_dilation=options["rhs_dilate"],
        )
    batch = out.dims[result.index("b")]
    features_in, features_out = rhs.dims[right.index("i")], out.dims[result.index("f")]
    groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    flops = 2.0 * places * batch * features_in * features_out / groups
    window_size = math.prod(rhs.dims[right.index(label)] for label in right if label.isdigit())
    outputs, features = batch * outputs, features_out * features
    # The unit holds tiles of [contracted, one side's features] and streams the other side.
    contracted = features_in if features_in >= tile else features_in * window_size
    wide, narrow = max(outputs, features), min(outputs, features)
    waste = _waste(contracted, tile) * _waste(narrow, tile) * _waste(wide, 8)
    return flops, flops * waste * _passes(instruction, lhs)


def _dot_flops(instruction: Instruction, lhs: Shape, out: Shape, tile: int) -> tuple[float, float]:
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    inner = math.prod(lhs.dims[int(i)] for i in contracted.split(",") if i)
    flops = 2.0 * math.prod(out.dims) * inner
    return flops, flops * _waste(inner, tile) * _passes(instruction, lhs)


def _waste(size: int, tile: int) -> float:
    return -(-size // tile) * tile / size


def _passes(instruction: Instruction, operand: Shape) -> int:
    if operand.dtype != "f32":
        return 1
    precision = instruction.attribute(r"operand_precision=\{(\w+)") or "default"
    return PASSES.get(precision, 1)


def _window(instruction: Instruction) -> dict[str, list[int]]:
    """A convolution's window: stride, padding before, dilations, one entry for each axis."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=") for part in text.split())
    count = len(fields["size"].split("x")) if "size" in fields else 0

    def numbers(name: str, default: str) -> list[int]:
        text = fields.get(name, "x".join([default] * count))
        return [int(part.split("_")[0]) for part in text.split("x") if part]

    names = ("stride", "lhs_dilate", "rhs_dilate")
    return {name: numbers(name, "1") for name in names} | {"pad": numbers("pad", "0_0")}


# Products of [queries, keys, head size] in attention's kernels, by their names.
KERNELS = (("mha_fwd", 2), ("mha_dq", 3), ("mha_dkv", 4))


def kernel_flops(
    instruction: Instruction, computation: Computation, tile: int
) -> tuple[float, float]:
    """Operations of one of attention's Pallas kernels, which XLA cannot look into."""
    if instruction.attribute(r'custom_call_target="([^"]*)"') != "tpu_custom_call":
        return 0.0, 0.0
    products = next((n for name, n in KERNELS if name in instruction.name), 0)
    if not products:
        return 0.0, 0.0
    if products == 4 and sum(len(shape.dims) > 2 for shape in instruction.shapes) == 3:
        products = 5  # the gradient of the queries too
    arrays = [computation[name].shapes[0] for name in instruction.operands]
    q, k = [array for array in arrays if len(array.dims) == 3 and array.dtype in ("bf16", "f32")][
        :2
    ]
    head_dim = min(q.dims[1:])  # stored [.., N, d] or [.., d, N], and N is not less than d
    keys = math.prod(k.dims) // k.dims[0] // head_dim
    flops = 2.0 * products * math.prod(q.dims) * keys
    return flops, flops * _waste(head_dim, tile)


def _read_in_parts(fused: Computation) -> Iterator[int | None]:
    """Of each parameter of a fusion, the bytes that are read where only slices of it are."""
    parameters = sorted(
        (i for i in fused.values() if i.opcode == "parameter"), key=lambda i: int(i.literal or 0)
    )
    for parameter in parameters:
        users = [i for i in fused.values() if parameter.name in i.operands]
        sliced = [i for i in users if i.opcode in ("dynamic-slice", "slice", "gather")]
        in_place = [
            i
            for i in users
            if i.opcode == "dynamic-update-slice" and i.operands[0] == parameter.name
        ]
        if users and len(sliced) + len(in_place) == len(users):
            yield sum(i.shapes[0].size for i in sliced)
        else:
            yield None


def _updated_in_place(fused: Computation) -> int | None:
    """Bytes that a fusion writes where its result is a part put into an array; else None."""
    root = list(fused.values())[-1]
    if root.opcode != "dynamic-update-slice":
        return None
    return fused[root.operands[1]].shapes[0].size
