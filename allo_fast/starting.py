"""A first configuration, from a model and rows: short, commented, and as small as the device needs it."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice

import torch
import yaml

from allo_fast.config import Config, UserError
from allo_fast.config_file import validated
from allo_fast.data.problems import Problem, read_problems
from allo_fast.data.splitting import read_split
from allo_fast.model.checkpoint import check_model
from allo_fast.plan.advice import fitted
from allo_fast.plan.job import job_of
from allo_fast.plan.rows import count_rows
from allo_fast.plan.shapes import model_config, shape_of
from allo_fast.runs.basis import flat
from allo_kernels import memory

_FORMATS = ("preference", "multiple_choice", "gsm8k", "problems", "release")
_RATES = ((1e9, 2e-5, 1e-4), (5e9, 5e-6, 3e-5), (float("inf"), 1e-6, 1e-5))  # below so many weights: of all, of some
_MANY = 100  # problems, of which some can be spared
_STEPS = 20  # of an epoch at least, where there are examples enough
_SAID = {
    "name": "of the run's folder, in runs/",
    "model.name_or_path": "a folder or a hub id",
    "model.dtype": "as planned; auto is float32 where the device has no matrix units for bfloat16",
    "data.train": "`allo-fast check` says which rows are used, and shows the first as it will train",
    "data.test": "rows that do not train, to judge by; without it some are held out of data.train",
    "data.format": "what a row is, as its fields say",
    "data.max_prompt_tokens": "longer rows are set aside, which is said",
    "method": "sparse-dpo: DPO on some of the weights; allo forgets unaligned tokens before; dpo trains all weights",
    "rivals": "[dpo] trains all weights too, to compare with; of these it needs the memory",
    "pairs.eval_size": "fraction of the problems that is looked at while others train",
    "warmup.learning_rate": "of all weights; the weights that matter are located by what its steps would change",
    "forget.learning_rate": "tokens of wrong responses that the model is unsure of are forgotten first",
    "warmup.gradient_accumulation_steps": "passes of 4 pairs in a step",
    "learn.learning_rate": "a few percent of the weights bear a higher one than all; try others of this key first",
    "learn.ratio": "fraction of all weights that trains",
    "sample.num_return_sequences": "responses to each problem; right ones against wrong ones are the pairs",
}


def init(options: argparse.Namespace) -> None:
    """Raises UserError for what is not there, or no row of which can be used."""
    model = options.model or _asked("model (a folder or a hub id)", "--model")
    data = options.data or _asked("data (a file of rows, or a hub data set)", "--data")
    if options.gpu_memory is not None and not 0 < options.gpu_memory < 1e6:
        raise UserError(f"--gpu-memory: expected GB of a device, got {options.gpu_memory:g}")
    if options.out.exists():
        raise UserError(f"{options.out}: exists already; name a file that does not")
    check_model(model)
    settings = _settings(model, data, options.test, options.method, options.out.stem)
    dtype = {"model.dtype": "bfloat16"} if options.gpu_memory else {}
    config = validated(Config, _nested(settings | dtype))
    size = options.gpu_memory * 1e9 if options.gpu_memory else memory.device_bytes()
    job = replace(job_of(config, 1, size), rows=count_rows(config))
    if (fitting := fitted(job, {"dense": None, "sparse": None})) is None:
        raise UserError(f"{model}: nothing makes it fit into {size / 1e9:.3g} GB; `allo-fast plan` says what it needs")
    before, after = flat(config.model_dump()), flat(fitting.config.model_dump())
    smaller = {key: value for key, value in after.items() if before[key] != value}
    said = _SAID | dict.fromkeys(smaller, f"so that it fits into {size / 1e9:.3g} GB")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(line + "\n" for line in _written(_nested(settings | dtype | smaller), said)))
    print(f"{options.out}: {data} are rows of data.format: {settings['data.format']}; next:")
    plan = f"allo-fast plan {options.out} --gpu-memory {size / 1e9:.3g}"  # which is of GPUs
    is_gpu = options.gpu_memory or config.model.device != "cpu" and torch.cuda.is_available()
    print("\n".join([f"allo-fast check {options.out}", *[plan] * bool(is_gpu), f"allo-fast run {options.out}"]))


def _asked(what: str, flag: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"init: {flag}: which? There is nobody to ask")
    return input(f"{what}: ").strip()


def _settings(model: str, data: str, test: str | None, method: str, name: str) -> dict[str, object]:
    """By dotted key, in the order in which they are written."""
    format = _format_of(data)
    data_section = {"train": data, "test": test, "format": format}
    known = validated(Config, {"name": name, "model": {"name_or_path": model}, "data": data_section})
    next(read_split(known.data, "test"))  # which says what is not there, and where nothing can be held out
    rows, weights = count_rows(known), shape_of(model_config(known), "float32").parameters
    rate, sparse_rate = next((dense, sparse) for size, dense, sparse in _RATES if weights < size)
    settings = {"name": name, "model.name_or_path": model, "data.train": data}
    settings |= {"data.test": test} if test else {}
    settings |= {"data.format": format, "data.max_prompt_tokens": 512, "data.max_response_tokens": 512}
    settings |= {"method": method} | ({} if method == "dpo" else {"rivals": []})
    if format not in ("preference", "multiple_choice"):
        settings |= {"sample.num_return_sequences": 8, "sample.max_new_tokens": 512}
    settings |= {"pairs.eval_size": 0.1} if rows.train_known and rows.problems >= _MANY else {}
    passes = {"gradient_accumulation_steps": min(8, max(1, rows.pairs // (4 * _STEPS)))}
    sections = {"warmup": {"learning_rate": rate}}
    sections |= {"forget": {"learning_rate": sparse_rate / 4}} if method == "allo" else {}
    sections |= {"learn": {"learning_rate": sparse_rate, "ratio": 0.05}} if method != "dpo" else {}
    return settings | flat({section: keys | passes for section, keys in sections.items()})


def _format_of(data: str) -> str:
    """The first that reads a row. Raises UserError where none does, with what is wrong for each."""
    reasons = {}
    for format in _FORMATS:
        if (why := _unreadable(data, format)) is None:
            return format
        reasons[format] = why
    if len({*reasons.values()}) == 1:  # of the file, and not of its rows
        raise UserError(reasons["preference"])
    lines = (f"as {format}: {why.removeprefix(f'{data}: ')}" for format, why in reasons.items())
    raise UserError("\n".join([f"{data}: no format reads its rows", *lines]))


def _unreadable(data: str, format: str) -> str | None:
    """Why not one of the first thousand rows can be used; None where one can."""
    aside = None
    try:
        for row in islice(read_problems(data, format), 1000):
            if isinstance(row, Problem):
                return None
            aside = aside or row
    except UserError as error:
        return str(error)
    return f"{aside.id}: {aside.reason}"


def _nested(settings: Mapping[str, object]) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    found: dict = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return found


def _written(settings: Mapping, said: Mapping[str, str], prefix: str = "") -> Iterator[str]:
    """YAML with a comment beside each key that has one."""
    margin = "  " * prefix.count(".")
    for key, value in settings.items():
        comment = f"  # {said[prefix + key]}" if prefix + key in said else ""
        if isinstance(value, dict):
            yield f"{margin}{key}:"
            yield from _written(value, said, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
            yield f"{margin}{key}: {text.removesuffix('...' + chr(10)).strip()}{comment}"
