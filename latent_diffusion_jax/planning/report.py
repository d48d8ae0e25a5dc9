"""What the plan says: one program in words, several in a table."""

import collections
from collections.abc import Sequence
from typing import Any

from latent_diffusion_jax.planning.compiled import Compiled

GIB, GB = 2.0**30, 1e9
COLUMNS = (
    "topology", "program", "images/chip", "HBM GiB", "of", "step s", "images/s", "MFU", "bound",
    "FLOP/model", "largest/chip", "compile s",
)  # fmt: skip


def describe(name: str, found: Compiled) -> str:
    """A program on a topology, in some lines."""
    memory, chips = found.memory, found.slices.num_chips
    lines = [
        f"{found.program.name} on {name}: {chips} x {found.slices.chip.name}, "
        f"mesh {dict(found.program.mesh.shape)}, {found.program.images} images a call"
    ]
    parts = [f"{kind} {size / GIB:.2f}" for kind, size in memory.resident.items() if size]
    lines.append(
        f"  HBM of a chip: {', '.join(parts)}, temporaries {memory.temporaries / GIB:.2f}: "
        f"{memory.total / GIB:.2f} of {memory.available / GIB:.2f} GiB"
        f"{'' if memory.fits else ': DOES NOT FIT'}"
    )
    if memory.host:
        lines.append(f"  memory of the host: {memory.host / GIB:.2f} GiB for each chip")
    lines.append(f"  compiled in {found.seconds:.0f} s")
    cost = found.cost
    if cost is None:
        return "\n".join(lines)
    lines.append(
        f"  floating-point operations: {cost.flops * chips / 1e12:.2f} T compiled, "
        f"{found.model_flops / 1e12:.2f} T the model's own: {found.compiled_to_model:.3f}"
    )
    lines.append(f"  HBM traffic: {cost.bytes / GB:.2f} GB a chip")
    for row in collectives(found):
        lines.append(
            f"  {row['count']:.0f} x {row['kind']} over {row['chips']} chips, "
            f"{row['bytes'] / GB:.3f} GB in all{', while computing' if row['hidden'] else ''}: "
            f"{1e3 * row['seconds']:.1f} ms of links"
        )
    shares = ", ".join(f"{kind} {1e3 * s:.1f} ms" for kind, s in cost.bound.items())
    lines.append(
        f"  roofline: {1e3 * cost.seconds:.1f} ms ({shares}), "
        f"{found.images_per_second:.1f} images/s, {found.images_per_second / chips:.2f} a chip, "
        f"MFU {100 * found.mfu:.1f} %, bound by {bound(found)}"
    )
    return "\n".join(lines)


def bound(found: Compiled) -> str:
    """What takes most of the time."""
    assert found.cost is not None
    return max(found.cost.bound, key=lambda kind: found.cost.bound[kind])  # type: ignore


def collectives(found: Compiled) -> list[dict[str, Any]]:
    """The collectives of a call, those alike together, the longest first."""
    assert found.cost is not None
    rows: dict[tuple, dict[str, Any]] = {}
    for collective, times in found.cost.collectives:
        key = collective.kind, collective.hidden, len(collective.group)
        row = rows.setdefault(key, collections.defaultdict(float))
        row["kind"], row["hidden"], row["chips"] = key
        row["count"] += times
        row["bytes"] += times * collective.size
        row["seconds"] += times * collective.seconds(found.slices)
    return sorted((dict(row) for row in rows.values()), key=lambda row: -row["seconds"])


def as_row(name: str, found: Compiled, largest: int | None) -> dict[str, Any]:
    """A program's figures, as in `COLUMNS`, and what they are made of.

    Args:
      name: of the topology.
      found: the program.
      largest: batch that fits, of all chips; None where it was not looked for.
    """
    chips, memory = found.slices.num_chips, found.memory
    row: dict[str, Any] = {
        "topology": name,
        "program": found.program.name,
        "images/chip": found.program.images / chips,
        "HBM GiB": memory.total / GIB,
        "of": memory.available / GIB,
        "compile s": found.seconds,
        "largest/chip": None if largest is None else largest / chips,
        "fits": memory.fits,
        "memory": memory.resident | {"temporaries": memory.temporaries, "host": memory.host},
        "model_flops": found.model_flops,
    }
    if found.cost is not None:
        row |= {
            "step s": found.cost.seconds,
            "images/s": found.images_per_second,
            "MFU": found.mfu,
            "bound": bound(found),
            "FLOP/model": found.compiled_to_model,
            "flops": found.cost.flops * chips,
            "bytes": found.cost.bytes,
            "seconds_by_bound": found.cost.bound,
            "collectives": collectives(found),
        }
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of `COLUMNS` as a table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    formats = {
        "images/chip": "{:g}", "HBM GiB": "{:.2f}", "of": "{:.2f}", "step s": "{:.3f}",
        "images/s": "{:.1f}", "MFU": "{:.1%}", "FLOP/model": "{:.3f}", "largest/chip": "{:g}",
        "compile s": "{:.0f}",
    }  # fmt: skip
    for row in rows:
        cells = [
            "" if row.get(name) is None else formats.get(name, "{}").format(row[name])
            for name in COLUMNS
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
