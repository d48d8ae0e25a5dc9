"""What our sides of the benchmarks share."""

import jax


def facts() -> dict:
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"device": device.device_kind, "device_peak_mib": peak and peak / 2**20}
