"""Per-token log-probabilities of the responses in a batch, from any causal language model."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from allo_fast.config import UserError
from allo_fast.data.batch import Batch, Corpus, attention_mask, collate
from allo_kernels import Positions, token_logps

logger = logging.getLogger(__name__)


@dataclass
class ResponseLogps:
    """Calling it on a batch gives [R, L] fp32 log-probabilities, zero where a response has no token.

    The decoder runs on whole rows; the head only at positions that predict a response token. `share_prompts` says how
    to collate: whether this model's attention can keep the responses of one row apart. Found out once, by trying.
    head_entries: of the head's weight, the values that train and their positions, or None where all or none do.
    """

    model: PreTrainedModel
    head_entries: Callable[[Tensor], tuple[Tensor, Positions] | None] = lambda weight: None

    def __post_init__(self):
        config = self.model.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.temperature = getattr(config, "logits_scaling", None) or 1 / (getattr(config, "logit_scale", None) or 1)
        self.additive_mask = config._attn_implementation == "eager"
        reason = _why_separate(self.model, self)
        self.share_prompts = reason is None
        if reason:
            logger.warning("one response per row, prompts repeated: %s", reason)
        self._check_head()

    def __call__(self, batch: Batch) -> Tensor:
        hidden = self.hidden(batch)
        head = self.model.get_output_embeddings()
        picked = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.sources)
        weight, bias, values, positions = head.weight, head.bias, None, None
        if torch.is_grad_enabled() and (found := self.head_entries(head._parameters.get("weight"))):
            weight, (values, positions) = head._parameters["weight"], found
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # a custom Function's backward would not know
            dtype = torch.get_autocast_dtype(device)
            picked, weight, bias = (None if given is None else given.to(dtype) for given in (picked, weight, bias))
        settings = {"bias": bias, "softcap": self.softcap, "temperature": self.temperature}
        flat = token_logps(picked, weight, batch.targets, values=values, positions=positions, **settings)
        return batch.layout(flat)

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
        """The head must be what token_logps computes: linear, soft cap, scale."""
        batch = _probe([2, 3], share=False).to(self.model.device)
        with_head = self.model(input_ids=batch.input_ids, use_cache=False).logits.float().log_softmax(-1)
        expected = with_head.view(-1, with_head.shape[-1])[batch.sources, batch.targets]
        error = (batch.layout(expected) - self(batch)).abs().max()
        if error > 0.05 * with_head.std():
            raise UserError(f"{type(self.model).__name__}: its head is not linear, at most soft-capped and scaled")


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
