"""Per-token log-probabilities of the responses in a batch, from any causal language model."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.data.batch import Batch, Corpus, attention_mask, collate
from allo_kernels import Positions, token_logps

logger = logging.getLogger(__name__)


class ResponseLogps(nn.Module):
    """Calling it on a batch gives [R, L] fp32 log-probabilities, zero where a response has no token.

    The decoder runs on whole rows; the head only at positions that predict a response token.
    head_entries: of the head's weight, the values that train and their positions, or None where all or none do.
    """

    def __init__(self, model: PreTrainedModel, head_entries: "HeadEntries" = lambda weight: None):
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        temperature = getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1)
        self.head = _Head(model.get_output_embeddings(), softcap, temperature, head_entries)
        self.additive_mask = config._attn_implementation == "eager"
        for module in model.modules():
            module.register_forward_pre_hook(_pass_through)
        if not any(hasattr(weight, "ds_id") for weight in model.parameters()):
            _ = self.share_prompts  # a sharded model can be tried only once DeepSpeed runs it

    @cached_property
    def share_prompts(self) -> bool:
        """How to collate: whether this model's attention can keep the responses of one row apart; found by trying.

        Raises UserError when the model's head is not what token_logps computes.
        """
        self._check_head()
        reason = _why_separate(self.model, self)
        if reason:
            logger.warning("one response per row, prompts repeated: %s", reason)
        return reason is None

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.hidden(batch)
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.sources)
        return batch.layout(self.head(picked, batch.targets))

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, D]."""
        if int(batch.segment_ids.max()) <= 1:  # nothing shares a row: the model's own causal mask will do
            inputs = {"attention_mask": (batch.segment_ids >= 0).long()}
        else:
            mask = attention_mask(batch, self.model.dtype if self.additive_mask else None)
            inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
        return self.model.base_model(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head must be linear, with at most a soft cap and a scale."""
        batch = _probe([2, 3], share=False).to(self.model.device)
        with_head = self.model(input_ids=batch.input_ids, use_cache=False).logits.float().log_softmax(-1)
        expected = with_head.view(-1, with_head.shape[-1])[batch.sources, batch.targets]
        error = (batch.layout(expected) - self(batch)).abs().max()
        if error > 0.05 * with_head.std():
            raise UserError(f"{type(self.model).__name__}: its head is not linear, at most soft-capped and scaled")


class _Head(nn.Module):
    """The model's head for given targets: hidden [N, D], targets [N] -> log-probabilities [N] fp32.

    A module of its own, holding the head's own parameters, so that ZeRO-3 gathers them around it.
    """

    def __init__(self, source: nn.Module, softcap: float | None, temperature: float, entries: "HeadEntries"):
        super().__init__()
        self.settings, self.entries = {"softcap": softcap, "temperature": temperature}, entries
        self._parameters.update(source._parameters)
        self._read = (source,)  # in a tuple: not a child, whose parameters would count twice

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        (source,) = self._read
        found = self.entries(source._parameters.get("weight"))
        weight, values, positions = found or (source.weight, None, None)
        bias, device = source.bias, hidden.device.type
        if torch.is_autocast_enabled(device):  # a custom Function's backward would not know
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = (None if given is None else given.to(dtype) for given in (hidden, weight, bias))
        return token_logps(hidden, weight, targets, bias=bias, values=values, positions=positions, **self.settings)


def _pass_through(module: nn.Module, inputs: tuple) -> tuple:
    """A node of its own for each input, as ZeRO-3 makes: what a tensor gets from several readers then adds up in the
    same order however the model is sharded, and the gradient is the same to the last bit."""
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


# For the head's weight: what to multiply by, the values that train, and where they lie in it.
HeadEntries = Callable[[Tensor], tuple[Tensor, Tensor, Positions] | None]


def _probe(second: list[int], share: bool = True) -> Batch:
    corpus = Corpus()
    corpus.examples = [tuple(corpus.add([1, 2, 3], [[4, 5, 6], [*second, 7]]))]
    return collate(corpus, corpus.examples, share_prompts=share)


@torch.no_grad()
def _why_separate(model: PreTrainedModel, logps: ResponseLogps) -> str | None:
    """Why responses of this model cannot share a row; None when they can."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} takes no mask of responses"
    layers = getattr(config, "layer_types", None)
    partial = set(layers) != {"full_attention"} if layers else getattr(config, "sliding_window", None)
    if partial:
        return f"{name} has layers that do not attend to everything"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no position_ids"
    batch = _probe([2, 3]).to(model.device)
    first, second = batch.segment_ids == 1, batch.segment_ids == 2
    before = logps.hidden(batch)
    moved = batch.position_ids + second
    other = torch.where(first, batch.input_ids + 1, batch.input_ids)
    # Masked-out tokens weigh exactly zero, so the second response must not change in a single bit.
    if not torch.equal(before[second], logps.hidden(replace(batch, input_ids=other))[second]):
        return f"responses in one row of {name} can change each other"
    if torch.equal(before[second], logps.hidden(replace(batch, position_ids=moved))[second]):
        return f"{name} ignores position_ids"
    return None
