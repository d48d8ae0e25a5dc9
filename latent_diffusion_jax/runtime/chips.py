"""What accelerators can do, from their makers' public data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      name: as in topologies, `v5e`.
      flops: bfloat16 operations a second at its peak, dense.
      memory: bytes of HBM that a program may use.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second and direction of one link to a neighbour; 0 where unknown.
      link_axes: axes of the torus that the links make.
      host_bandwidth: bytes a second to another slice, over the data centre's network.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float = 0.0
    link_axes: int = 0
    host_bandwidth: float = 0.0


GIB = 2.0**30

# By JAX's `device_kind`. The memory of TPUs is what their compiler lets programs have.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 30.75 * GIB, 1.228e12, 4.5e10, 3, 6.25e9),
    "TPU v5 lite": Chip("v5e", 197e12, 15.75 * GIB, 0.819e12, 4.5e10, 2, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95.73 * GIB, 2.765e12, 9e10, 3, 6.25e9),
    "TPU v6 lite": Chip("v6e", 918e12, 31.24 * GIB, 1.64e12, 9e10, 2, 12.5e9),
    "NVIDIA A100-SXM4-40GB": Chip("A100", 312e12, 40e9, 1.555e12),
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12, 80e9, 2.039e12),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 80e9, 3.35e12),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4.8e12),
    "NVIDIA L4": Chip("L4", 121e12, 24e9, 0.3e12),
    "Tesla T4": Chip("T4", 65e12, 16e9, 0.32e12),
}


def find_chip(device_kind: str) -> Chip | None:
    """The data of a device's kind; None where there are none, as of CPUs."""
    return CHIPS.get(device_kind)
