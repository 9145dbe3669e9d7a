"""Per-token log-probabilities of the responses in a batch, from any causal language model."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from allo_fast import ranks
from allo_fast.config import UserError
from allo_fast.data.batch import Batch, Layout, attention_mask
from allo_fast.model import attention
from allo_fast.model.probe import Findings, decoder_of, examine, growing_embeddings
from allo_fast.model.weights import is_sharded
from allo_kernels import Positions, head_row_gradient, head_torch, token_logps

logger = logging.getLogger(__name__)


class ResponseLogps(nn.Module):
    """Calling it on a batch gives [R, L] fp32 log-probabilities, zero where a response has no token.

    The decoder runs on whole rows; the head only at positions that predict a response token.
    head_entries: of the head's weight, the values that train and their positions, or None where all or none do.
    Raises UserError, naming the model's class, for a model that the engine cannot compute with.
    """

    def __init__(self, model: PreTrainedModel, head_entries: "HeadEntries" = lambda weight: None):
        super().__init__()
        self.model = model
        self._decoder = (decoder_of(model),)  # in a tuple: already a part of the model
        self.head = _Head(model, head_entries)
        self.packs = attention.install(model)
        self.additive_mask = model.config.get_text_config()._attn_implementation == "eager"
        for module in model.modules():
            _hook(module, _pass_through)
        forget_longer_rows(model)
        self.findings: Findings | None = None
        if is_sharded(model):
            return
        try:
            self.examine()
        except BaseException:
            self.release()
            raise

    @property
    def layout(self) -> Layout:
        """How to collate."""
        assert self.findings, "a sharded model is examined once DeepSpeed runs it"
        return self.findings.layout

    def release(self) -> None:
        """The model is as it was before this."""
        for module in self.model.modules():
            for key, function in list(module._forward_pre_hooks.items()):
                if function in (_pass_through, _begin_anew):
                    del module._forward_pre_hooks[key]
        attention.uninstall(self.model)

    def examine(self) -> None:
        """Finds by trial how the model is computed; a sharded one must be run by DeepSpeed, on all ranks together."""
        self.findings = findings = examine(self.model, self._in_one_pass, self.head, self.packs)
        self.head.settings = {"softcap": findings.softcap, "temperature": findings.temperature}
        for note in findings.notes:
            logger.warning(note)

    def forward(self, batch: Batch | None = None) -> Tensor | None:
        """Without a batch it examines the model, which DeepSpeed does where it runs this module itself."""
        if batch is None:
            return self.examine()
        hidden = self.hidden(batch)
        states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.sources)
        return batch.layout(self.head(states, batch.targets, batch.gradient_rows))

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, D]."""
        together = self.findings.together
        if together is None:
            return self._in_one_pass(batch)
        width = batch.input_ids.shape[1]
        passes = [batch] if width < together else _rows(batch)
        # A sharded model needs all ranks in every pass; the results of what is added are cut off again.
        pass_count = max(ranks.gather(len(passes))) if is_sharded(self.model) else len(passes)
        states = [self._in_one_pass(part)[:, :width] for part in passes + passes[:1] * (pass_count - len(passes))]
        return torch.cat([pad(part, (0, 0, 0, width - part.shape[1])) for part in states])[: len(batch.input_ids)]

    def _in_one_pass(self, batch: Batch) -> Tensor:
        if batch.packed:
            inputs = attention.inputs(batch, self.model)
        elif not batch.branches:  # nothing shares a row: the model's own causal mask will do
            inputs = {"attention_mask": (batch.segment_ids >= 0).long()}
        else:
            mask = attention_mask(batch, self.model.dtype if self.additive_mask else None)
            inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
        (decoder,) = self._decoder
        return decoder(input_ids=batch.input_ids, use_cache=False, **inputs).last_hidden_state


