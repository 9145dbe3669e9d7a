"""Where a model is computed, and in which dtype."""

import torch

from allo_fast.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name}: {first_line(error)}") from None


def best_dtype(name: str) -> str:
    """bfloat16 where the device of that name has matrix units for it, else float32; of one that is not there, too."""
    if name in ("auto", "cuda") or name.startswith("cuda:"):
        if torch.cuda.is_available():
            return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    return "bfloat16" if name in ("auto", "cpu") and torch.cpu._is_amx_tile_supported() else "float32"
