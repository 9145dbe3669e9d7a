"""Signals end a command with one line, and wait where something defers them."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from allo_fast import commands, console, signals
from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.runs.unit import Progress


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_the_first_ends_a_command_with_a_line(monkeypatch, capfd, name, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    monkeypatch.setattr(commands, "run", lambda arguments: os.kill(os.getpid(), getattr(signal, name)))
    assert main(["env"]) == code
    assert capfd.readouterr().err == f"\nallo-fast: ended by {name}; the same command continues\n"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)] == before


@pytest.mark.parametrize("error", [ValueError("could not determine the shape"), UserError("of the disk"), None])
def test_what_a_library_makes_of_it_is_not_taken_for_an_error(monkeypatch, capfd, error):
    def command(options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except signals.Interrupted:
            if error:
                raise error from None
        console.show("stage", (progress for progress in [Progress(1, 2, "step")]))

    monkeypatch.setitem(commands._COMMANDS, "env", command)
    assert main(["env"]) == 143
    assert capfd.readouterr().err.endswith("\nallo-fast: ended by SIGTERM; the same command continues\n")


def test_where_nothing_can_be_raised_the_next_look_does(monkeypatch):
    class Left:
        def __init__(self, end):
            self.end = end

        def __del__(self):
            self.end()

    def command(options):
        Left(lambda: os.kill(os.getpid(), signal.SIGTERM))
        Left(lambda: {}["its own"])
        console.show("stage", (progress for progress in [Progress(1, 2, "step")]))

    said = []
    monkeypatch.setattr(sys, "unraisablehook", hook := lambda args: said.append(args.exc_type))
    monkeypatch.setitem(commands._COMMANDS, "env", command)
    assert main(["env"]) == 143 and said == [KeyError] and sys.unraisablehook is hook


# Where its step was to be finished first, no library was interrupted, and an error is one; but not that nobody listens.
@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no space"), 2, "\nallo-fast: no space\n"),
        (OSError(errno.ENOSPC, "No space", "file"), 2, "\nallo-fast: file: no space left"),
        (OSError(errno.EIO, "the terminal is gone"), 143, "\n\nallo-fast: ended by SIGTERM"),
        (BrokenPipeError(errno.EPIPE, "tee is gone"), 143, "\n\nallo-fast: ended by SIGTERM"),
    ],
)
def test_an_error_before_the_checkpoint_that_was_promised_is_said(monkeypatch, capfd, error, code, said):
    def command(options):
        with signals.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            raise error

    monkeypatch.setitem(commands._COMMANDS, "env", command)
    assert main(["env"]) == code
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "change, sent, left",
    [
        ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", "HUP HUP", 0),  # as nohup does
        ("os.environ['LOCAL_RANK'] = '1'", "TERM TERM INT", signal.SIGTERM),  # of a control group, and of torchrun
        ("os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", "HUP", signal.SIGHUP),  # nowhere to say it
    ],
)
def test_what_goes_on_until_its_step_is_done(change, sent, left):
    lines = [
        "import os, signal",
        "from allo_fast import signals",
        change,
        "with signals.handled(), signals.deferred() as received:",
        f"    for name in '{sent}'.split():",
        "        os.kill(os.getpid(), getattr(signal, 'SIG' + name))",
        "    print(int(received()))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{int(left)}\n")
    assert "second" not in done.stderr


def test_one_rank_says_it(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    signals.say("ended")
    assert capfd.readouterr().err == ""


def test_a_second_ends_at_once_also_where_the_first_waits():
    lines = [
        "import os, signal",
        "from allo_fast import signals",
        "with signals.handled(), signals.deferred() as received:",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    print(int(received()), flush=True)",
        "    os.kill(os.getpid(), signal.SIGINT)",
        "    print('never')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, f"{int(signal.SIGTERM)}\n")
    assert done.stderr.strip() == "SIGTERM: ends after this step and its checkpoint; a second signal ends it at once"


def test_without_a_command_nothing_is_received():
    with signals.deferred() as received:
        assert received() == 0


def test_a_command_hears_them_before_its_imports_which_take_seconds():
    code = (
        "import sys, allo_fast.__main__; print(sorted({'torch', 'transformers', 'numpy', 'pydantic'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_public_names_are_imported_when_they_are_asked_for():
    import allo_fast

    assert all(getattr(allo_fast, name).__name__ == name for name in allo_fast.__all__)
    with pytest.raises(AttributeError, match="module 'allo_fast' has no attribute 'Adapter'"):
        allo_fast.Adapter  # noqa: B018
