"""The command line: `allo-fast run CONFIG [key.subkey=value ...]`, one stage, or a tool."""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import transformers
from tqdm import tqdm

from allo_fast import ranks
from allo_fast.config import Config, ModelConfig, UserError
from allo_fast.config_file import load_config
from allo_fast.method.delta import Delta
from allo_fast.model.checkpoint import check_model
from allo_fast.model.loading import convert_gguf, load_model, load_tokenizer
from allo_fast.model.saving import check_new, save_model
from allo_fast.plan.advice import advised
from allo_fast.plan.job import job_of, zeros_of
from allo_fast.plan.phase import DEVICES
from allo_fast.plan.rows import count_rows
from allo_fast.plan.table import table as plan_table
from allo_fast.report.page import write_report
from allo_fast.report.summary import evaluation_line, summarize, table
from allo_fast.runs.run import Progress, Run, Unit, alone_in, versions
from allo_fast.stages import STAGES, inputs_of, stages_of
from allo_fast.stages.check import check, require, was_checked
from allo_fast.stages.driving import hidden_updates
from allo_fast.stages.evaluate import evaluate_alone
from allo_fast.stages.export import STAGES_WITH_MODELS, export
from allo_fast.stages.models import base_path
from allo_fast.training.engine import TrainingError
from allo_fast.training.zero import Zero, check_divides, training_sections
from allo_kernels import memory

logger = logging.getLogger("allo_fast")


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides after --rerun
        options.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("allo_fast").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    ranks.name_accelerator()
    try:
        if "LOCAL_RANK" in os.environ and ranks.launched_world_size() > 1 and options.command not in (_run, _stage):
            raise UserError(f"{ranks.launched_world_size()} processes were started for what one does")
        return options.command(options) or 0
    except (UserError, TrainingError) as error:
        _complain(error)
        return 2
    except KeyboardInterrupt:
        print("allo-fast: interrupted; the same command continues", file=sys.stderr)
        return 130


def _complain(error: Exception) -> None:
    """Once: what every rank meets, rank 0 says, and the launcher ends the others before they do."""
    rank = ranks.launched_rank()
    if rank:
        time.sleep(3)
    print(f"allo-fast: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allo-fast", description=__doc__)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher says what LOCAL_RANK says
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = {"run": "every stage of a run, then its summary and report", "report": "summary and report again"}
    for name in ("run", *STAGES, "report"):
        command = commands.add_parser(name, help=about.get(name, f"the stage {name} alone, for every seed"))
        command.add_argument("config", type=Path)
        command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
        command.add_argument("--rerun", action="store_true", help="run again what changed settings affect")
        command.set_defaults(command=_run if name in ("run", "report") else _stage, name=name)
    command = commands.add_parser("check", help="what would end a run later, all of it, before anything starts")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.set_defaults(command=_check)
    command = commands.add_parser("plan", help="memory, traffic, disk and time of a job, before it starts")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.add_argument("--gpus", type=int, default=1, help="devices of all nodes together")
    command.add_argument("--gpu-memory", type=float, default=80, help="of one device, in GB (10^9 bytes)")
    command.add_argument("--device", choices=DEVICES, default="h100", help="whose speed times assume")
    command.add_argument("--host-memory", type=float, help="of a node of up to 8 devices, in GB")
    command.add_argument("--model-config", help="config.json of the model, where the model itself is not at hand")
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=_plan)
    command = commands.add_parser("eval", help="any model on a config's test rows, judged as the run judges")
    command.add_argument("model", help="Hugging Face folder or hub id")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.set_defaults(command=_eval)
    command = commands.add_parser("merge", help="base + delta -> a Hugging Face folder")
    for argument in ("base", "delta", "out"):
        command.add_argument(argument, type=Path)
    command.set_defaults(command=_merge)
    command = commands.add_parser("export", help="a stage of a run -> a Hugging Face folder")
    command.add_argument("run", type=Path, help="the run's folder, as runs/NAME")
    command.add_argument("stage", help=f"one of {', '.join(STAGES_WITH_MODELS)}")
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, help="by default the run's first")
    command.set_defaults(command=_export)
    command = commands.add_parser("convert", help="a GGUF file -> a Hugging Face folder with dense weights")
    command.add_argument("gguf", type=Path)
    command.add_argument("out", type=Path)
    command.set_defaults(command=lambda options: convert_gguf(options.gguf, options.out))
    command = commands.add_parser("kernels", help="check, compile ahead of time, or measure the kernels")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="check | aot | bench [--json FILE] | --help")
    command.set_defaults(command=_kernels)
    command = commands.add_parser("env", help="versions and devices")
    command.set_defaults(command=_env)
    return parser


def _run(options: argparse.Namespace) -> None:
    with _open_run(options) as run:
        for unit in run.units(stages_of(run.config)):
            if options.name == "run":
                _complete(unit)
            elif not unit.is_complete():
                raise UserError(f"{unit.folder}: not complete or out of date; run `allo-fast run CONFIG` first")
        ranks.on_main(lambda: _report(run))
    ranks.stop()


