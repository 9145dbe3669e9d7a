"""Which implementation runs: decided once per operation, said once in the log."""

import functools
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("allo_kernels")


def choose(op: str, impl: str, implementations: Mapping[str, Callable], *, cuda: bool) -> Callable:
    """The implementation of `op` that `impl` ("auto", "triton" or "torch") names.

    `auto` is Triton on CUDA tensors where the operation has a Triton kernel, else PyTorch.
    Raises ValueError for any other name and NotImplementedError for a kernel that does not exist.
    """
    if impl == "auto":
        impl = "triton" if cuda and "triton" in implementations else "torch"
        _announce(op, impl)
    if impl not in ("triton", "torch"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'torch', got {impl!r}")
    if impl not in implementations:
        raise NotImplementedError(f"{op} has no Triton kernel yet; use impl='auto' or impl='torch'")
    return implementations[impl]


@functools.cache
def _announce(op: str, impl: str) -> None:
    logger.info("%s: %s", op, impl)
