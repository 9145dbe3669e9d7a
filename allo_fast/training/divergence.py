"""How far a sparse policy is from where it began: KL divergence of what it says next, over the whole vocabulary."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from allo_fast.data.batch import Batch
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.logps import HeadPass

_LOGITS = 1 << 24  # numbers of a block of tokens' logits, by each of both


@torch.no_grad()
def logps_and_kl(policy: SparsePolicy, compute: Callable[[Batch], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the batch's responses, as `compute` gives them, and for each of their tokens KL(policy ||
    reference) of the whole distribution that it was one of, in nats: both fp32 [R, L], zero where there is no token.

    compute: the policy's `response_logps`, of all ranks together where it is sharded.
    """
    head, found = policy.logps.head, []

    def keep(given: HeadPass, logps: Tensor) -> Tensor:
        found.append((given.hidden, *head.copied()))
        return logps

    with policy.reference(), _watched(head, keep):
        compute(batch)
    with _watched(head, keep):
        logps = compute(batch)
    reference, own = found
    rows = max(1, _LOGITS // len(own[1]))
    parts = []
    for first in range(0, len(own[0]), rows):
        p, q = (head.logits(hidden[first : first + rows], *more).log_softmax(1) for hidden, *more in (own, reference))
        parts.append(kl_div(q, p, reduction="none", log_target=True).sum(1))
    return logps, batch.layout(torch.cat(parts))


@contextmanager
def _watched(head, on_logps: Callable[[HeadPass, Tensor], Tensor]) -> Iterator[None]:
    head.on_logps = on_logps
    try:
        yield
    finally:
        head.on_logps = None
