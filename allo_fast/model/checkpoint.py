"""What a model's folder or hub id holds, looked at before a single weight is loaded."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from allo_fast.errors import UserError, first_line, nearest, no_such
from allo_fast.model.weights import same_bits

_SHOWN = 3  # names in a message
_OLD_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")  # of GPT-J, GPT-Neo, CodeGen
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt", "model.pt")


def is_hub_id(path: str | Path) -> bool:
    """Whether transformers would ask the hub for it; not where it can only be a file or folder."""
    text = str(path)
    is_path = text.startswith((".", "/", "~")) or text.endswith(".json") or text.count("/") > 1
    return not is_path and not os.path.exists(path)


def check_there(path: str | Path) -> None:
    """Raises UserError for what can only be a file or folder, and is not there; transformers would ask the hub."""
    if not os.path.exists(path) and not is_hub_id(path):
        raise UserError(no_such(path, "file or folder"))


def check_model(path: str | Path, auto: type = AutoModelForCausalLM) -> None:
    """Raises UserError unless `path` holds a model, whole and dense, of the kind that `auto` makes.

    Reads configuration and headers alone: files are filled into a model that has shapes and no storage.
    """
    config = read_config(path, auto)
    files = weight_files(path, config)
    headers = [(file, name, tensor) for file in files for name, tensor in _headers(file).items()]
    _check_dense(path, {name: tensor for _, name, tensor in headers})
    _check_generation(path)
    model, info = _without_storage(path, config, {name: tensor for _, name, tensor in headers}, auto)
    check_names(path, model, info)
    _check_tied(path, model, {name: file for file, name, _ in headers})


def _headers(file: str) -> dict[str, Tensor]:
    """A file's tensors on the meta device. Raises UserError for a damaged file."""
    try:
        return load_state_dict(file, map_location="meta")
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{file}: weights that cannot be read: {first_line(error)}") from None


