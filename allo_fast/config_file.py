"""A configuration from YAML, with dotted overrides on top: strict, and with errors that name the key.

A run keeps its own as config.yaml.
"""

import difflib
import logging
from pathlib import Path
from typing import TypeVar, get_args

import yaml
from pydantic import ValidationError

from allo_fast.config import Config
from allo_fast.errors import UserError, first_line, no_such
from allo_fast.section import Section

S = TypeVar("S", bound=Section)
logger = logging.getLogger(__name__)

_NODES = 10_000  # keys and values in a file, aliases counted as what they stand for
_DEPTH = 50  # levels of nesting


def load_config(path: str | Path, overrides: list[str] = (), auto: str | None = None) -> Config:
    """The configuration in a YAML file, with `key.subkey=value` overrides (values are YAML) on top.

    auto: the dtype of a model whose `dtype` is auto; None: what suits this machine, which is said. Raises UserError for
    a file that cannot be read, YAML that does not parse, unknown keys (naming the nearest known one) and values that do
    not fit.
    """
    raw = read_yaml(path)
    if "arms" in raw:
        raise UserError(f"{path}: a comparison; `allo-fast compare {path}` runs it")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"{override}: expected key.subkey=value")
        _assign(raw, key, _parse(value, override))
    model = raw.setdefault("model", {})
    is_auto = isinstance(model, dict) and model.get("dtype", "auto") == "auto"
    if is_auto and auto:
        model["dtype"] = auto
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        trains = "warmup." if raw.get("method") == "dpo" else "learn."
        raise UserError(f"{path}: {explained(error, Config, trains)}") from None
    if is_auto and not auto:
        logger.info("model.dtype: %s, as suits this machine", config.model.dtype)
    return config


def validated(section: type[S], given: dict) -> S:
    """A section of what is not in a file. Raises UserError for what does not fit."""
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise UserError(explained(error, section)) from None


