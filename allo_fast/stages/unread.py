"""Settings that differ from their defaults and decide nothing in this run, which is said before it starts."""

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import reduce

from allo_fast.config import SAMPLED, Config
from allo_fast.config_train import LOSSES, WITHOUT_REFERENCE, LossConfig
from allo_fast.section import Section

_OF_REWARDS = {  # keys, and the sources that read them
    "rewards.ratio": ("rewriter", "implicit"),
    "rewards.train.* rewards.max_examples": ("rewriter",),
    "rewards.dpo.*": ("implicit",),
    "rewards.template": ("rewriter", "prompted"),
    "rewards.batch_size": ("rewriter", "prompted", "implicit"),
}


def unread(config: Config) -> list[str]:
    """A line for each reason that there is, with the keys that are not read for it."""
    return [f"not read: {', '.join(keys)} ({why})" for why, keys in unread_keys(config)]


def unread_keys(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Each reason with its keys."""
    changed = [*_changed(config)]
    for why, patterns in _reasons(config):
        if idle := [key for key in changed if any(fnmatch(key, pattern) for pattern in patterns.split())]:
            yield why, idle
            changed = [key for key in changed if key not in idle]


def _changed(section: Section, prefix: str = "") -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            below = [*_changed(value, f"{prefix}{name}.")]
            yield from below or [prefix + name] * (field.default is None)
        elif value != field.default:
            yield prefix + name


def _reasons(config: Config) -> Iterator[tuple[str, str]]:
    """Each with the patterns of keys, in words, that nothing reads for it."""
    method, located = config.method, config.located_sections
    if config.model.name_or_path:
        yield "only where model.name_or_path is null a model is pretrained", "pretrain.*"
    if config.data.format not in SAMPLED:
        sampling = "sample.[nt]* sample.batch_size" + " sample.max_new_tokens" * (not _guard_speaks(config))
        answers = "" if config.generates_answers else "sample.stop data.scorer evaluate.[nt]*"
        answers += " evaluate.max_new_tokens" * (not config.generates_answers and not _samples(config))
        yield f"data.format: {config.data.format} has its responses", f"{sampling} pairs.gold {answers}"
    if config.data.format != "preference":
        yield f"data.format: {config.data.format} has no pairs whose answers are shown", "evaluate.samples"
    if config.data.format != "multiple_choice":
        yield f"data.format: {config.data.format} has no choices", "evaluate.choices"
    if config.generates_answers and config.evaluate.num_return_sequences == 1:
        yield "evaluate.num_return_sequences: 1, greedy", "evaluate.temperature evaluate.top_p"
    if config.sample.engine == "local":
        yield "sample.engine: local", "sample.server.*"
    else:
        yield "sample.engine: server", "sample.batch_size"
    if config.data.chat_template is False:
        yield "data.chat_template: false", "data.chat_template_kwargs"
    if config.deepspeed is None:
        yield "deepspeed: null", "ddp_timeout"
    if config.model.dtype == "float32":
        yield "model.dtype: float32 takes all values as they are", "model.rounding"
    if method == "dpo":
        ranking = "locate.score locate.after locate.scope locate.skip locate.last locate.rows"
        ranking += " locate.exclude" * (not located)
        yield "method: dpo trains all weights", f"{ranking} rewards.* forget.* learn.* reference save_models rivals"
    if method == "dpo" and not located:
        yield "no stage trains some of the weights", "model.rounding"
    if method == "sparse-dpo":
        yield "method: sparse-dpo forgets nothing", "rewards.* forget.*"
    if not config.warms_up and "warmup" in located:
        yield (
            "weights are located by its steps, and none is taken",
            "warmup.save_* warmup.skip_nonfinite_steps warmup.lora* warmup.eval_steps warmup.early* warmup.load*",
        )
    elif not config.warms_up:
        yield "no warm-up runs, and its steps locate no weights", "warmup.*"
    if not located:
        yield "no gradients rank weights", "locate.pairs locate.clip locate.windows locate.accumulators"
    elif [*located] == ["warmup"] and config.located_by != "linear":
        yield f"locate.score: {config.located_by}", "locate.clip"
    if not config.warms_up and config.located_by != "linear":
        moving = "learning_rate lr_* warmup_steps adam_* weight_decay max_grad_norm"
        yield f"locate.score: {config.located_by}", " ".join(f"warmup.{key}" for key in moving.split())
    elif not config.warms_up and not config.locate.clip:
        yield "locate.clip: false", "warmup.max_grad_norm"
    idle = [keys for keys, sources in _OF_REWARDS.items() if config.reward_source not in sources]
    yield f"rewards.source: {config.reward_source}", " ".join(idle)
    for train in (config.warmup, config.learn):
        yield from _of_losses(train, config)
    if not config.pairs.eval_size:
        yield "pairs.eval_size: null, no pair is held out", "warmup.eval_steps learn.eval_steps"
    if config.protocol == "release":
        yield "protocol: release", "forget.threshold forget.guard*"
    for key in ("pretrain", "sft", "warmup", "rewards.train", "rewards.dpo", "forget", "learn"):
        if getattr(reduce(getattr, key.split("."), config), "lr_scheduler_type", None) == "constant":
            yield f"{key}.lr_scheduler_type: constant", f"{key}.warmup_steps"


def _guard_speaks(config: Config) -> bool:
    """Does forgetting ask for answers, which `sample.max_new_tokens` ends?"""
    guard = config.forget.guard if config.method == "allo" and config.protocol == "paper" else None
    return guard is not None and guard.max_repeated is not None


def _samples(config: Config) -> bool:
    return config.data.format == "preference" and config.evaluate.samples > 0


def _of_losses(train: LossConfig, config: Config) -> Iterator[tuple[str, str]]:
    margins = config.data.format == "preference" or config.pairs.eval_size  # which are scaled by it
    readers = {
        "beta": {*LOSSES} - (set() if margins else {"sft"}),
        "label_smoothing": {"sigmoid", "robust", "simpo", "confpo"},
        "length_alpha": {"sigmoid"},
        "simpo_gamma": {"simpo", "confpo"},
        "reference": {*LOSSES} - {*WITHOUT_REFERENCE},
    }
    idle = [f"{train.section}.{key}" for key, losses in readers.items() if not losses & {*train.loss_type}]
    yield f"{train.section}.loss_type: {', '.join(train.loss_type)}", " ".join(idle)
