"""What would end a run later, asked before any stage starts and listed at once. `allo-fast check CONFIG`"""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from allo_fast.config import REWRITING, Config, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.encoding import count_trained
from allo_fast.data.prompts import Prompts
from allo_fast.data.sources import UnusableRow
from allo_fast.data.splitting import Key
from allo_fast.device import pick_device
from allo_fast.locating.windows import pieces_of, windows_of
from allo_fast.method import lora
from allo_fast.method.selection import check_ratio
from allo_fast.model.checkpoint import check_model
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.server import api_key
from allo_fast.model.weights import named_weights
from allo_fast.plan.job import disk_bytes
from allo_fast.plan.shapes import empty_model, model_config, weights_of
from allo_fast.runs.home import MANIFEST
from allo_fast.stages.judges import check_scorer
from allo_fast.stages.models import other_models, prompts_of
from allo_fast.stages.pairs import check_parts
from allo_fast.stages.perplexity import text_windows
from allo_fast.stages.problems import first_row, limits, problems_of, right_responses, usable_problems
from allo_fast.stages.rewards import read_rewards
from allo_fast.stages.seen import Seen, look
from allo_fast.stages.unread import unread
from allo_fast.training import tracking
from allo_fast.training.zero import locates_by_gradients, read_zero, trained_ratio, training_sections

T = TypeVar("T")


@dataclass
class Findings:
    """problems: each ends the run. notes: how much of the data will be used. first_row: what it trains, by name."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    first_row: dict[str, str] = field(default_factory=dict)
    first: dict | None = None  # usable row of data.train
    longest: int = 0  # tokens of a prompt with its response, of the usable rows
    shortest: int = 0  # likewise, at least; of data.train
    highest: int = 0  # token id
    trained: Sequence[int] = ()  # digests of the prompts of the usable rows of data.train

    def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, and its error among the problems, where it fails."""
        try:
            return work()
        except UserError as error:
            if (said := str(error)) not in self.problems:  # one cause may stop several checks
                self.problems.append(said)
            return None


def check(config: Config) -> Findings:
    """Reads every named file and renders every row; loads no weights and writes nothing."""
    findings = Findings(notes=unread(config))
    findings.attempt(lambda: pick_device(config.model.device))
    if config.deepspeed not in (None, "auto"):
        findings.attempt(lambda: read_zero(config.deepspeed, config))
    model = findings.attempt(lambda: _base_config(config))
    tokenizer = findings.attempt(lambda: base_tokenizer(config)) if model else None
    prompts = tokenizer and findings.attempt(lambda: prompts_of(config, tokenizer))
    rows = _check_data(findings, config, "train", prompts if model else None, config.sample.max_new_tokens)
    if findings.first or not config.data.test_size:  # what is held out of rows that cannot be read is said already
        _check_data(findings, config, "test", prompts if model else None, config.evaluate.max_new_tokens)
    if config.data.text and prompts:
        findings.attempt(lambda: deque(text_windows(config, tokenizer), maxlen=0))
    _check_budgets(findings, config)
    findings.attempt(lambda: check_scorer(config, findings.first))
    if config.warms_up and config.warmup.lora:
        findings.attempt(lora.require)
    findings.attempt(lambda: tracking.require(config.report_to))
    if config.sample.engine == "server":
        findings.attempt(lambda: api_key(config.sample))
    if config.method == "allo":
        _check_rewards(findings, config, prompts if model else None, rows)
    others = other_models(config)
    if (after := others.pop("locate.after", None)) and model:
        findings.attempt(lambda: _check_after(config, model, after))
    for key, path in others.items():
        findings.attempt(lambda key=key, path=path: _check_other(findings, config, key, path, tokenizer))
    if model:
        findings.attempt(lambda: _check_architecture(config, model))
        findings.attempt(lambda: _check_windows(config, model))
        _check_disk(findings, config, weights_of(model, config.model.dtype).parameters)
    return findings


def require(config: Config) -> list[str]:
    """The notes of `check`. Raises UserError with all problems where there is one."""
    findings = check(config)
    if findings.problems:
        count = len(findings.problems)
        lines = [f"{number}. {problem}" for number, problem in enumerate(findings.problems, start=1)]
        raise UserError("\n".join([f"{count} problem{'s' * (count > 1)} before any stage starts:", *lines]))
    return findings.notes


def was_checked(folder: Path) -> bool:
    """A run that has responses was checked when it began; what it reads later is rendered already or read again."""
    return any(folder.glob(f"*-sample/*/{MANIFEST}"))


def base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(config.model.name_or_path) if config.model.name_or_path else character_tokenizer()
    except UserError as error:
        raise UserError(f"model.name_or_path: {error}") from None


def _base_config(config: Config) -> PretrainedConfig:
    try:
        if config.model.name_or_path:
            check_model(config.model.name_or_path)
        return model_config(config)
    except UserError as error:
        raise UserError(f"model.name_or_path: {error}") from None


