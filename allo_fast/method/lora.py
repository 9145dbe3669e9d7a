"""LoRA through PEFT: the rival in memory, low-rank adapters beside a frozen base (arXiv 2106.09685)."""

import re

import torch
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.config_train import LoraSettings
from allo_fast.method.dense import DensePolicy
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint


def require() -> None:
    """Raises UserError where PEFT is not installed."""
    try:
        import peft  # noqa: F401  whether it is there
    except ImportError:
        raise UserError("warmup.lora: PEFT is not installed: pip install peft") from None


class LoraPolicy(DensePolicy):
    """Trains float32 adapters of `model`'s layers; the base lies frozen beside them, in its own dtype, and is the
    policy until the first step. Raises UserError where PEFT is not installed or knows none of the layers."""

    autocast = None  # the adapters' products run in float32, the base's in its dtype

    def __init__(self, model: PreTrainedModel, settings: LoraSettings):
        require()
        import peft

        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.base = fingerprint(model)
        given = {"r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": settings.target_modules}
        try:
            self.adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
        except (ValueError, re.error) as error:
            raise UserError(f"warmup.lora: {error}") from None
        self.model = model
        self.logps = ResponseLogps(model)

    def fingerprint(self) -> str:
        """Of the base, which the policy is before its first step."""
        return self.base

    @torch.no_grad()
    def merge(self) -> None:
        """Into the weights, in float32; then there are no adapters more."""
        self.adapted.float().merge_and_unload()

    def state_bytes(self) -> dict[str, int]:
        weights = [*self.model.parameters()]
        trained = [weight for weight in weights if weight.requires_grad]
        gradients = [weight.grad for weight in trained if weight.grad is not None]
        return {
            "base": sum(w.nbytes for w in weights if not w.requires_grad),
            "values": sum(w.nbytes for w in trained),
            "gradients": sum(g.nbytes for g in gradients),
        }
