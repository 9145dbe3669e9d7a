"""`python -m benchmarks step | scaling | sample | locate | rewards | positions | data | zero | ...`"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

SOURCES = ["rewriter", "confidence", "prompted", "implicit"]
SCORES = ["linear", "snr", "grad_sum", "fisher", "magnitude", "random"]
OURS = ["sparse", "sparse-checkpointed", "sparse-768", "sparse-768-checkpointed", "sparse-rows", "sparse-2-ranks"]
OURS += ["dense"]
THEIRS = ["trl", "trl-checkpointed", "trl-lora", "trl-lora-all", "peft-shira", "peft-supertuning"]
SHAPES = ["chat", "choice", "groups"]
LLAMAS = ["11M", "1B", "8B"]
DTYPES = ["float32", "bfloat16", "bfloat16-model"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = commands.add_parser("step", help="an epoch of DPO against TRL and PEFT: speed, memory, useful tokens")
    command.add_argument("--model", help="Hugging Face folder or hub id (default: a random Llama)")
    command.add_argument("--random", default="11M", choices=LLAMAS, help="how many weights a random Llama has")
    command.add_argument("--dtypes", nargs="+", default=DTYPES[:2], choices=DTYPES, help="-model: rivals' weights, too")
    command.add_argument("--shapes", nargs="+", default=SHAPES, choices=SHAPES, help="of the pairs")
    command.add_argument("--train", type=Path, help="a run's pairs.jsonl instead")
    command.add_argument("--contenders", nargs="+", default=OURS + THEIRS, choices=OURS + THEIRS)
    command.add_argument("--ratio", type=float, default=0.05, help="fraction of the weights that train")
    command.add_argument("--pairs", type=int, default=16, help="of an epoch")
    command.add_argument("--step-pairs", type=int, default=8, help="of an optimizer step")
    command.add_argument("--micro-pairs", type=int, default=8, help="of a forward pass")
    command.add_argument("--repeats", type=int, default=3, help="of which medians are shown")
    command.add_argument("--ours", nargs="*", default=[], metavar="key=value", help="of our train section")
    command.add_argument("--profile", type=Path, help="folder for traces: ours alone, and where its time goes")
    command.add_argument("--out", type=Path, help="JSON file")
    command.set_defaults(command=_step)
    command = commands.add_parser("scaling", help="a step's cost by model size, ratio, lengths, responses")
    command.add_argument("--out", type=Path, help="folder for scaling.json and scaling.svg")
    command.set_defaults(command=_scaling)
    command = commands.add_parser("sample", help="sampling in slots, against padded and continuous batching: tokens/s")
    command.add_argument("--model", help="Hugging Face folder or hub id (default: a random Llama of 11M weights)")
    command.add_argument("--dtype", default="float32")
    command.add_argument("--problems", type=int, default=8)
    command.add_argument("--samples", type=int, default=10, help="responses per problem")
    command.add_argument("--new", type=int, default=128, help="tokens of the longest response")
    command.add_argument("--repeats", type=int, default=3)
    command.add_argument("--generate-batch", action="store_true", help="transformers' too, which takes long on a CPU")
    command.add_argument("--out", type=Path, help="JSON file")
    command.set_defaults(command=_sample)
    command = commands.add_parser("locate", help="what scores at the frozen base select, against the dense warm-up")
    command.add_argument("config", type=Path, help="of a run, whose stages up to the warm-up are run first")
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.add_argument("--scores", nargs="+", default=SCORES, choices=SCORES)
    command.add_argument(
        "--variants", action=argparse.BooleanOptionalAction, default=True, help="of linear: clipping, order, pairs, ..."
    )
    command.add_argument("--out", type=Path, help="folder for locate.json and locate.svg")
    command.set_defaults(command=_locate)
    command = commands.add_parser(
        "rewards", help="token rewards by each source: which tokens, what follows, at what cost"
    )
    command.add_argument("config", type=Path, help="of a run, which is run with each source")
    command.add_argument("overrides", nargs="*", metavar="key.subkey=value")
    command.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    command.add_argument("--out", type=Path, help="JSON file")
    command.set_defaults(command=_rewards)
    command = commands.add_parser("loaded", help="deltas on a live model: applied, removed, swapped, scaled; ms")
    command.add_argument("--model", help="Hugging Face folder or hub id (default: a random Llama of 11M weights)")
    command.add_argument("--dtype", default="float32")
    command.add_argument("--ratio", type=float, default=0.05, help="fraction of the weights that a delta has")
    command.add_argument("--repeats", type=int, default=5)
    command.set_defaults(command=_loaded)
    command = commands.add_parser("positions", help="formats for the selected positions: bytes and decoding time")
    command.add_argument("--weights", type=int, default=100_000_000)
    command.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1])
    command.set_defaults(command=_positions)
    command = commands.add_parser("data", help="preference rows through every stage but for training: time and memory")
    command.add_argument("--rows", type=int, default=100_000)
    command.add_argument("--json", type=Path, help="JSON file")
    command.set_defaults(command=_data)
    command = commands.add_parser("rounding", help="a bfloat16 base to nearest and by chance, against float32: losses")
    command.add_argument("--model", help="Hugging Face folder or hub id (default: a random Llama of 11M weights)")
    command.add_argument("--rates", type=float, nargs="+", default=[5e-7, 5e-6], help="learning rates")
    command.add_argument("--ratio", type=float, default=0.05, help="fraction of the weights that train")
    command.add_argument("--steps", type=int, default=20, help="of each training")
    command.add_argument("--out", type=Path, help="JSON file")
    command.set_defaults(command=_rounding)
    command = commands.add_parser("zero", help="states per rank and traffic per step under DeepSpeed ZeRO 0-3")
    command.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks, on this machine")
    command.add_argument("--dtype", default="bfloat16", help="of the frozen base")
    command.add_argument("--ratio", type=float, default=0.05, help="fraction of the weights that train")
    command.add_argument("--out", type=Path, help="JSON file")
    command.set_defaults(command=_zero)
    command = commands.add_parser("architectures", help="log-probabilities and gradients against plain transformers")
    command.add_argument("names", nargs="*", metavar="NAME", help="of architectures (default: all)")
    command.add_argument("--json", type=Path, help="JSON file")
    command.set_defaults(command=_architectures)
    command = commands.add_parser("gpu", help="check and measure the kernels on this machine's GPU")
    command.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    command.add_argument("--wheels", type=Path, help="folder of wheels of trl, liger-kernel, cut-cross-entropy")
    command.set_defaults(command=_gpu)
    given = parser.parse_args(arguments)
    return given.command(given)


def _step(given: argparse.Namespace) -> int:
    import yaml

    from benchmarks import step

    values = {**vars(given), "ours": {key: yaml.safe_load(value) for key, value in map(_split, given.ours)}}
    settings = step.Settings(**{field.name: values[field.name] for field in fields(step.Settings)})
    if given.profile:
        step.profile(settings, given.profile)
        return 0
    return int(any(row.failed for row in step.run(settings, given.out)))


def _split(pair: str) -> tuple[str, str]:
    key, _, value = pair.partition("=")
    return key, value


def _scaling(given: argparse.Namespace) -> int:
    from benchmarks import scaling

    scaling.run(given.out)
    return 0


def _sample(given: argparse.Namespace) -> int:
    from benchmarks import sample

    sizes = (given.problems, given.samples, given.new, given.repeats)
    sample.run(given.model, given.dtype, *sizes, given.generate_batch, given.out)
    return 0


def _locate(given: argparse.Namespace) -> int:
    from benchmarks import locate

    locate.run(given.config, given.overrides, given.scores, given.variants, given.out)
    return 0


def _rewards(given: argparse.Namespace) -> int:
    from benchmarks import rewards

    rewards.run(given.config, given.overrides, given.sources, given.out)
    return 0


def _loaded(given: argparse.Namespace) -> int:
    from benchmarks import loaded

    loaded.run(given.model, given.dtype, given.ratio, given.repeats)
    return 0


def _positions(given: argparse.Namespace) -> int:
    from benchmarks import positions

    positions.run(given.weights, tuple(given.ratios))
    return 0


def _data(given: argparse.Namespace) -> int:
    from benchmarks import data

    data.run(given.rows, given.json)
    return 0


def _rounding(given: argparse.Namespace) -> int:
    from benchmarks import rounding

    rounding.run(given.model, tuple(given.rates), given.ratio, given.steps, given.out)
    return 0


def _zero(given: argparse.Namespace) -> int:
    from benchmarks import zero

    zero.run(tuple(given.worlds), given.dtype, given.ratio, given.out)
    return 0


def _architectures(given: argparse.Namespace) -> int:
    from benchmarks import architectures

    return int(not all(row.agrees for row in architectures.run(given.names, given.json)))


def _gpu(given: argparse.Namespace) -> int:  # without what the engine needs: a bare GPU machine may not have it
    from benchmarks import gpu

    return int(bool(gpu.run(given.out, wheels=given.wheels).failed))


if __name__ == "__main__":
    sys.exit(main())
