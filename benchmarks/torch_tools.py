"""What PyTorch's sides of the benchmarks share: the device, layouts, and the end of the work."""

from typing import Any

import numpy as np
import torch
from torch import nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepared(module: nn.Module, variant: str) -> nn.Module:
    module = module.to(DEVICE)
    return module.to(memory_format=torch.channels_last) if variant == "channels_last" else module


def from_nhwc(x: np.ndarray, variant: str) -> torch.Tensor:
    y = torch.tensor(x).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    return y.to(memory_format=torch.channels_last) if variant == "channels_last" else y


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).float().cpu().numpy()


def wait(outputs: Any) -> None:
    del outputs  # all that was started counts
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def facts() -> dict:
    if DEVICE.type == "cpu":
        return {"device": "cpu", "device_peak_mib": None}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"device": torch.cuda.get_device_name(), "device_peak_mib": peak}
