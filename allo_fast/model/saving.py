"""Saving a model, and reading back what was saved."""

import logging
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from allo_fast import ranks
from allo_fast.config import UserError, first_line
from allo_fast.durable import appearing, as_any_file, check_room, make_folder
from allo_fast.model.checkpoint import check_model, read, weight_files
from allo_fast.model.weights import named_weights, same_bits, whole_weights

logger = logging.getLogger(__name__)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    replace: bool = False,
) -> None:
    """A normal Hugging Face folder: config, safetensors, generation config, tokenizer; rank 0 writes it.

    weights: what to save instead of the model's own weights, whole, one at a time; every rank iterates together. The
    folder gets its name when what was written reads back as it is here. Raises UserError on every rank where it does
    not, cannot be written, or where another that holds something is there, unless it is to `replace` that.
    """
    state = _state_dict(model, whole_weights(model) if weights is None else weights)
    ranks.on_main(lambda: _save(model, tokenizer, folder, state, replace))


def check_new(folder: Path) -> None:
    """Raises UserError where a folder that is to be written exists and holds something, or would lie in a model's."""
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UserError(f"{folder}: exists already; name a folder that does not")
    models = (file.parent for parent in folder.resolve().parents for file in parent.glob("*.safetensors"))
    if inside := next((parent for parent in models if (parent / "config.json").is_file()), None):
        raise UserError(f"{folder}: inside the model {inside}; name a folder elsewhere")


def _state_dict(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On rank 0 under every name that the model knows a weight by, on the CPU; elsewhere its buffers alone."""
    by_name = named_weights(model)
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    parameters = {name for tied in names.values() for name in tied}
    state = {name: buffer.cpu() for name, buffer in model.state_dict().items() if name not in parameters}
    for name, weight in weights:
        if ranks.is_main():
            state |= dict.fromkeys(names[id(by_name[name])], weight.detach().cpu())
    return state


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    state: dict[str, Tensor],
    replace: bool,
) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{folder}: {name} holds values that are not finite; the model is not written")
    make_folder(folder.absolute().parent)
    check_room(folder, sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in state.values()}.values()))
    generation = model.generation_config
    with appearing(folder, replace) as partial_folder:
        try:
            model.generation_config = _savable(generation, partial_folder)
            model.save_pretrained(partial_folder, state_dict=dict(state))
            tokenizer.init_kwargs.pop("local_files_only", None)  # of how it was loaded, not of what it is
            tokenizer.save_pretrained(partial_folder)
        finally:
            model.generation_config = generation
        for path in partial_folder.glob("*.safetensors"):
            as_any_file(path)
        check_saved(model, state, partial_folder)


def _savable(config: GenerationConfig | None, folder: Path) -> GenerationConfig | None:
    """The generation config, or where transformers refuses to write it its token ids: training is not lost over it."""
    if config is None:
        return None
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        why = first_line(error)
        logger.warning("generation_config.json: only its token ids are saved, the rest cannot be: %s", why)
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**ids)
    return config


def check_saved(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> None:
    """Raises UserError, naming the first tensor, unless `folder` reads back as a model with exactly these tensors.

    state: every tensor under every name, whole. One tensor (of a mixture of experts, one layer's) is read at a time.
    """
    check_model(folder)
    read_names = set()
    for name, saved in _read_back(model, state, folder):
        read_names.add(name)
        if not same_bits(saved, state[name]):
            raise UserError(f"{folder}: {name} reads back with other values than it was saved with; nothing was kept")
    present = {id(state[name]) for name in read_names}
    if lost := [name for name, tensor in state.items() if id(tensor) not in present]:
        raise UserError(f"{folder}: {lost[0]} is not in the files that were saved; nothing was kept")


def _read_back(model: PreTrainedModel, state: dict[str, Tensor], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder's files, under the model's name for it and merged or split as on loading."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, WeightConverter] = {}
    for key, file in sorted(_files_by_name(model, folder).items(), key=lambda item: dot_natural_key(item[0])):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        if pattern is None:
            yield name, read(file, key)
        else:
            group = groups.setdefault(name, deepcopy(by_pattern[pattern]))
            group.add_tensor(name, key, pattern, partial(read, file, key))
    for first, group in groups.items():
        for name, tensor in group.convert(first, model=model, config=model.config).items():
            yield name, tensor[0] if isinstance(tensor, list) else tensor


def _files_by_name(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    files = {}
    for file in weight_files(folder, model.config):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files
