"""The weights of a model by name, whole or in ZeRO-3 shares, and what identifies them."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from allo_fast import ranks
from allo_fast.config import UserError

VALUES = "selected_values"  # the submodule by which a SparsePolicy shows its values to training loops


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight once, tied ones under their first name, sorted by name so that no order depends on the model's."""
    weights = ((name, weight) for name, weight in model.named_parameters() if not name.startswith(f"{VALUES}."))
    return dict(sorted(weights))


def size_of(weight: Tensor) -> int:
    """Its number of entries, also where ZeRO-3 leaves only a share of it here."""
    return getattr(weight, "ds_numel", weight.numel())


def held_here(weight: Tensor) -> Tensor:
    """What this rank keeps of a weight between steps."""
    return getattr(weight, "ds_tensor", weight)


def is_sharded(model: nn.Module) -> bool:
    """By ZeRO-3, so that only DeepSpeed can run it."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight once, whole, one at a time; every rank iterates together."""
    for name, weight in named_weights(model).items():
        with whole(weight):
            yield name, weight.data


def whole(*weights: nn.Parameter) -> AbstractContextManager:
    """Inside, all of the weights are here; every rank enters together. ZeRO-3 gathers and releases them, else they are.

    Not to be entered twice for the same weight.
    """
    if not hasattr(weights[0], "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(weights))


def divide(*weights: nn.Parameter) -> None:
    """Leaves each rank its ZeRO-3 share of whole weights; every rank calls it together."""
    import deepspeed

    deepspeed.zero.Init(module=nn.ParameterList(weights), mem_efficient_linear=False)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in whole_weights(model):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(as_bytes(weight))
    return digest.hexdigest()


def check_finite(model: nn.Module, path: object) -> None:
    """Raises UserError on every rank, naming the first weight at `path` that has a NaN or an infinity.

    Each rank looks at its share; every rank calls it together.
    """
    saved = model.state_dict().keys()
    tensors = named_weights(model) | {name: buffer for name, buffer in model.named_buffers() if name in saved}
    shares = {name: ranks.share(tensor)[1] for name, tensor in tensors.items() if tensor.is_floating_point()}
    extremes = {name: torch.stack(part.aminmax()).float() for name, part in shares.items() if part.numel()}
    finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist() if extremes else []
    damaged = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
    if on_any_rank := sorted({name for names in ranks.gather(damaged) for name in names}):
        more = f" (and {len(on_any_rank) - 1} more)" if len(on_any_rank) > 1 else ""
        raise UserError(f"{path}: {on_any_rank[0]}{more} holds NaN or infinity")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors on the CPU have one dtype, shape and content, NaN being equal to NaN and 0 not to -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(*(tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)))


def as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
