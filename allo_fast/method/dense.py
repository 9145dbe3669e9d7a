"""All weights of a model as a policy, for stages that train all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast.data.batch import Batch
from allo_fast.model.loading import say_what_is_not_trained
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint, held_here, size_of, whole_weights


class DensePolicy:
    """Trains every weight of `model`, which is float32: where a stage trains all of them.

    autocast: the dtype that matrix products run in; None for float32.
    """

    def __init__(self, model: PreTrainedModel, autocast: torch.dtype | None = None):
        self.model = model.requires_grad_(True)
        self.autocast = autocast
        self.parameters = sum(map(size_of, model.parameters()))
        say_what_is_not_trained(model)
        self.logps = ResponseLogps(model)

    def response_logps(self, batch: Batch) -> Tensor:
        """[R, L] fp32, differentiable in the model's weights."""
        enabled = self.autocast is not None
        with torch.autocast(self.model.device.type, self.autocast, enabled=enabled):
            return self.logps(batch)

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, one at a time; every rank iterates together."""
        return whole_weights(self.model)

    def state_bytes(self) -> dict[str, int]:
        weights = list(self.model.parameters())
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        return {"base": sum(held_here(w).nbytes for w in weights), "gradients": sum(g.nbytes for g in gradients)}