def _report(run: Run) -> None:
    summary = summarize(run)
    write_report(run, summary)
    print(table(summary))
    print(f"{run.folder / 'summary.json'}\n{run.folder / 'report.html'}")


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
            _say(note)
    with alone_in(folder):
        yield Run(config, STAGES, options.rerun, zeros)


def _zeros(config: Config) -> dict[str, Zero | None]:
    """How dense and sparse stages run on these devices."""
    return zeros_of(config, lambda: job_of(config, ranks.world_size(), memory.device_bytes()))


def _check_ranks(config: Config, world: int) -> None:
    """Raises UserError where a stage's steps cannot be divided, before any stage runs."""
    for name, train in training_sections(config).items():
        check_divides(train, world, name)


def _check(options: argparse.Namespace) -> int:
    findings = check(load_config(options.config, options.overrides))
    print(
        "\n".join(
            [*findings.notes, *_shown(findings.first_row), *(f"problem: {problem}" for problem in findings.problems)]
        )
    )
    print(f"problems: {len(findings.problems)}" if findings.problems else "nothing stands against this run")
    return 2 if findings.problems else 0


def _plan(options: argparse.Namespace) -> int:
    config, gpus, host = load_config(options.config, options.overrides), options.gpus, options.host_memory
    if gpus < 1 or not 0 < options.gpu_memory < 1e6:
        raise UserError(f"--gpus, --gpu-memory: expected devices, and GB of each; got {gpus}, {options.gpu_memory:g}")
    if host is not None and not 0 < host < 1e6:
        raise UserError(f"--host-memory: expected GB of a node, got {host:g}")
    if gpus > 1 and config.deepspeed is None:
        raise UserError(f"--gpus {gpus}: deepspeed is not set; add deepspeed=configs/zero2.json, or deepspeed=auto")
    _check_ranks(config, gpus)
    job = job_of(config, gpus, options.gpu_memory * 1e9, options.model_config)
    job = replace(job, device=DEVICES[options.device], rows=count_rows(config), host_bytes=host and host * 1e9)
    planned = advised(job, zeros_of(config, lambda: job))
    print(json.dumps(planned.to_dict(), indent=1) if options.json else plan_table(planned))
    return 0 if planned.fits else 1


def _complete(unit: Unit) -> None:
    label = f"{unit.name} {unit.key}"
    if unit.is_complete():
        ranks.on_main(unit.tidy)
        _say(f"{label}: complete")
        return
    _show(label, unit.execute())
    facts = unit.manifest()["facts"]
    _say(f"{label}: " + ", ".join(f"{name} {value}" for name, value in facts.items() if isinstance(value, int)))
    for line in _shown(facts.get("first_row", {})):
        _say(line)
    if ranks.is_main() and (warning := hidden_updates(unit.config.model, facts)):
        logger.warning("%s: %s", label, warning)


def _shown(first_row: dict[str, str]) -> list[str]:
    return [f"first {name}: {text!r}" for name, text in first_row.items()]


def _say(line: str) -> None:
    if ranks.is_main():
        print(line, flush=True)


def _show(label: str, work: Generator[Progress, None, object]) -> object:
    """Runs a generator of progress behind a bar; returns what it returns."""
    with tqdm(desc=label, mininterval=0.5, file=sys.stderr if ranks.is_main() else StringIO()) as bar:
        while True:
            try:
                progress = next(work)
            except StopIteration as end:
                return end.value
            if bar.unit != progress.noun:
                bar.unit = progress.noun
                bar.reset(progress.total)
            bar.set_postfix({key: f"{value:.3g}" for key, value in progress.notes.items()}, refresh=False)
            bar.update(progress.done - bar.n)


def _eval(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides).model_copy(update={"deepspeed": None})
    check_model(options.model)
    # What the run pretrained or fine-tuned lies in its own folder.
    base = base_path(Unit(Run(config, STAGES, folder=Path(config.output_dir) / config.name), "evaluate", "base"))
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(config.model_copy(update={"output_dir": scratch}), STAGES)
        facts, rows = _show("eval", evaluate_alone(run, options.model, base))
    print(f"{options.model}: {evaluation_line(config, facts, rows)}")


def _export(options: argparse.Namespace) -> None:
    export(Run.read(options.run, STAGES), options.stage, options.out, options.seed)
    print(options.out)


def _merge(options: argparse.Namespace) -> None:
    check_new(options.out)
    delta = Delta.load(options.delta)
    model = load_model(options.base, ModelConfig(device="cpu"), dtype=delta.dtype)
    delta.merge_into(model)
    save_model(model, load_tokenizer(options.base), options.out)
    print(options.out)


def _kernels(options: argparse.Namespace) -> int:
    """In a process of its own: whether Triton compiles or interprets is settled when it is first imported."""
    return subprocess.call([sys.executable, "-m", "allo_kernels", *options.arguments])


def _env(options: argparse.Namespace) -> None:
    import torch

    print("\n".join(f"{name} {number}" for name, number in versions().items()))
    for index in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_name(index))


if __name__ == "__main__":
    sys.exit(main())
