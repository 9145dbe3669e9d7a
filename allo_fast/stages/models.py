"""The models of a run: to train, to compare with, to sample from and to score by."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from allo_fast import ranks
from allo_fast.config import Config, ModelConfig, SparseTrainConfig, UserError
from allo_fast.config_train import LoraSettings
from allo_fast.data.batch import Layout
from allo_fast.data.prompts import Prompts
from allo_fast.method.delta import Delta
from allo_fast.method.dense import DensePolicy
from allo_fast.method.lora import LoraPolicy
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.generation import stop_tokens
from allo_fast.model.loading import load_model, load_tokenizer
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.saving import save_model
from allo_fast.plan.shapes import BYTES, model_config, weights_of
from allo_fast.runs.unit import Unit
from allo_fast.training.reference import Opened
from allo_fast.training.sharded import ShardedPolicy
from allo_fast.training.zero import training_sections
from allo_kernels import memory

DELTA = "delta.safetensors"
BATCHES = 4  # of problems between two writes: a killed stage loses them, and towards their end fewer rows run


def base_path(unit: Unit) -> str | Path:
    """Where the model lies that a unit begins from: the one of `sft` or `pretrain`, as it needs, or the user's."""
    folders = {made.name: made.folder for made in unit.upstream()}
    made = folders.get("sft", folders.get("pretrain"))
    return made / "model" if made else unit.config.model.name_or_path


def tokenizer_of(unit: Unit) -> PreTrainedTokenizerBase:
    """That of the model that a complete unit began from. Raises UserError where it is not what it was."""
    path = base_path(unit)
    if path == unit.config.model.name_or_path and (changed := unit.changed_base()):
        raise UserError(f"{path}: {changed}")
    return load_tokenizer(path)


def made_in(unit: Unit, folder: Path) -> tuple[str | Path, Path | None]:
    """The model that a stage of this run made in `folder`, as `load_made` takes it; every rank calls it together.

    A sparse stage left a delta of the base, a dense one a model.
    """
    delta = folder / DELTA
    return (base_path(unit), delta) if ranks.on_main(delta.is_file) else (folder / "model", None)


def load_made(path: str | Path, delta: Path | None, config: ModelConfig, sharded: bool = False) -> PreTrainedModel:
    """The model at `path` with a delta of it, if any; sharded: as `load_model`, and each rank sets what is in its own.

    Every rank calls it together. Raises UserError where the delta is one of another model.
    """
    model = load_model(path, config, sharded=sharded)
    if delta:
        Delta.load(delta).merge_into(model)
    return model


def prompts_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """The paper's instruction belongs to its own tasks: a prompt of preference data is trained as it is written."""
    data = config.data
    template = data.prompt_template or ("{}" if data.format == "preference" else None)
    return Prompts(tokenizer, data.chat_template, template, config.rewards.template, data.chat_template_kwargs)


def dense_policy(unit: Unit, path: str | Path) -> DensePolicy:
    """All weights in float32, from the values that the configured dtype gives them: what the optimizer starts from is
    what the change is measured against."""
    dtype = getattr(torch, unit.config.model.dtype)
    if unit.zero and unit.zero.sharded:
        model = load_model(path, unit.config.model, dtype="float32", sharded=True)
        for weight in model.parameters():
            weight.ds_tensor.copy_(weight.ds_tensor.to(dtype))
    else:
        model = load_model(path, unit.config.model).float()
    return DensePolicy(model, autocast=None if dtype == torch.float32 else dtype)


def lora_policy(unit: Unit, path: str | Path, settings: LoraSettings) -> LoraPolicy:
    """Adapters beside the base in the configured dtype; half of them begin at random."""
    torch.manual_seed(unit.seed)
    return LoraPolicy(load_model(path, unit.config.model), settings)


def sparse_policy(unit: Unit, config: SparseTrainConfig, start: Path | None = None) -> SparsePolicy:
    """The base with the entries that `locate` chose for this stage; start: the delta that an earlier stage made."""
    selection = Selection.load(unit.needed("locate") / f"{unit.name}.safetensors")
    clip = config.clip or ("all" if unit.config.protocol == "release" else "selected")
    return selected_policy(unit, base_path(unit), selection, Delta.load(start) if start else None, clip)


