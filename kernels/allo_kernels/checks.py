"""What operations ask of their arguments before anything is launched; every message names the argument."""

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")


def check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")


def check_scalar(name: str, value: float | Tensor, device: torch.device) -> None:
    """A Python number, or a 0-d tensor on `device`."""
    if isinstance(value, Tensor):
        check_shape(name, value, ())
        check_device(name, value, device)
