"""A model on paper: the sizes of its weights and what its activations take, without one weight being allocated.

Both come from the model's own code, run on the meta device.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from allo_fast.config import Config, UserError, first_line
from allo_fast.model.loading import check_there, llama_config
from allo_kernels import memory

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
    """A model on paper; bytes are per token.

    layer_bytes: what autograd saves in a layer; others_bytes: outside the layers. forward_bytes: the most that a
    forward pass without gradients holds at once. cache_bytes: keys and values of all layers; cache_bound: whether the
    model keeps less than that. largest: entries of the largest weight that is neither looked up nor the head.
    """

    layers: int
    hidden: int
    layer_bytes: int
    others_bytes: int
    forward_bytes: int = 0
    cache_bytes: int = 0
    cache_bound: bool = False
    vocabulary: int = 0
    largest: int = 0


def model_config(config: Config, path: str | None = None) -> PretrainedConfig:
    """Of the job's model, or from `path`: a folder, hub id or config.json. Raises UserError where there is none."""
    if path is None and config.model.name_or_path is None:
        return llama_config(config.pretrain)
    check_there(path := path or config.model.name_or_path)
    try:
        pretrained = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _on_meta(pretrained, config.model.dtype)
    except Exception as error:  # whatever it is: transformers computes with the file's values as it reads them
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
        forward_bytes = _forward_bytes(config, dtype)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        why = first_line(error)
        raise UserError(
            f"{config.model_type} in {dtype}: its activations cannot be estimated on paper: {why}"
        ) from None
    return Shape(
        weights.sizes,
        weights.recomputed,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        layer_bytes=two - one,
        others_bytes=2 * one - two,
        forward_bytes=forward_bytes,
        cache_bytes=BYTES[dtype] * text.num_hidden_layers * _cached_entries(text),
        cache_bound=_keeps_less(text),
        vocabulary=text.vocab_size,
        largest=_largest(_on_meta(config, dtype)),
    )


def _largest(model: nn.Module) -> int:
    """Entries of the largest weight but embedding and head, of which a gradient is made row by row where asked for."""
    apart = {
        id(weight)
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
        for weight in part.parameters()
    }
    return max((weight.numel() for weight in model.parameters() if id(weight) not in apart), default=0)


def _cached_entries(text: PretrainedConfig) -> int:
    """Of a token's key and value in one layer, at most."""
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int) or not heads:
        return 2 * text.hidden_size
    compressed = getattr(text, "qk_nope_head_dim", 0)  # of latent attention, which expands them for every head
    if isinstance(compressed, int) and compressed:
        return heads * (compressed + text.qk_rope_head_dim + text.v_head_dim)
    groups = getattr(text, "num_key_value_heads", None)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (groups if isinstance(groups, int) else heads) * width


def _keeps_less(text: PretrainedConfig) -> bool:
    """Whether some layers slide, recur or compress, or have no attention heads at all."""
    kinds = set(getattr(text, "layer_types", None) or ())
    compressed = getattr(text, "kv_lora_rank", None) or getattr(text, "sliding_window", None)
    return bool(kinds - {"full_attention"} or compressed) or not getattr(text, "num_attention_heads", None)


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


def _with_layers(config: PretrainedConfig, dtype: str, layers: int) -> nn.Module:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return _on_meta(config, dtype)


def _probe(model: nn.Module) -> None:
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device="meta")
    mask = torch.ones(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, dtype=torch.bool, device="meta")
    model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def _is_scores(tensor: torch.Tensor) -> bool:
    """Attention scores exist only where the meta device has no fused attention."""
    return tensor.shape[-2:] == (_PROBE_TOKENS, _PROBE_TOKENS)


def _saved_bytes(config: PretrainedConfig, dtype: str, layers: int) -> int:
    """Bytes per token that a forward pass of this many layers keeps for its backward pass."""
    model, total, counted = _with_layers(config, dtype, layers), 0, set()
    weights = {id(weight) for weight in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        owner = tensor if tensor._base is None else tensor._base  # weights are there anyway
        if id(owner) not in weights and id(owner) not in counted and not _is_scores(tensor):
            counted.add(id(owner))
            owners.append(owner)  # alive, so that no other takes its id
            total += tensor.nbytes
        return tensor

    owners: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _probe(model)
    return total // _PROBE_TOKENS


def _forward_bytes(config: PretrainedConfig, dtype: str) -> int:
    """Bytes per token that a forward pass holds at once, at most; layers come one after another."""
    model = _with_layers(config, dtype, 1)
    with torch.no_grad(), memory.Live(lambda tensor: not _is_scores(tensor)) as live:
        _probe(model)
    return live.most // _PROBE_TOKENS
