"""A model on paper: the sizes of its weights and what its activations take, without one weight being allocated.

Both come from the model's own code, run on the meta device.
"""

import copy
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from allo_fast.config import Config, UserError, first_line
from allo_fast.model.loading import check_there, llama_config

BYTES = {"float32": 4, "bfloat16": 2}
_PROBE_TOKENS = 61  # a length that is no other dimension of a model


@dataclass(frozen=True)
class Weights:
    """A model's weights on paper."""

    sizes: tuple[int, ...]  # entries of each
    recomputed: tuple[bool, ...]  # whether activation checkpointing needs it once more

    @property
    def parameters(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Shape(Weights):
    """A model on paper. layer_bytes: what autograd saves per token and layer; others_bytes: outside the layers."""

    layers: int
    hidden: int
    layer_bytes: int
    others_bytes: int


def model_config(config: Config, path: str | None = None) -> PretrainedConfig:
    """Of the job's model, or from `path`: a folder, hub id or config.json. Raises UserError where there is none."""
    if path is None and config.model.name_or_path is None:
        return llama_config(config.pretrain)
    check_there(path := path or config.model.name_or_path)
    try:
        pretrained = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _on_meta(pretrained, config.model.dtype)
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        why = first_line(error.__cause__ or error)
        raise UserError(f"{path}: no model configuration that can be read: {why}") from None
    return pretrained


def weights_of(config: PretrainedConfig, dtype: str) -> Weights:
    """Without a single one being allocated."""
    model = _on_meta(config, dtype)
    recomputed = set()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            weights = list(layer.parameters())
            # Recomputation stops before the last matrix, and leaves it gathered for backward.
            last = [weight for weight in weights if weight.ndim > 1][-1]
            recomputed |= {id(weight) for weight in weights if weight is not last}
    weights = list(model.parameters())
    return Weights(tuple(w.numel() for w in weights), tuple(id(w) in recomputed for w in weights))


def shape_of(config: PretrainedConfig, dtype: str) -> Shape:
    """Without a single weight being allocated. Raises UserError for a model that cannot run on the meta device."""
    weights, text = weights_of(config, dtype), config.get_text_config()
    try:
        one, two = (_saved_bytes(config, dtype, layers) for layers in (1, 2))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        why = first_line(error)
        raise UserError(
            f"{config.model_type} in {dtype}: its activations cannot be estimated on paper: {why}"
        ) from None
    return Shape(weights.sizes, weights.recomputed, text.num_hidden_layers, text.hidden_size, two - one, 2 * one - two)


def empty_model(config: PretrainedConfig, dtype: str, attention: str | None = None) -> nn.Module:
    """The model on the meta device. Raises UserError for an implementation of attention that it does not have."""
    try:
        return _on_meta(copy.deepcopy(config), dtype, attention)  # which writes the attention into it
    except (ValueError, ImportError) as error:
        raise UserError(f"model.attn_implementation: {attention}: {first_line(error)}") from None


def _on_meta(config: PretrainedConfig, dtype: str, attention: str | None = None) -> nn.Module:
    settings = {"attn_implementation": attention} if attention else {}  # None would undo the configuration's own
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **settings)


def _saved_bytes(config: PretrainedConfig, dtype: str, layers: int) -> int:
    """Bytes per token that a forward pass of this many layers keeps for its backward pass."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model, total, counted = _on_meta(config, dtype), 0, set()
    weights = {id(weight) for weight in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        owner = tensor if tensor._base is None else tensor._base
        # Attention scores exist only where the meta device has no fused attention; weights are there anyway.
        scores = tensor.shape[-2:] == (_PROBE_TOKENS, _PROBE_TOKENS)
        if id(owner) not in weights and id(owner) not in counted and not scores:
            counted.add(id(owner))
            owners.append(owner)  # alive, so that no other takes its id
            total += tensor.nbytes
        return tensor

    owners: list[torch.Tensor] = []
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return total // _PROBE_TOKENS
