"""A user's DeepSpeed JSON: read, checked against the run's configuration, and completed for one model.

`"auto"` means "what the run's configuration says", as in transformers.
"""

import difflib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from allo_fast import ranks
from allo_fast.config import GRADIENT_SCORES, Config, SparseTrainConfig, TrainConfig, UserError

logger = logging.getLogger(__name__)

PERSISTENT = "stage3_param_persistence_threshold"  # entries up to which a weight stays gathered
_OURS = {"optimizer": "AdamW with warmup.*, forget.* and learn.*", "scheduler": "lr_scheduler_type and warmup_steps"}
_PASSED_ON = {"comms_logger": dict, "flops_profiler": dict, "wall_clock_breakdown": bool, "steps_per_print": int}
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_OPTIONS = (  # of zero_optimization: those that the tests train with
    "stage",
    "offload_optimizer",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "allgather_partitions",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    PERSISTENT,
)
_UNUSED = {  # known from many a JSON, and without effect here
    "zero_allow_untested_optimizer": "the optimizer is the engine's own",
    "zero_force_ds_cpu_optimizer": "the optimizer is the engine's own",
    "sub_group_size": "one optimizer step takes all gradients",
    "stage3_gather_16bit_weights_on_model_save": "saved models are always whole",
}
_BUCKET = 50_000_000  # weights that are reduced at once, at most: 200 MB fill any link, and as much memory


