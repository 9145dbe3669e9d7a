"""What each command does."""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import transformers

from allo_fast import ranks, signals
from allo_fast.compare.arms import Comparison
from allo_fast.compare.driving import compare
from allo_fast.compare.judging import asking, judge, read_responses, said_of
from allo_fast.compare.rounds import complete_rounds, later_rounds, said_of_rounds
from allo_fast.config import Config, ModelConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.config_keys import print_keys
from allo_fast.console import logged, say, show
from allo_fast.converting import convert
from allo_fast.durable import reason, versions
from allo_fast.method.delta import Delta
from allo_fast.model.checkpoint import check_model
from allo_fast.model.loading import load_model, load_tokenizer
from allo_fast.model.saving import check_new, save_model
from allo_fast.overview import print_status
from allo_fast.plan.advice import advised
from allo_fast.plan.job import job_of, zeros_of
from allo_fast.plan.phase import DEVICES
from allo_fast.plan.rows import count_rows
from allo_fast.plan.table import table as plan_table
from allo_fast.publishing import publish
from allo_fast.report.page import write_report
from allo_fast.report.picture import picture
from allo_fast.report.summary import evaluation_line, summarize, table
from allo_fast.runs.home import LOG
from allo_fast.runs.lock import alone_in
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, inputs_of, stages_of
from allo_fast.stages.check import check, require, was_checked
from allo_fast.stages.driving import hidden_updates
from allo_fast.stages.evaluate import compares_with_base, evaluate_alone
from allo_fast.stages.models import base_path
from allo_fast.starting import init
from allo_fast.training.engine import TrainingError
from allo_fast.training.zero import Zero, check_divides, training_sections
from allo_kernels import memory

logger = logging.getLogger("allo_fast")

_PATIENCE = 10.0  # seconds after which a rank that nobody has ended says itself what ended it


def run(options: argparse.Namespace) -> int:
    """The exit code of a command. Raises BrokenPipeError where nobody reads what it prints any more."""
    command = _COMMANDS.get(options.name, _stage)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("allo_fast").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    ranks.name_accelerator()
    try:
        if "LOCAL_RANK" in os.environ and ranks.launched_world_size() > 1 and command not in (_run, _stage):
            raise UserError(f"{ranks.launched_world_size()} processes were started for what one does")
        return command(options) or 0
    except Exception as error:
        signals.check_cause(error)
        if isinstance(error, BrokenPipeError):
            raise
        rank = ranks.launched_rank()
        if rank:  # what all meet rank 0 says, and what another's end led to that one; then a launcher ends this one
            time.sleep(_PATIENCE)
        if not (line := _line(error)):
            raise
        print(f"allo-fast: {f'rank {rank}: ' if rank else ''}{line}", file=sys.stderr, flush=True)
        return 2


def _line(error: Exception) -> str | None:
    """What a user is told; None of an error that is the program's own."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{f'{error.filename}: ' if error.filename else ''}{reason(error)}"
    return str(error) or "out of memory" if isinstance(error, UserError | TrainingError | MemoryError) else None


def _run(options: argparse.Namespace) -> None:
    with _open_run(options) as run:
        _complete_run(run)
        later = []
        for runs in later_rounds(run):
            later.append([_later(found, run) for found in runs])
            say("\n".join(ranks.on_main(lambda: said_of_rounds(run, later))))
    ranks.stop()


def _complete_run(run: Run) -> None:
    units = run.units(stages_of(run.config))
    if not run.rerun and (ahead := [f"{unit.name} {unit.key}" for unit in units if unit.is_ahead]):
        say(f"complete, but from stages that are not: {', '.join(ahead)}; they need --rerun if those differ then")
    for unit in units:
        _complete(unit)
    ranks.on_main(lambda: _report(run))


def _later(found: Run, first: Run) -> Run:
    """A later round of a run, for one seed."""
    say(f"{found.config.name}:")
    with alone_in(found.folder):
        run = Run(found.config, STAGES, first.rerun, first.zeros)
        _complete_run(run)
    return run


def _compare(options: argparse.Namespace) -> None:
    for line in compare(Comparison.load(options.config, options.overrides), show, options.rerun):
        say(line)


def _rewrite(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    with alone_in(Path(config.output_dir) / config.name):
        run = Run(config, STAGES)
        for unit in run.units(stages_of(config)):
            unit.check(outside=False)
        run.home.take_config(config, rerun=False)
        _report(run, options.png)
        if later := complete_rounds(run):
            say("\n".join(said_of_rounds(run, later)))


def _report(run: Run, png: bool = False) -> None:
    summary = summarize(run)
    write_report(run, summary)
    say(table(summary))
    say(f"{run.folder / 'summary.json'}\n{run.folder / 'report.html'}")
    if png:
        say(picture(run.folder / "report.html"))


def _stage(options: argparse.Namespace) -> None:
    with _open_run(options) as run:
        for unit in run.units([options.name]):
            _complete(unit)
    ranks.stop()


@contextmanager
def _open_run(options: argparse.Namespace) -> Iterator[Run]:
    """The run of this command, alone in its folder; several processes all come here, and with the same inputs."""
    config = load_config(options.config, options.overrides)
    if options.name in STAGES and options.name not in stages_of(config):
        raise UserError(f"{options.name}: not a stage of this run, whose stages are {', '.join(stages_of(config))}")
    if config.deepspeed is None:
        if ranks.launched_world_size() > 1:
            raise UserError(
                f"{ranks.launched_world_size()} processes were started, but deepspeed is not set; add "
                "deepspeed=configs/zero2.json, or deepspeed=auto"
            )
        zeros = None
    else:
        ranks.start(config.ddp_timeout)
        ranks.agree(inputs_of(config))
        _check_ranks(config, ranks.world_size())
        zeros = ranks.on_main(lambda: _zeros(config))
    folder = Path(config.output_dir) / config.name
    if options.name == "run" and (options.rerun or not was_checked(folder)):
        for note in ranks.on_main(lambda: require(config)):
            say(note)
    with alone_in(folder):
        run = Run(config, STAGES, options.rerun, zeros)
        with logged(folder / LOG, shlex.join(["allo-fast", options.name, str(options.config), *options.overrides])):
            yield run


def _zeros(config: Config) -> dict[str, Zero | None]:
    """How dense and sparse stages run on these devices."""
    return zeros_of(config, lambda: job_of(config, ranks.world_size(), memory.device_bytes()))


def _check_ranks(config: Config, world: int) -> None:
    """Raises UserError where a stage's steps cannot be divided, before any stage runs."""
    for name, train in training_sections(config).items():
        check_divides(train, world, name)