class HeadPass(NamedTuple):
    """What the head computed with: hidden [N, D] in its weight's dtype, targets [N], and lse fp32 [N] of its logits."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor


class _Head(nn.Module):
    """The model's head for given targets: hidden [N, D], targets [N] -> log-probabilities [N] fp32.

    gradient_rows: of how many its result gets a gradient that is not zero, at most; None: of all.
    A module of its own, holding the head's own parameters, so that ZeRO-3 gathers them around it.
    """

    def __init__(self, model: PreTrainedModel, entries: "HeadEntries"):
        super().__init__()
        source = model.get_output_embeddings()
        if not isinstance(source, nn.Linear):
            raise UserError(f"{type(model).__name__}: its head is not linear, it is {type(source).__name__}")
        self.entries, self.settings = entries, {"softcap": None, "temperature": 1.0}
        self.on_logps: Callable[[HeadPass, Tensor], Tensor] | None = None  # what becomes of the result, for who watches
        self._parameters.update(source._parameters)
        self._read = (source,)  # in a tuple: not a child, whose parameters would count twice

    def forward(self, hidden: Tensor, targets: Tensor, gradient_rows: int | None = None) -> Tensor:
        (source,) = self._read
        weight, values, positions = self.entries(source._parameters.get("weight")) or (source.weight, None, None)
        bias, device = source.bias, hidden.device.type
        if torch.is_autocast_enabled(device):  # a custom Function's backward would not know
            dtype = torch.get_autocast_dtype(device)
            weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
        hidden = hidden.to(weight.dtype)  # models that add residuals up in float32 cast there too
        given = {"bias": bias, "values": values, "positions": positions, **self.settings}
        given |= {"target_rows": len(targets), "gradient_rows": gradient_rows or len(targets)}
        if self.on_logps is None:
            return token_logps(hidden, weight, targets, **given)
        logps, lse = token_logps(hidden, weight, targets, with_lse=True, **given)
        return self.on_logps(HeadPass(hidden.detach(), targets, lse), logps)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """fp32 [N, V] of hidden [N, D], by a weight and a bias as `copied` gives them."""
        return head_torch.logits_of(
            hidden, weight, bias, head_torch.Head(**self.settings, positions=None, kernels=head_torch)
        )[0]

    def copied(self) -> tuple[Tensor, Tensor | None]:
        """Inside `on_logps`, where ZeRO-3 has them: its weight and bias, as they are then."""
        (source,) = self._read
        weight, *_ = self.entries(source._parameters.get("weight")) or (source.weight,)
        return weight.detach().clone(), None if source.bias is None else source.bias.detach().clone()

    def row_gradient(self, given: HeadPass, upstream: Tensor, rows: slice) -> Tensor:
        """Of some rows of its weight, [rows, D] in the weight's dtype; upstream: that of its result, fp32 [N]."""
        (source,) = self._read
        weight, bias = source._parameters["weight"].detach(), source._parameters.get("bias")
        return head_row_gradient(
            given.hidden,
            weight,
            given.targets,
            given.lse,
            upstream,
            rows,
            bias=bias,
            gradient_rows=len(upstream),
            **self.settings,
        )


def _rows(batch: Batch) -> list[Batch]:
    """Each row as a batch of its own, without padding, as far as the decoder reads it; with the last token of its
    response, which predicts nothing but counts where the length of a row matters."""
    rows, width = [], batch.input_ids.shape[1]
    for row, length in enumerate((batch.segment_ids >= 0).sum(1).tolist()):
        last = batch.targets[batch.sources == row * width + length - 1]
        ids = torch.cat([batch.input_ids[row, :length], last])[None]
        rows.append(replace(batch, input_ids=ids, segment_ids=torch.zeros_like(ids)))
    return rows


def _hook(module: nn.Module, function: Callable) -> None:
    """Before its forward; once, however many policies a model has seen."""
    if function not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(function)


def forget_longer_rows(model: nn.Module) -> None:
    """From now on: dynamic NTK keeps the frequencies of the longest row that it has seen, until a short one comes."""
    for module in growing_embeddings(model):
        _hook(module, _begin_anew)


def _begin_anew(module: nn.Module, inputs: tuple) -> None:
    for name, frequencies in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", frequencies.clone())
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _pass_through(module: nn.Module, inputs: tuple) -> tuple:
    """A node of its own for each input, as ZeRO-3 makes: what a tensor gets from several readers then adds up in the
    same order however the model is sharded, and the gradient is the same to the last bit."""
    return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)


# For the head's weight: what to multiply by, the values that train, and where they lie in it.
HeadEntries = Callable[[Tensor], tuple[Tensor, Tensor, Positions] | None]