def _check_data(
    findings: Findings, config: Config, key: Key, prompts: Prompts | None, new_tokens: int
) -> Iterable[dict]:
    """The usable rows, read again as far as they are gone through.

    Without prompts, whose lack is a problem of its own, the rows are read and not rendered.
    """
    if prompts is None:
        findings.attempt(lambda: deque(problems_of(config, key), maxlen=0))
        return []
    seen = findings.attempt(lambda: _look(config, key, prompts, new_tokens))
    if seen is None:
        return []
    reasons = "; ".join(seen.reasons)
    if not seen.first:
        findings.problems.append(f"data.{key}: {getattr(config.data, key)}: no usable row; {reasons}")
        return []
    held_out = ", held out of data.train" if key == "test" and config.data.test_size else ""
    said = f"data.{key}: {len(seen.prompts)} rows{held_out}, {seen.aside.total()} set aside"
    findings.notes.append("; ".join(filter(None, [said, reasons])))
    if key == "train":
        first = [seen.first]
        findings.first_row = first_row(first, prompts, right_responses) if config.sft else first_row(first, prompts)
        findings.longest, findings.highest, findings.trained = seen.longest, seen.highest, seen.prompts
        findings.shortest = seen.shortest
        findings.first = seen.first
        if config.data.format == "preference":
            findings.attempt(lambda: check_parts(seen.parts, config.pairs.eval_size or 0.0))
    elif trained := count_trained(seen.prompts, findings.trained):
        findings.notes.append(f"data.test: {trained} of {len(seen.prompts)} prompts are in data.train, too")
    return (row for row in usable_problems(config, key, prompts, new_tokens) if isinstance(row, dict))


def _look(config: Config, key: Key, prompts: Prompts, new_tokens: int) -> Seen:
    return look(usable_problems(config, key, prompts, new_tokens), new_tokens, config.pairs.eval_size)


def _check_rewards(findings: Findings, config: Config, prompts: Prompts | None, rows: Iterable[dict]) -> None:
    """Rewards that are given can be read; the rewriting prompt of a row, or of any, leaves room for a response."""
    settings = config.rewards
    if settings.source == "file":
        findings.attempt(lambda: read_rewards(settings.path))
    if config.reward_source not in REWRITING:
        return
    models = [settings.model] if settings.model else []
    if prompts is not None and (limit := findings.attempt(lambda: limits(config, 0, *models))):
        lengths = []
        for row in rows or [{"prompt": "x", "solution": "x"}]:
            with suppress(UnusableRow):
                lengths.append(len(prompts.encode_rewrite(row["prompt"], row["solution"], "x")))
                if lengths[-1] < limit.positions:
                    return
        findings.problems.append(
            f"rewards.template: the rewriting prompt alone has {min(lengths, default='no')} tokens or more, "
            f"{settings.model or config.model.name_or_path} reads {limit.positions}"
        )


def _check_budgets(findings: Findings, config: Config) -> None:
    """Something of data.train fits into a micro-batch."""
    for name, train in (training_sections(config) | config.located_sections).items():
        if name != "pretrain" and (budget := train.max_tokens_per_batch or findings.shortest) < findings.shortest:
            said = f"the shortest prompt with a response of data.train has {findings.shortest} tokens"
            findings.problems.append(f"{name}.max_tokens_per_batch: {budget}: {said}")


def _check_architecture(config: Config, model: PretrainedConfig) -> None:
    """The attention that is asked for exists; of the weights that may be selected some are."""
    empty = empty_model(model, config.model.dtype, config.model.attn_implementation)
    sizes = {name: weight.numel() for name, weight in named_weights(empty).items()}
    for name in training_sections(config):
        if ratio := trained_ratio(config, name):
            located = name in ("forget", "learn")  # others locate for themselves, over all weights
            scope = config.locate.scope if located else "global"
            check_ratio(sizes, ratio, tuple(config.locate.exclude), scope)


def _check_windows(config: Config, model: PretrainedConfig) -> None:
    """A model that is located in by gradients has as many pieces as windows are asked for."""
    if locates_by_gradients(config) and config.locate.windows != "auto":
        pieces = pieces_of(empty_model(model, config.model.dtype, config.model.attn_implementation))
        windows_of(pieces, config.locate.windows)


def _check_after(config: Config, model: PretrainedConfig, path: str) -> None:
    """A model whose change is ranked has the base's weights, in their shapes."""
    try:
        check_model(path)
        models = (model, model_config(config, path))
        before, after = ({n: w.shape for n, w in named_weights(empty_model(m, "float32")).items()} for m in models)
    except UserError as error:
        raise UserError(f"locate.after: {error}") from None
    if different := sorted(name for name in before | after if before.get(name) != after.get(name)):
        raise UserError(f"locate.after: {path}: not a model like the base: {different[0]} differs")


def _check_other(
    findings: Findings, config: Config, key: str, path: str, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """A model that is named beside the base can be loaded, has the base's vocabulary, and reads what the base reads.

    tokenizer: the base's; None where it cannot be had.
    """
    try:
        check_model(path)
        vocabulary, limit = load_tokenizer(path).get_vocab(), limits(config, 0, path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if tokenizer and vocabulary != tokenizer.get_vocab():
        raise UserError(f"{key}: {path} has another vocabulary than {config.model.name_or_path or 'the base model'}")
    rewrites = key == "rewards.model" and config.reward_source in REWRITING
    if not rewrites and findings.longest > limit.positions:
        raise UserError(
            f"{key}: {path} reads {limit.positions} tokens, a prompt with its response has {findings.longest}"
        )
    if findings.highest >= limit.vocabulary:
        raise UserError(f"{key}: {path} embeds {limit.vocabulary} tokens, a row has the token {findings.highest}")


def _check_disk(findings: Findings, config: Config, parameters: int) -> None:
    folder = Path(config.output_dir, config.name).absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        findings.problems.append(f"output_dir: {config.output_dir:.80}: {error.strerror.lower()}")
        return
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        findings.problems.append(f"output_dir: {existing}: not a folder that can be written")
        return
    if (needed := disk_bytes(config, parameters)) > (free := shutil.disk_usage(existing).free):
        findings.problems.append(
            f"output_dir: the run writes up to {needed / 1e9:.1f} GB, {existing} has {free / 1e9:.1f} GB left"
        )
