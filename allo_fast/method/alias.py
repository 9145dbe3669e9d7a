"""Weights read through an alias, so that a dense gradient lives only while its layer is in backward."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allo_fast.config import UserError
from allo_kernels import Positions, gather


def install_reads(
    module: nn.Module, names: Iterable[str], read: Callable, methods: Mapping[str, Callable] = {}
) -> None:
    """Whoever reads one of these weights as an attribute gets `read(weight)`; `_parameters` stays as it is.

    methods: others of the module to replace. A later call takes the place of an earlier one.
    """
    plain = getattr(type(module), "_without_aliases", type(module))
    reads = {name: property(lambda module, n=name: read(module._parameters[n]), refuse_weight) for name in names}
    attributes = {"_without_aliases": plain, "__module__": plain.__module__, **reads, **methods}
    module.__class__ = type(plain.__name__, (plain,), attributes) if reads or methods else plain


def refuse_weight(*_) -> None:
    raise UserError("SparsePolicy: its model was copied, or got another weight (as in FSDP), after the policy was made")


class Alias(torch.autograd.Function):
    """The weight itself, as a function of the values that already lie in it.

    take: gets the dense gradient, in the weight's dtype and only here, and returns that of the values; None where it
    has put that, or whatever it is after, elsewhere.
    """

    @staticmethod
    def forward(ctx, values, weight, take):
        ctx.take = take
        return weight.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.take(gradient), None, None


def gathered(at: Positions, gradient: Tensor) -> Tensor:
    """The selected entries of a dense gradient, fp32 [K]."""
    out = torch.empty(len(at), dtype=torch.float32, device=gradient.device)
    return gather(gradient.contiguous(), at, out=out)
