"""What operations ask of their arguments before anything is launched; every message names the argument."""

import math

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALARS = (*FLOATS, torch.float64, torch.int32, torch.int64)


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


def check_scalar(name: str, value: float | Tensor, device: torch.device, least: float = -math.inf) -> None:
    """A Python number, `least` or more, or a 0-d tensor on `device`, into which nobody looks."""
    if isinstance(value, Tensor):
        check_shape(name, value, ())
        check_dtype(name, value, *SCALARS)
        check_device(name, value, device)
    elif not least <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number{f' >= {least:g}' * (least > -math.inf)}, got {value}")


def check_positive(name: str, value: float) -> None:
    """A number that fp32 holds, and one over it too."""
    if not 2.0**-126 <= value <= 2.0**126:
        raise ValueError(f"{name}: expected a positive number that fp32 can hold, got {value}")


def check_not_capturing(what: str) -> None:
    """Raises RuntimeError while the current stream is captured into a CUDA graph; `what` waits for the host.

    On a CPU as well: what the host does during a capture is not done again by a replay.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} waits for the host: it cannot be captured in a CUDA graph")
