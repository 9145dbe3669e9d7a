"""`allo-fast`: the commands, within which a signal ends a run where it can go on."""

import sys

from allo_fast import signals


def main(arguments: list[str] | None = None) -> int:
    try:
        with signals.handled():
            from allo_fast import commands  # takes seconds, in which a signal may come

            return commands.run(arguments)
    except signals.Interrupted as interruption:
        signals.say(f"allo-fast: {interruption}")
        return 128 + interruption.number


if __name__ == "__main__":
    sys.exit(main())
