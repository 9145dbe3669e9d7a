"""Loading, saving and naming models: any AutoModelForCausalLM, from a local folder or the hub."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from allo_fast.config import ModelConfig, UserError


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name}: {str(error).splitlines()[0]}") from None


def load_model(path: str | Path, config: ModelConfig, dtype: str | None = None) -> PreTrainedModel:
    """A causal language model on the configured device, without dropout, in `dtype` (default: the configured one).

    Dropout is off because policy and reference must agree at step 0. Raises UserError where there is no such model.
    """
    device = pick_device(config.device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype or config.dtype), attn_implementation=config.attn_implementation
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: not a model that can be loaded: {str(error).splitlines()[0]}") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.to(device).train(config.gradient_checkpointing)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer that can be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A normal Hugging Face folder: config, safetensors, generation config, tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight once, tied ones under their first name, sorted by name so that no order depends on the model's."""
    return dict(sorted(model.named_parameters()))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in named_weights(model).items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(as_bytes(weight))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file as a normal Hugging Face folder with dense float32 weights. Needs `pip install allo-fast[gguf]`."""
    from transformers import GgufConfig

    if not source.is_file():
        raise UserError(f"{source}: no such file")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    save_model(model, tokenizer, folder)
