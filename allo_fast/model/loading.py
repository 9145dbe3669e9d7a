"""Loading models: any AutoModelForCausalLM, from a local folder or the hub."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file

from allo_fast import ranks
from allo_fast.config import ModelConfig, PretrainConfig
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.device import pick_device
from allo_fast.errors import UserError, first_line, no_such
from allo_fast.model.checkpoint import (
    check_model,
    check_names,
    check_there,
    has_file,
    is_hub_id,
    quiet,
    read_config,
    weight_files,
)
from allo_fast.model.saving import check_new, save_model
from allo_fast.model.weights import check_finite

logger = logging.getLogger(__name__)

# Beside the weights, what a model is made of: notes, logs and another trainer's states do not count.
_SMALL = ("config.json", "generation_config.json", "*token*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_SMALL += ("tekken*.json", "chat_template*", "additional_chat_templates/*", "*.safetensors.index.json")
_OPTIONAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_OPTIONAL += ("added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json")
_OPTIONAL += ("chat_template.jinja",)


def load_model(
    path: str | Path,
    config: ModelConfig,
    dtype: str | None = None,
    sharded: bool = False,
    auto: type = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A model on the configured device, without dropout, in `dtype` (default: the configured one).

    sharded: in ZeRO-3 shares, on the device never more than one weight whole. auto: of which kind it is; a causal
    language model, or AutoModelForSequenceClassification. Dropout is off because policy and reference must agree at
    step 0. Every rank calls it together. Raises UserError where there is no such model, or its weights are not whole,
    dense and finite.
    """
    ranks.on_main(lambda: check_model(path, auto))
    device, dtype = pick_device(config.device), dtype or config.dtype
    try:
        with _zero_init(dtype) if sharded else nullcontext():
            model = auto.from_pretrained(
                folder_of(path, auto),
                dtype=getattr(torch, dtype),
                attn_implementation=config.attn_implementation,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: not a model that can be loaded: {first_line(error)}") from None
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)
    if config.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model.to(device).eval()
    if device.type == "cpu" and not sharded:
        for tensor in model.state_dict().values():  # once written, it is not the file's page, which changes with that
            tensor.copy_(tensor.clone())
    for module in model.modules():  # only what checks this before it recomputes: routers in training add noise
        module.training = getattr(module, "gradient_checkpointing", False)
    check_finite(model, path)
    return model


@contextmanager
def _zero_init(dtype: str) -> Iterator[None]:
    """Inside, transformers loads models as ZeRO-3 shards in `dtype`."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    config = HfDeepSpeedConfig(  # transformers keeps only a weak reference
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
        del config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none."""
    check_there(path)
    return _tokenizer(path, folder_of(path))


def _tokenizer(path: str | Path, folder: str | Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever it is: transformers computes with the files' values as it reads them
        known = {"trust_remote_code": "it needs code of its own, which is not run"}
        known["instantiate the backend tokenizer"] = "its files are missing or say too little"
        said = next((ours for theirs, ours in known.items() if theirs in str(error)), first_line(error))
        raise UserError(f"{path}: no tokenizer that can be loaded: {said}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_files(path: str | Path, auto: type = AutoModelForCausalLM) -> dict[str, Path]:
    """What a model is made of, by its name in the folder; of a hub id, in the cache; none where no folder is.

    Raises UserError for a hub id that cannot be had.
    """
    folder = folder_of(path, auto)
    found = [file for file in folder.iterdir() if file.exists()] if folder.is_dir() else []
    state = frozenset((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in found)
    return {name: folder / name for name in _model_files(folder, auto, state)}


@cache
def _model_files(folder: Path, auto: type, state: frozenset) -> list[str]:
    """state: of what lies in the folder, with which the answer may change."""
    try:
        weights = weight_files(folder, read_config(folder, auto))
    except UserError:  # of what is no model: it will be refused
        weights = folder.glob("*.safetensors")
    small = (file for pattern in _SMALL for file in folder.glob(pattern))
    return sorted({os.path.relpath(file, folder) for file in (*weights, *small) if os.path.isfile(file)})


def folder_of(path: str | Path, auto: type = AutoModelForCausalLM) -> Path:
    """Of a hub id, the folder in the cache with all that is read of the model. Raises UserError.

    As long as the process lasts it is the same: the hub may get other weights while a stage works.
    """
    return _cached(str(path), auto) if is_hub_id(path) else Path(path)


@cache
def _cached(hub_id: str, auto: type) -> Path:
    weight_files(hub_id, read_config(hub_id, auto))
    for name in _OPTIONAL:
        has_file(hub_id, name)
    with suppress(UserError):  # of some it has files of other names; a reference needs none
        _tokenizer(hub_id, hub_id)
    return Path(cached_file(hub_id, CONFIG_NAME)).parent


def convert_gguf(source: Path, folder: Path) -> None:
    """A GGUF file as a normal Hugging Face folder with dense float32 weights. Needs `pip install allo-fast[gguf]`.

    Raises UserError for a file that holds no whole causal language model, and a folder that holds something.
    """
    from transformers import GgufConfig

    if not source.is_file():
        raise UserError(no_such(source))
    check_new(folder)
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name, "trust_remote_code": False}
    dense = GgufConfig(dequantize=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where)
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=dense, output_loading_info=True
            )
    except Exception as error:  # whatever it is: transformers and tokenizers compute with the file's values
        raise UserError(f"{source}: not a GGUF file that can be read: {first_line(error)}") from None
    check_names(source, model, info)
    check_finite(model, source)
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


def say_what_is_not_trained(model: PreTrainedModel) -> None:
    """Warns, once a process, where the model's configuration has a loss that balances experts: objectives have none."""
    settings = model.config.get_text_config().to_dict()
    nested = [value for value in settings.values() if isinstance(value, dict)]
    items = [(str(name), value) for section in (settings, *nested) for name, value in section.items()]
    if any(isinstance(value, float) and value and ("aux_loss" in name or "moe_loss" in name) for name, value in items):
        _say_once(f"{type(model).__name__}: its router's auxiliary loss is not trained")


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)
