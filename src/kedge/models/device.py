"""Devices and dtypes by the names that users write."""

from __future__ import annotations

import torch

from kedge.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def device_named(name: str) -> torch.device:
    """Resolve a device's name: ``auto`` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device: {name!r} cannot be used here ({reason}); auto picks one") from None
    return device
