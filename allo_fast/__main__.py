"""`allo-fast`: the commands, within which a signal ends a run where it can go on."""

import os
import signal
import sys

from allo_fast import signals
from allo_fast.arguments import parse


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0; 2 where the user has to change something, which is said; 128 and its number after a signal."""
    try:
        with signals.handled():
            options = parse(arguments)
            from allo_fast import commands  # takes seconds, in which a signal may come

            code = commands.run(options)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # whoever read, as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except signals.Interrupted as interruption:
        signals.say(f"allo-fast: {interruption}")
        return 128 + interruption.number


if __name__ == "__main__":
    sys.exit(main())
