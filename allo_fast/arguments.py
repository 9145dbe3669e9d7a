"""What the command line takes."""

import argparse
from pathlib import Path

from allo_fast import __version__

# As their modules have them, which take seconds to import.
STAGES = "pretrain", "sft", "sample", "pairs", "warmup", "locate", "rewards", "forget", "learn", "evaluate"
STAGES_WITH_MODELS = "pretrain", "sft", "warmup", "forget", "learn"
STYLES = "alpaca_eval", "arena_hard"
DEVICES = "h100", "a100"
ADAPTERS = "supertuning", "shira"
METHODS = "sparse-dpo", "allo", "dpo"

_ABOUT = "The command line: `allo-fast run CONFIG [key.subkey=value ...]`, one stage, or a tool."


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """name: of the command. Ends the process where it cannot be understood."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        settings = "; settings are written key.subkey=value" if hasattr(options, "overrides") else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{settings}")
    if rest:  # overrides after --rerun
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allo-fast", description=_ABOUT)
    parser.add_argument("--version", action="version", version=f"allo-fast {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher says what LOCAL_RANK says
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    about = {"run": "every stage of a run, then its summary and report", "report": "summary and report again"}
    for name in ("run", *STAGES, "report"):
        command = commands.add_parser(name, help=about.get(name, f"the stage {name} alone, for every seed"))
        command.add_argument("config", type=Path)
        command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
        if name == "report":
            command.add_argument("--png", action="store_true", help="also a picture of the page, by Chromium or Chrome")
        else:
            command.add_argument("--rerun", action="store_true", help="anew what does not fit; the old goes to old-N")
    command = commands.add_parser("status", help="what of a run is done, what is to come, and how long that may take")
    command.add_argument("run", type=Path, help="its config, or its folder")
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="of a config")
    command = commands.add_parser("compare", help="many methods on one job, and which differences are clear of chance")
    command.add_argument("config", type=Path, help="of the comparison, as configs/compare/evidence.yaml")
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value", help="of the job, for all arms")
    command.add_argument("--rerun", action="store_true", help="anew what does not fit; the old goes to old-N")
    command = commands.add_parser("init", help="a first config for your own rows, short and commented")
    command.add_argument("out", type=Path, nargs="?", default=Path("my_run.yaml"), help="(default: %(default)s)")
    command.add_argument("--model", help="Hugging Face folder or hub id; asked for where it is not named")
    command.add_argument("--data", help="file of rows, or hub data set; asked for likewise")
    command.add_argument("--test", help="rows to judge by; else some are held out")
    command.add_argument("--method", choices=METHODS, default=METHODS[0])
    command.add_argument("--gpu-memory", type=float, help="that it must fit into, in GB (default: this device's)")
    command = commands.add_parser("check", help="what would end a run later, all of it, before anything starts")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command = commands.add_parser("plan", help="memory, traffic, disk and time of a job, before it starts")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.add_argument("--gpus", type=int, default=1, help="devices of all nodes together")
    command.add_argument("--gpu-memory", type=float, default=80, help="of one device, in GB (10^9 bytes)")
    command.add_argument("--device", choices=DEVICES, default="h100", help="whose speed times assume")
    command.add_argument("--host-memory", type=float, help="of a node of up to 8 devices, in GB")
    command.add_argument("--model-config", help="config.json of the model, where the model itself is not at hand")
    command.add_argument("--json", action="store_true")
    command = commands.add_parser("eval", help="any model on a config's test rows, judged as the run judges")
    command.add_argument("model", help="Hugging Face folder or hub id")
    command.add_argument("config", type=Path)
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command = commands.add_parser("judge", help="whose responses a judge prefers, a model behind a server")
    for argument in ("first", "second"):
        command.add_argument(argument, type=Path, help="an evaluation in a run's folder, or rows {instruction, output}")
    command.add_argument("out", type=Path, help="JSON lines, a verdict each; the same command goes on there")
    command.add_argument("--url", required=True, help="of the judge's server, as http://localhost:8000/v1")
    command.add_argument("--model", required=True, help="what the server calls the judge")
    command.add_argument("--style", choices=STYLES, default="alpaca_eval")
    command.add_argument("--api-key-env", help="the environment variable that holds the server's key")
    command = commands.add_parser("merge", help="base + delta -> a Hugging Face folder")
    for argument in ("base", "delta", "out"):
        command.add_argument(argument, type=Path)
    command = commands.add_parser("export", help="a stage of a run -> a Hugging Face folder")
    command.add_argument("run", type=Path, help="the run's folder, as runs/NAME")
    command.add_argument("stage", help=f"one of {', '.join(STAGES_WITH_MODELS)}")
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, help="by default the run's first")
    command.add_argument(
        "--push-to-hub", metavar="USER/NAME", help="also uploads the folder there; see `hf auth login`"
    )
    command.add_argument("--private", action="store_true", help="a new repository on the hub is")
    command = commands.add_parser("convert", help="a GGUF file -> a Hugging Face folder; PEFT's adapter <-> a delta")
    command.add_argument("source", type=Path, help="GGUF file, folder of an adapter, or delta.safetensors")
    command.add_argument("out", type=Path, help="folder, of an adapter the delta's file")
    command.add_argument("--base", help="of an adapter or a delta: the model that it was trained on")
    command.add_argument("--to", choices=ADAPTERS, help=f"what a delta becomes (default: {ADAPTERS[0]})")
    command = commands.add_parser("keys", help="every key of a config, with its default and what it does")
    command.add_argument("word", nargs="?", default="", help="in a key's name or its explanation")
    command.add_argument("--markdown", action="store_true", help="all of them, as docs/keys.md")
    command = commands.add_parser("kernels", help="check, compile ahead of time, or measure the kernels")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="check | aot | bench [--json FILE] | --help")
    command = commands.add_parser("env", help="versions and devices")
    return parser