def _without_storage(
    path: str | Path, config: PreTrainedConfig, tensors: dict[str, Tensor], auto: type
) -> tuple[PreTrainedModel, dict]:
    """The model on the meta device, and what `from_pretrained` says with `output_loading_info`."""
    try:
        with quiet(), torch.device("meta"):
            model = auto.from_config(config)
        with quiet():
            return type(model).from_pretrained(
                None,
                config=model.config,
                generation_config=GenerationConfig(),
                state_dict=tensors,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever it is: a configuration that no model, or not these weights', can have
        why = f"{type(error).__name__}: {first_line(error.__cause__ or error)}"
        raise UserError(f"{path}: no model can be made of its config.json and weights: {why}") from None


def read_config(path: str | Path, auto: type = AutoModelForCausalLM) -> PreTrainedConfig:
    """Raises UserError for what is no model, and by its name for one that is not dense, or not what `auto` makes: a
    causal language model, or with AutoModelForSequenceClassification a reward model."""
    check_there(path)
    if Path(path).is_file():
        hint = "; `allo-fast convert` makes a folder of it" if str(path).endswith(".gguf") else ""
        raise UserError(f"{path}: a file, where a model's folder or hub id was expected{hint}")
    if has_file(path, "adapter_config.json"):
        raise UserError(
            f"{path}: an adapter (adapter_config.json), not a model: merge it into its base, and name the folder of "
            "the merged model"
        )
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
        if not raw:
            raise UserError(f"{path}: no config.json, or an empty one")
        _check_dense_and_known(path, raw)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        name = _class_name(raw)
        if auto is AutoModelForCausalLM and (kind := _other_kind(config, name)):
            raise UserError(f"{path}: {name}: {kind}; allo-fast trains causal language models")
        classifies = name.endswith("ForSequenceClassification") and config.num_labels == 1
        if auto is not AutoModelForCausalLM and not (classifies and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
            raise UserError(f"{path}: {name}: not a reward model, a decoder that classifies sequences, with one label")
        return config
    except UserError:
        raise
    except Exception as error:  # whatever it is: transformers computes with the file's values as it reads them
        raise UserError(
            f"{path}: no model configuration that can be read: {first_line(error.__cause__ or error)}{nearest(path)}"
        ) from None


def _check_dense_and_known(path: str | Path, raw: dict) -> None:
    """Raises UserError for a config.json of quantized weights, or of a class that is no part of transformers."""
    text = raw.get("text_config") or {}
    entries = (raw.get("quantization_config"), text.get("quantization_config"), raw.get("compression_config"))
    for entry in (entry for entry in entries if entry is not None):
        method = isinstance(entry, dict) and entry.get("quant_method") or "quantization_config in config.json"
        raise UserError(
            f"{path}: quantized ({method}); allo-fast trains dense weights: name the model that it was quantized "
            "from, or a folder with its weights dequantized"
        )
    if raw.get("auto_map") and not hasattr(transformers, _class_name(raw)):
        raise UserError(
            f"{path}: {_class_name(raw)}: needs code of its own (auto_map in config.json), which allo-fast does not run"
        )


def _other_kind(config: PreTrainedConfig, name: str) -> str | None:
    """What a model is, by its configuration and the name of its class, where that is no causal language model.

    The decoder alone of an encoder-decoder or masked model is one; classes that transformers does not know, and base
    models, are what their weights say.
    """
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder"
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
        return "a masked language model"
    classes = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_MAPPING_NAMES.values())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (hasattr(transformers, name) and name not in classes):
        return "not a causal language model"
    return None


def _class_name(raw: dict) -> str:
    """The class that a config.json names, else its model type."""
    return str((raw.get("architectures") or [raw.get("model_type") or "config.json without model_type"])[0])


def weight_files(path: str | Path, config: PreTrainedConfig) -> list[str]:
    """The safetensors files that `from_pretrained` reads. Raises UserError where there is none.

    Pickles are not opened: they are programs, of which reading the weights alone is a promise of the reader.
    """
    named = getattr(config, "transformers_weights", None)
    if not named and not any(has_file(path, name) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        if pickled := next((name for name in _PICKLES if has_file(path, name)), None):
            raise _refusal(path, pickled)
    try:
        files, _ = _get_resolved_checkpoint_files(
            pretrained_model_name_or_path=str(path),
            variant=None,
            gguf_file=None,
            use_safetensors=True,
            user_agent=None,
            is_remote_code=False,
            transformers_explicit_filename=named,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no weights that can be read: {first_line(error.__cause__ or error)}") from None
    for file in files:
        if not file.endswith(".safetensors"):
            raise _refusal(path, Path(file).name)
        if os.path.isdir(path) and not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(path)):
            raise UserError(f"{path}: its index names {file}, which is not in the folder")
    return files


def _refusal(path: str | Path, name: str) -> UserError:
    return UserError(
        f"{path}: {name}: not safetensors, and pickles, which may run code, are not opened; where you trust it, name "
        f"the folder NEW of AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW), and likewise of "
        "AutoTokenizer"
    )


def _check_generation(path: str | Path) -> None:
    """Raises UserError for a generation_config.json that cannot be read; transformers may pass over it."""
    if not has_file(path, GENERATION_CONFIG_NAME):
        return
    try:
        GenerationConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {GENERATION_CONFIG_NAME} that cannot be read: {first_line(error)}") from None


def _check_dense(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError for matrices of one byte a weight, and whole numbers: codes, that a cast would take for values.

    Such a bool or uint8 with four dimensions is the attention mask that files of older versions hold.
    """
    for name, tensor in tensors.items():
        codes = tensor.ndim in (2, 3) and tensor.dtype.itemsize == 1
        if codes or not tensor.dtype.is_floating_point and name.endswith("weight"):
            raise UserError(f"{path}: {name} is quantized ({tensor.dtype}), and config.json does not say how")


def check_names(path: str | Path, model: PreTrainedModel, info: dict) -> None:
    """Raises UserError where weights of the model are not in its files, or the files' not in the model.

    info: what `from_pretrained` says with `output_loading_info`. Files of older versions hold buffers that are computed
    today; they do no harm.
    """
    computed = [name for name, _ in model.named_non_persistent_buffers()]
    unexpected = {key for key in info["unexpected_keys"] if not _OLD_MASK.search(key)}
    unexpected = {key for key in unexpected if not any(_same_name(key, name) for name in computed)}
    shapes = {f"{name} {tuple(saved)} for {tuple(expected)}" for name, saved, expected in info["mismatched_keys"]}
    faults = {"missing": info["missing_keys"], "unknown to it": unexpected, "of another shape": shapes}
    parts = [f"{kind}: {_some(names)}" for kind, names in faults.items() if names]
    if parts:
        raise UserError(f"{path}: its weights are not those of {type(model).__name__}; {'; '.join(parts)}")


def _same_name(key: str, name: str) -> bool:
    """Whether a file's name is a model's, with the prefix of the base model or without."""
    return key == name or key.endswith("." + name) or name.endswith("." + key)


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _check_tied(path: str | Path, model: PreTrainedModel, files: dict[str, str]) -> None:
    """Raises UserError where weights that the configuration ties lie in the files with different values.

    One process would train both, ZeRO-3 the one that was read last, and other tools take either.
    """
    for tied, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if tied in files and source in files and not same_bits(*(read(files[name], name) for name in (tied, source))):
            raise UserError(
                f"{path}: {tied} and {source} differ, and config.json says that they are one (tie_word_embeddings)"
            )


def read(file: str, name: str) -> Tensor:
    """One tensor of a file of weights."""
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def has_file(path: str | Path, name: str) -> bool:
    """Of a hub id: in the cache, into which it is taken."""
    file = cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return file is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers warns of nothing: what it would say of names is said by `check_names`."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
