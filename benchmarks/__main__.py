"""`python -m benchmarks step`"""

import argparse
from pathlib import Path

from benchmarks import step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = commands.add_parser("step", help="one DPO step, dense against sparse: time, peak memory, state bytes")
    command.add_argument("--model", help="Hugging Face folder or hub id (default: a random Llama of 11M weights)")
    command.add_argument("--dtype", default="bfloat16", help="of the frozen base")
    command.add_argument("--ratio", type=float, default=0.05, help="fraction of the weights that train")
    command.add_argument("--steps", type=int, default=5, help="steps measured")
    command.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    step.run(given.model, given.dtype, given.ratio, given.steps, given.out)


if __name__ == "__main__":
    main()