def read_yaml(path: str | Path) -> dict:
    """The keys and values of a YAML file. Raises UserError where it cannot be read, or has none."""
    try:
        raw = _parse(Path(path).read_text("utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(no_such(path)) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8, at byte {error.start}; save it as UTF-8") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values, got {type(raw).__name__}")
    return raw


def dump_config(config: Config) -> str:
    """What is held out of data.train stays so, whatever that becomes."""
    given = config.model_dump()
    given["data"]["test"] = None if config.data.test_size else config.data.test
    return yaml.safe_dump(given, sort_keys=False)


# What users of TRL, LLaMA-Factory and Axolotl type for a key of ours.
NAMES_ELSEWHERE = {
    theirs: ours
    for ours, every in {
        "learning_rate": "lr",
        "num_train_epochs": "epochs num_epochs",
        "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size",
        "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps",
        "max_grad_norm": "grad_clip clip_grad gradient_clipping",
        "lr_scheduler_type": "scheduler lr_scheduler",
        "warmup_steps": "warmup_ratio",
        "loss_type": "loss pref_loss reference_free",
        "loss_weights": "rpo_alpha cpo_alpha pref_ftx",
        "data.scorer": "reward_model reward_model_path reward_funcs",
        "beta": "pref_beta",
        "simpo_gamma": "gamma cpo_gamma",
        "model.name_or_path": "base_model model_name model_name_or_path model_id model_path",
        "model.dtype": "torch_dtype bf16 fp16 mixed_precision precision",
        "model.attn_implementation": "flash_attention flash_attn use_flash_attention_2",
        "data.train": "dataset datasets dataset_name dataset_path train_file train_dataset",
        "data.test": "eval_dataset eval_file test_file test_datasets",
        "data.test_size": "val_size val_set_size test_split_size validation_split",
        "data.max_prompt_tokens": "max_prompt_length",
        "data.max_response_tokens": "max_completion_length",
        "report_to": "logger log_with use_wandb use_tensorboard wandb_project",
        "seeds": "seed data_seed",
        "name": "run_name",
        "method": "stage trainer rl alignment",
        "evaluate.batch_size": "per_device_eval_batch_size eval_batch_size",
        "data.chat_template": "template chat_template_path",
        "warmup.lora": "peft lora use_peft adapter finetuning_type peft_config",
        "warmup.lora.r": "lora_r lora_rank",
        "warmup.lora.target_modules": "lora_target_modules lora_target",
        "save_steps": "save_strategy",
        "eval_steps": "eval_strategy evaluation_strategy",
        "learn.reference": "ref_model ref_model_path ref_model_name_or_path",
        "learn.ratio": "sparsity mask_ratio neuron_ratio",
        "sample.num_return_sequences": "num_generations num_samples",
        "save_models": "save_safetensors save_only_model",
    }.items()
    for theirs in every.split()
}

_LIMITS = "prompts and responses have limits of their own: data.max_prompt_tokens, data.max_response_tokens"
# What they type that is no key here, and how it is.
NOT_KEYS = {
    **dict.fromkeys("max_length cutoff_len sequence_len max_seq_length".split(), _LIMITS),
    "max_steps": "training is counted in epochs: num_train_epochs",
    "resume_from_checkpoint": "the same command goes on where it ended",
    **dict.fromkeys(
        "push_to_hub hub_model_id hub_strategy".split(),
        "`allo-fast export --push-to-hub USER/NAME` uploads a stage's model",
    ),
    "logging_steps": "every step is written to metrics.jsonl and to what report_to names",
    "precompute_ref_log_probs": "the reference is computed once and kept, or with reference: online in every step",
    "padding_free": "rows are packed without padding where the model can",
    **dict.fromkeys("packing sample_packing".split(), "rows are packed without padding where the model can"),
    "truncation_mode": "nothing is cut; rows that are too long are set aside",
    **dict.fromkeys(
        "train_on_inputs completion_only_loss assistant_only_loss train_on_prompt mask_history".split(),
        "responses train, prompts never do",
    ),
    "save_total_limit": "of checkpoints the last two are kept, until their stage is complete",
    "neftune_noise_alpha": "no noise is added to embeddings",
    "ld_alpha": "length_alpha is R-DPO's, another thing",
    **dict.fromkeys(
        "desirable_weight undesirable_weight use_weighting".split(), "a row may have its own weight: loss_weight"
    ),
    "optim": "the optimizer is AdamW, of fp32 states for the weights that train",
    "sync_ref_model": "the reference stays as it is; `rounds` goes on from what was trained",
    "f_divergence_type": "it is the reverse KL; loss_type has other losses",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses keys that stand twice, and files that are more than a configuration can be."""

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.nodes = 0
        self.sizes: dict[yaml.Node, int] = {}  # nodes in each, once it is complete

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event, before = self.peek_event(), self.nodes
        self.depth += 1
        if self.depth > _DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_DEPTH} deep", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.nodes += 1
            self.sizes[node] = self.nodes - before
        elif node in self.sizes:
            self.nodes += self.sizes[node]
        else:
            raise yaml.MarkedYAMLError(problem=f"*{event.anchor} holds itself", problem_mark=event.start_mark)
        if self.nodes > _NODES:
            problem = f"more than {_NODES} keys and values, with what its aliases stand for"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, keys = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value}: stands twice", problem_mark=key.start_mark)
                keys.add((key.tag, key.value))
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value):
            raise yaml.MarkedYAMLError(problem=f"no text: {value!r:.80}", problem_mark=node.start_mark)
        return value

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a month 13, a number of 5000 digits
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def _parse(text: str, where: str) -> object:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        at, why = error.problem_mark, ": ".join(filter(None, [error.context, error.problem]))
        raise UserError(f"{where:.200}: not YAML: line {at.line + 1}, column {at.column + 1}: {why}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {first_line(error)}") from None


def _assign(raw: dict, dotted: str, value: object) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        section = raw.get(parent)
        if not isinstance(section, dict | None):
            raise UserError(f"{dotted}: {parent} has no keys of its own")
        raw[parent] = {**(section or {})}  # `sft: null`, as a run's config.yaml says; an alias is not changed elsewhere
        raw = raw[parent]
    raw[last] = value


def explained(error: ValidationError, section: type[Section], trains: str = "learn.") -> str:
    """What is wrong with a file of this section, one sentence a key, also where a value fits none of several types.

    trains: of the sections with keys alike, which is learning what others call training.
    """
    # Those of other sections come last.
    known, by_key = sorted(known_keys(section), key=lambda key: not key.startswith(trains)), {}
    for each in error.errors():
        by_key.setdefault(_key(each["loc"], known), []).append(each)
    return "; ".join(_explain(key, errors, known) for key, errors in by_key.items())


def _key(parts: tuple, known: list[str]) -> str:
    """The dotted key of an error; pydantic adds the type that it tried."""
    dotted = [".".join(map(str, parts[:length])) for length in range(len(parts), 0, -1)]
    return next((key for key in dotted if key in known), dotted[0] if dotted else "")


def _explain(key: str, errors: list[dict], known: list[str]) -> str:
    first = errors[0]
    if first["type"] == "model_type" and (below := [name for name in known if name.startswith(f"{key}.")]):
        return f"{key}: has keys of its own, as {below[0]}, and no value (got {first['input']!r:.200})"
    if first["type"] != "extra_forbidden":
        message = " or ".join(error["msg"].removeprefix("Value error, ") for error in errors)
        whole = first["type"] == "missing" or isinstance(first["input"], dict)  # what the user need not have written
        suffix = "" if whole else f" (got {first['input']!r:.200})"
        return f"{key}: {message}{suffix}" if key else message
    where = ".".join(map(str, first["loc"]))
    section, _, last = where.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    if last in NOT_KEYS:
        return f"{where}: unknown key; {NOT_KEYS[last]}"
    if meant := NAMES_ELSEWHERE.get(last):
        places = [name for name in known if f".{name}".endswith(f".{meant}")]
        return f"{where}: unknown key; did you mean {min(places, key=lambda name: name not in siblings)}?"
    elsewhere = [name for name in known if f".{name}".endswith(f".{last}")]
    near = elsewhere[:1] or difflib.get_close_matches(where, siblings, n=1)
    near = near or difflib.get_close_matches(where, known, n=1, cutoff=0.5)
    said = f"did you mean {near[0]}?" if near else "`allo-fast keys WORD` finds those there are"
    return f"{where}: unknown key; {said}"


def known_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                keys += known_keys(kind, f"{prefix}{name}.")
    return keys
