"""`python -m tests.drills`: what happens to runs that something happens to, as a table; 1 where it is not good.

python -m tests.drills [--only PATTERN] [--fast] [--slow] [--ranks] [--json FILE]
python -m tests.drills inject [--ranks N] [--every K] [--points N] [--kinds kill,half,full]
python -m tests.drills soak [--cycles N] [--seed S]
python -m tests.drills fuzz [--inputs N] [--seed S] [--only-input K]
python -m tests.drills --rivals
"""

import argparse
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0"}
sys.path[:0] = [str(Path(__file__).parents[2] / "kernels")]

# ruff: noqa: E402  # torch reads these variables when it is imported
from tests.drills.drill import Drill
from tests.drills.fuzz import fuzz
from tests.drills.rivals import rivals
from tests.drills.sections import FAST, every
from tests.drills.soak import soak
from tests.drills.states import States
from tests.drills.sweep import sweep

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored by what it runs beside itself


def chosen(options: argparse.Namespace) -> list[Drill]:
    drills = [drill for drill in every() if drill.matches(options.only) and drill.ranks == options.ranks]
    if options.fast:
        return [drill for drill in drills if drill.title in FAST]
    return [drill for drill in drills if not drill.slow or options.slow or drill.title == options.only]


def run_drills(options: argparse.Namespace) -> int:
    if options.rivals:
        return rivals()
    states, rows = States(), []
    try:
        for drill in chosen(options):
            if not rows or rows[-1]["section"] != drill.section:
                print(f"\n## {drill.section}\n\n| verdict | drill | what happened | lost | s |\n|---|---|---|---|---|")
            verdict, seconds = drill.run(states)
            row = {"section": drill.section, "title": drill.title, **vars(verdict), "seconds": round(seconds, 1)}
            rows.append(row)
            cells = (row["grade"], row["title"], row["said"][:300], row["lost"], row["seconds"])
            print("|", " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells), "|", flush=True)
    finally:
        states.close()
    counts = Counter(row["grade"] for row in rows)
    variants = sum(len(drill.variants) for drill in chosen(options))
    print(
        f"\n{len(rows)} drills, {variants} variants: " + ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if counts["silent"] + counts["unclear"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.drills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose 'section: title' has it in it")
    parser.add_argument("--fast", action="store_true", help="those of the test suite")
    parser.add_argument("--slow", action="store_true", help="also those that take minutes")
    parser.add_argument("--ranks", action="store_true", help="those of several processes, instead of the others")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rivals", action="store_true", help="a few faults in TRL's DPOTrainer instead")
    parser.set_defaults(command=run_drills)
    commands = parser.add_subparsers()
    command = commands.add_parser("inject", help="a fault at each operation on files")
    command.add_argument("--ranks", type=int, default=1, dest="world", metavar="N")
    command.add_argument("--every", type=int, default=1, metavar="K", help="only each K-th point")
    command.add_argument("--points", type=int, metavar="N", help="only so many, drawn at random")
    command.add_argument("--kinds", default="kill,half,full", help="of kill, half, full, eio")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=sweep)
    command = commands.add_parser("soak", help="runs that are ended again and again")
    command.add_argument("--cycles", type=int, default=300)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=soak)
    command = commands.add_parser("fuzz", help="files changed at random")
    command.add_argument("--inputs", type=int, default=300)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--only-input", type=int, metavar="K", help="this one alone, as a failure named it")
    command.set_defaults(command=fuzz)
    options = parser.parse_args()
    return options.command(options)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # an interpreter with frozen objects cannot be taken down in order