def _check(options: argparse.Namespace) -> int:
    findings = check(load_config(options.config, options.overrides))
    problems = [f"problem: {problem}" for problem in findings.problems]
    print("\n".join([*findings.notes, *_shown(findings.first_row), *problems]))
    print(f"problems: {len(findings.problems)}" if findings.problems else "nothing stands against this run")
    return 2 if findings.problems else 0


def _plan(options: argparse.Namespace) -> int:
    config, gpus = load_config(options.config, options.overrides, auto="bfloat16"), options.gpus
    host = options.host_memory
    if gpus < 1 or not 0 < options.gpu_memory < 1e6:
        raise UserError(f"--gpus, --gpu-memory: expected devices, and GB of each; got {gpus}, {options.gpu_memory:g}")
    if host is not None and not 0 < host < 1e6:
        raise UserError(f"--host-memory: expected GB of a node, got {host:g}")
    if gpus > 1 and config.deepspeed is None:
        raise UserError(f"--gpus {gpus}: deepspeed is not set; add deepspeed=configs/zero2.json, or deepspeed=auto")
    if config.warms_up and config.warmup.lora:
        raise UserError("warmup.lora: not planned; warmup.lora=null plans dense DPO instead")
    _check_ranks(config, gpus)
    job = job_of(config, gpus, options.gpu_memory * 1e9, options.model_config)
    job = replace(job, device=DEVICES[options.device], rows=count_rows(config), host_bytes=host and host * 1e9)
    planned = advised(job, zeros_of(config, lambda: job))
    print(json.dumps(planned.to_dict(), indent=1) if options.json else plan_table(planned))
    return 0 if planned.fits else 2


def _complete(unit: Unit) -> None:
    label = f"{unit.name} {unit.key}"
    if unit.is_complete():
        ranks.on_main(unit.tidy)
        say(f"{label}: complete")
        return
    show(label, unit.execute())
    facts = unit.manifest()["facts"]
    say(f"{label}: " + ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, int)))
    for line in _shown(facts.get("first_row", {})):
        say(line)
    if ranks.is_main() and (warning := hidden_updates(unit.config.model, facts)):
        logger.warning("%s: %s", label, warning)


def _shown(first_row: dict[str, str]) -> list[str]:
    return [f"first {name}: {text!r}" for name, text in first_row.items()]


def _eval(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides).model_copy(update={"deepspeed": None})
    check_model(options.model)
    # What the run pretrained or fine-tuned lies in its own folder.
    unit = Unit(Run(config, STAGES, folder=Path(config.output_dir) / config.name), "evaluate", "base")
    for made in unit.upstream() if compares_with_base(config) else ():
        if made.folder.exists():
            made.check(outside=False)
    base = base_path(unit)
    with tempfile.TemporaryDirectory() as scratch:
        answers = config.evaluate.model_copy(update={"samples": 0})
        run = Run(config.model_copy(update={"output_dir": scratch, "evaluate": answers}), STAGES)
        facts, rows = show("eval", evaluate_alone(run, options.model, base))
    print(f"{options.model}: {evaluation_line(config, facts, rows)}")


def _merge(options: argparse.Namespace) -> None:
    check_new(options.out)
    delta = Delta.load(options.delta)
    model = load_model(options.base, ModelConfig(device="cpu"), dtype=delta.dtype)
    delta.merge_into(model)
    save_model(model, load_tokenizer(options.base), options.out)
    print(options.out)


def _judge(options: argparse.Namespace) -> None:
    settings = asking(options.url, options.model, options.api_key_env)
    first, second = (read_responses(path) for path in (options.first, options.second))
    print(said_of(show("judge", judge(first, second, settings, options.style, options.out))))


def _kernels(options: argparse.Namespace) -> int:
    """In a process of its own: whether Triton compiles or interprets is settled when it is first imported."""
    return subprocess.call([sys.executable, "-m", "allo_kernels", *options.arguments])


def _env(options: argparse.Namespace) -> None:
    import torch

    print("\n".join(f"{name} {number}" for name, number in versions().items()))
    for index in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_name(index))


_COMMANDS = {
    "run": _run,
    "compare": _compare,
    "report": _rewrite,
    "status": print_status,
    "init": init,
    "check": _check,
    "plan": _plan,
    "eval": _eval,
    "keys": print_keys,
    "judge": _judge,
    "merge": _merge,
    "export": publish,
    "convert": convert,
    "kernels": _kernels,
    "env": _env,
}