@dataclass(frozen=True)
class Zero:
    """stage: 0-3. offload: the optimizer's state lives in host memory. options: of `zero_optimization`, checked."""

    stage: int
    offload: bool = False
    options: dict = field(default_factory=dict)
    others: dict = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Each rank holds a share of the base; otherwise all of it."""
        return self.stage == 3

    def engine_config(self, trainable: int) -> dict:
        """What deepspeed.initialize gets, for `trainable` weights in float32.

        Batches, clipping and dtypes are the engine's own: DeepSpeed sees one micro-batch and fp32 gradients.
        """
        bucket = self.bucket_size(trainable)
        defaults = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket, "overlap_comm": False}
        if self.offload:
            defaults["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {**defaults, **self.options, "stage": self.stage, "sub_group_size": int(1e15)},
            "steps_per_print": None,
            **self.others,
        }

    def bucket_size(self, trainable: int) -> int:
        """Entries that are reduced at once."""
        fits = min(_BUCKET, trainable + trainable % 2)  # DeepSpeed aligns to two
        return int(self.options.get("reduce_bucket_size", fits))


def read_zero(path: str, config: Config) -> Zero:
    """Raises UserError for a file that does not parse, unknown or unsupported keys, and what contradicts `config`."""
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"deepspeed: {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"deepspeed: {path}: not JSON: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise UserError(f'deepspeed: {path}: expected an object with "zero_optimization"')
    _check_top(path, settings, config)
    _check_names(f"{path}: zero_optimization", settings["zero_optimization"], _OPTIONS)
    zero = settings["zero_optimization"]
    options = {key: value for key, value in zero.items() if value != "auto" and key not in _UNUSED}
    stage = zero.get("stage")
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed: {path}: zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
    _check_values(path, options)
    _check_passed_on(path, settings)
    offload = options.get("offload_optimizer") or {}
    device = offload.get("device", "none")
    if device not in ("none", "cpu") or offload.keys() - {"device", "pin_memory"}:
        raise UserError(
            f"deepspeed: {path}: offload_optimizer: expected device none or cpu, perhaps pin_memory; got {offload}"
        )
    if device == "cpu" and stage == 0:
        raise UserError(f"deepspeed: {path}: offload_optimizer needs stage 1, 2 or 3")
    others = {key: kind(settings[key]) for key, kind in _PASSED_ON.items() if settings.get(key, "auto") != "auto"}
    return Zero(stage, device == "cpu", options, others)


def _check_top(path: str, top: dict, config: Config) -> None:
    _check_names(path, top, (*_OURS, *_PASSED_ON, *_BATCH, "zero_optimization", "gradient_clipping", "bf16", "fp16"))
    for key, value in top.items():
        if key in _OURS:
            raise UserError(f"deepspeed: {path}: {key}: remove it; the run's configuration has {_OURS[key]}")
        if key in _BATCH and value != "auto":
            raise UserError(f'deepspeed: {path}: {key}: set it to "auto"; each stage of the run has its own')
        kind = _PASSED_ON.get(key)
        if kind and value != "auto" and not _is_of_kind(value, kind):
            raise UserError(f"deepspeed: {path}: {key}: expected {kind.__name__}, got {value!r}")
        if key == "gradient_clipping" and value != "auto":
            _check_clipping(path, value, config)
    if _enabled(path, top, "fp16"):
        raise UserError(f"deepspeed: {path}: fp16: not supported; model.dtype is float32 or bfloat16")
    if (bf16 := _enabled(path, top, "bf16")) not in (None, config.model.dtype == "bfloat16"):
        raise UserError(f"deepspeed: {path}: bf16.enabled is {bf16}, but model.dtype is {config.model.dtype}")


def _check_clipping(path: str, value: object, config: Config) -> None:
    for name, train in training_sections(config).items():
        if value != train.max_grad_norm:
            raise UserError(
                f"deepspeed: {path}: gradient_clipping is {value!r}, but the run's {name}.max_grad_norm is "
                f'{train.max_grad_norm}; set it to "auto"'
            )


def _check_names(where: str, section: dict, known: tuple[str, ...]) -> None:
    """Says all that is refused at once."""
    refused = []
    for key in section:
        if key in _UNUSED:
            logger.warning("deepspeed: %s: %s is not used: %s", where, key, _UNUSED[key])
        elif key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            refused.append(key + (f" (did you mean {near[0]}?)" if near else ""))
    if refused:
        raise UserError(
            f"deepspeed: {where}: unknown or unsupported: {', '.join(refused)}; known are {', '.join(known)}"
        )


def _check_values(path: str, options: dict) -> None:
    ranks.import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"deepspeed: {path}: zero_optimization.{where}: {first['msg']}") from None


def _check_passed_on(path: str, settings: dict) -> None:
    """Names and kinds of what goes to DeepSpeed as it is, by DeepSpeed's defaults."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig

    known = {"comms_logger": CommsLoggerConfig().model_dump(), "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({}))}
    for name, defaults in known.items():
        section = settings.get(name, "auto")
        if section == "auto":
            continue
        _check_names(f"{path}: {name}", section, tuple(defaults))
        for key, value in section.items():
            kind = str if defaults[key] is None else type(defaults[key])
            if not _is_of_kind(value, kind):
                raise UserError(f"deepspeed: {path}: {name}.{key}: expected {kind.__name__}, got {value!r}")


def _is_of_kind(value: object, kind: type) -> bool:
    """1e5 is an integer too, though JSON reads a float; and 1 is a number as 1.0 is."""
    if type(value) in (int, float) and kind in (int, float):
        return kind is float or float(value).is_integer()
    return type(value) is kind


def _enabled(path: str, settings: dict, section: str) -> bool | None:
    """None where the user leaves it to us."""
    value = settings.get(section) or {}
    value = value.get("enabled", "auto") if isinstance(value, dict) else value
    if value not in ("auto", True, False):
        raise UserError(f'deepspeed: {path}: {section}.enabled: expected true, false or "auto", got {value!r}')
    return None if value == "auto" else bool(value)


def trains_densely(config: Config, stage: str) -> bool:
    """Whether every weight trains there, or lies there twice."""
    if stage == "locate":
        return config.located_by in ("delta", "after")
    if stage == "rewards":
        return config.reward_source == "rewriter" and config.rewards.ratio == 1
    if stage == "sft":
        return config.sft.ratio == 1
    return stage in ("pretrain", "warmup")


def training_sections(config: Config) -> dict[str, TrainConfig]:
    """The sections of the stages of this run that train, by name."""
    sections = {"pretrain": config.pretrain} if config.model.name_or_path is None else {}
    if config.sft:
        sections["sft"] = config.sft
    if config.warms_up:
        sections["warmup"] = config.warmup
    if config.method == "allo":
        trained = {"rewriter": {"rewards.train": config.rewards.train}, "implicit": {"rewards.dpo": config.rewards.dpo}}
        sections |= trained.get(config.reward_source, {}) | {"forget": config.forget}
    if config.method != "dpo":
        sections["learn"] = config.learn
    return sections


def trained_ratio(config: Config, section: str) -> float | None:
    """Of the weights, what a section trains; None: all of them, densely."""
    stage = section.partition(".")[0]
    if trains_densely(config, stage):
        return None
    return config.rewards.ratio if stage == "rewards" else training_sections(config)[section].ratio


def locates_itself(config: Config, section: str) -> bool:
    """Whether a section trains a selection that its stage makes, and not the run's `locate`."""
    train = training_sections(config)[section]
    return trained_ratio(config, section) is not None and not isinstance(train, SparseTrainConfig)


def locates_by_gradients(config: Config) -> bool:
    """Whether any stage does."""
    located = config.method != "dpo" and config.located_by in GRADIENT_SCORES
    return located or any(locates_itself(config, section) for section in training_sections(config))


def check_divides(train: TrainConfig, world: int, name: str = "") -> None:
    """Raises UserError, naming sizes that would do, where `world` ranks cannot divide the micro-batches of a step."""
    micro, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
    prefix = f"{name}." if name else ""
    if steps % world == 0 or train.max_tokens_per_batch:  # with a budget a step is cut for the ranks that there are
        return
    problem = f"{world} ranks cannot divide the {steps} micro-batches of a step ({prefix}gradient_accumulation_steps)"
    if micro * steps % world:
        larger = -(-steps // world) * world
        raise UserError(
            f"{problem}, nor its {micro * steps} examples; {prefix}gradient_accumulation_steps={larger} would do"
        )
    fits = max(size for size in range(1, micro + 1) if micro * steps % (size * world) == 0)
    raise UserError(
        f"{problem}; the same step on {world}: {prefix}per_device_train_batch_size={fits} "
        f"{prefix}gradient_accumulation_steps={micro * steps // fits}"
    )
