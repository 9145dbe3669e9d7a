"""Loading, saving and naming models: any AutoModelForCausalLM, from a local folder or the hub."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from allo_fast import ranks
from allo_fast.config import ModelConfig, PretrainConfig, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model.weights import named_weights


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"model.device: {name}: {str(error).splitlines()[0]}") from None


def load_model(
    path: str | Path, config: ModelConfig, dtype: str | None = None, sharded: bool = False
) -> PreTrainedModel:
    """A causal language model on the configured device, without dropout, in `dtype` (default: the configured one).

    sharded: in ZeRO-3 shares, on the device never more than one weight whole. Dropout is off because policy and
    reference must agree at step 0. Raises UserError where there is no such model.
    """
    check_there(path)
    device, dtype = pick_device(config.device), dtype or config.dtype
    try:
        with _zero_init(dtype) if sharded else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), attn_implementation=config.attn_implementation
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


@contextmanager
def _zero_init(dtype: str) -> Iterator[None]:
    """Inside, transformers loads models as ZeRO-3 shards in `dtype`."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    held = HfDeepSpeedConfig(  # transformers keeps only a weak reference
        {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": dtype == "bfloat16"},
        }
    )
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del held


def check_there(path: str | Path) -> None:
    """Raises UserError for what can only be a file or folder, and is not there; transformers would ask the hub."""
    text = str(path)
    if (text.startswith((".", "/", "~")) or text.endswith(".json") or text.count("/") > 1) and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    check_there(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer that can be loaded: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """A normal Hugging Face folder: config, safetensors, generation config, tokenizer; rank 0 writes it.

    weights: what to save instead of the model's own weights, whole, one at a time; every rank iterates together.
    """
    state = None if weights is None else _state_dict(model, weights)
    if ranks.is_main():
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    ranks.barrier()


def _state_dict(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On rank 0 under every name that the model knows a weight by, on the CPU; elsewhere empty."""
    known = named_weights(model)
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    parameters = {name for tied in names.values() for name in tied}
    state = {name: held for name, held in model.state_dict().items() if name not in parameters}
    for name, weight in weights:
        if ranks.is_main():
            state |= dict.fromkeys(names[id(known[name])], weight.detach().cpu())
    return state


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file as a normal Hugging Face folder with dense float32 weights. Needs `pip install allo-fast[gguf]`."""
    from transformers import GgufConfig

    if not source.is_file():
        raise UserError(f"{source}: no such file")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
    save_model(model, tokenizer, folder)


def llama_config(settings: PretrainConfig) -> LlamaConfig:
    """Of the tiny model that a run which names none trains."""
    tokenizer = character_tokenizer()
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