def selected_policy(
    unit: Unit, path: str | Path, selection: Selection, start: Delta | None = None, clip: str = "selected"
) -> SparsePolicy:
    """The model at `path`, of which `selection` trains; rounding by chance is seeded as all else of the unit."""
    sharded = unit.zero is not None and unit.zero.sharded
    model = load_model(path, unit.config.model, sharded=sharded)
    rounding_seed = unit.seed if unit.config.model.rounding == "stochastic" else None
    if sharded:
        return ShardedPolicy(model, selection, start, rounding_seed=rounding_seed)
    keep_all = clip == "all"
    return SparsePolicy(model, selection, start, keep_dense_gradients=keep_all, rounding_seed=rounding_seed)


def save_trained(
    unit: Unit,
    policy: DensePolicy | SparsePolicy,
    prompts: Prompts,
    start: Path | None = None,
    dtype: str = "float32",
) -> None:
    """What a stage passes on: model/, a Hugging Face folder, of a dense policy; of a sparse one the delta, and model/
    where `save_models` says so.

    It generates up to the token that ended its responses. start: the delta that the policy started from. dtype: of the
    model/ of a dense one.
    """
    stops = stop_tokens(policy.model)
    if prompts.end_token not in stops:
        policy.model.generation_config.eos_token_id = sorted({*stops, prompts.end_token})
    if isinstance(policy, SparsePolicy):
        policy.save_delta(unit.folder / DELTA, before=start)
        if unit.config.keeps_model(unit.name):
            save_model(policy.model, prompts.tokenizer, unit.folder / "model", policy.full_weights(), replace=True)
    else:
        save_dense(unit, policy, prompts.tokenizer, dtype)


def save_dense(unit: Unit, policy: DensePolicy, tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    """The unit's model/ in `dtype`; the policy's own model is cast, too."""
    rounded = getattr(torch, dtype)
    policy.model.to(rounded)  # of a sharded model, what its configuration will say
    weights = ((name, weight.to(rounded)) for name, weight in policy.full_weights())
    save_model(policy.model, tokenizer, unit.folder / "model", weights, replace=True)


@dataclass(frozen=True)
class Inference:
    """A frozen model. compute: itself, or its log-probabilities of a batch. sharded: all ranks compute or none does."""

    model: PreTrainedModel
    compute: Callable
    layout: Layout | None  # how to collate for log-probabilities
    sharded: bool

    def at_once(self, batch_size: int) -> int:
        """How many problems `generate` is given: several batches, so that others enter where responses end."""
        return batch_size if self.sharded else BATCHES * batch_size


@contextmanager
def inference(
    unit: Unit,
    path: str | Path,
    delta: Path | None = None,
    *,
    scoring: bool = False,
    sharded: bool | None = None,
) -> Iterator[Inference]:
    """The model of `load_made`, frozen, until the context ends.

    scoring: for log-probabilities of responses [R, L], not for generating. sharded: in shares of all ranks; None: where
    it would take more than half of a device.
    """
    wanted = unit.config.model
    if sharded is None:
        several = unit.zero is not None and ranks.world_size() > 1
        sharded = several and ranks.on_main(lambda: _bytes(unit, path) > memory.device_bytes() / 2)
    model = load_made(path, delta, wanted, sharded).eval().requires_grad_(False)
    module = ResponseLogps(model) if scoring else model
    if sharded:
        from allo_fast.training.backend_deepspeed import frozen_engine

        with frozen_engine(module) as engine:
            yield Inference(model, engine, module.layout if scoring else None, True)
    else:
        yield Inference(model, module, module.layout if scoring else None, False)


def _bytes(unit: Unit, path: str | Path) -> int:
    dtype = unit.config.model.dtype
    return BYTES[dtype] * weights_of(model_config(unit.config, str(path)), dtype).parameters


def other_models(config: Config) -> dict[str, str]:
    """The models that are named beside the base, by key, and that this run reads."""
    sections = training_sections(config) | config.located_sections
    named = {f"{name}.reference": getattr(train, "reference", None) for name, train in sections.items()}
    named["rewards.model"] = config.rewards.model if config.method == "allo" else None
    named["locate.after"] = config.locate.after if config.method != "dpo" else None
    return {key: path for key, path in named.items() if path}


def frozen_reference(unit: Unit, path: str | None) -> Callable[[], AbstractContextManager[Opened]] | None:
    """What opens the reference model at `path`, if any. On ranks it is sharded."""
    if path is None:
        return None

    @contextmanager
    def opened() -> Iterator[Opened]:
        with inference(unit, path, scoring=True, sharded=unit.zero is not None) as found:
            yield Opened(found.compute, found.layout, found.model.device)

    return opened
