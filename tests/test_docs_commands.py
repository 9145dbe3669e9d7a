"""Every command in README and docs/ is one: its words are understood, its configs are there and take its settings."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from allo_fast import arguments
from allo_fast.__main__ import main as allo_fast
from allo_fast.compare.arms import Comparison
from allo_fast.config_file import load_config
from benchmarks import walkthrough
from benchmarks.__main__ import main as benchmarks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PROGRAM = r"(?:\.venv/bin/)?allo-fast|(?:[A-Z_]+=\S+ )*python -m benchmarks(?:\.walkthrough)?|make"
SYNOPSIS = re.compile(r"[\[|]|\.\.\.|\b[A-Z]{3,}\b(?!=)")  # that says what may stand there


def commands() -> list:
    """(page, command), of code blocks a line each, of spans whole."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        spans = re.findall(rf"`((?:{PROGRAM}) [^`]*)`", re.sub("```.*?```", "", text, flags=re.DOTALL))
        blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        lines = re.findall(rf"^(?:\$ )?((?:{PROGRAM}) .*?)(?:  +.*)?$", blocks, re.MULTILINE)
        for said in (*spans, *lines):
            found[" ".join(re.split("  #| && | > ", said)[0].split())] = page.name
    return [pytest.param(command, id=f"{page}: {command}"[:80]) for command, page in found.items()]


class Parsed(Exception):
    """What an argument parser made of the words."""


@pytest.fixture
def parsed(monkeypatch):
    """How benchmarks understand their words, none of which is done."""
    plain = argparse.ArgumentParser.parse_args

    def stop(parser, words):
        raise Parsed(plain(parser, words))

    def parse(main, words):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Parsed):
            main(words)

    return parse


@pytest.mark.parametrize("command", commands())
def test_it_is_a_command(command, parsed):
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch("[A-Z_]+=.*", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "python":
        main, words = (walkthrough.main if "walkthrough" in words[2] else benchmarks), words[3:]
        if not SYNOPSIS.search(command):
            parsed(main, words)
    elif SYNOPSIS.search(command) or len(words) == 2:
        assert words[1] in ("STAGE", *_commands())
    else:
        options = arguments.parse(words[1:])
        config = getattr(options, "config", None)
        if config and (ROOT / config).exists():
            (Comparison.load if options.name == "compare" else load_config)(ROOT / config, options.overrides)


def _commands() -> list[str]:
    """Of `allo-fast`."""
    (commands,) = (a for a in arguments._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return list(commands.choices)


def test_some_were_found():
    found = [parameter.values[0] for parameter in commands()]
    assert len(found) > 40 and any(command.startswith(".venv/bin/allo-fast init") for command in found)


def test_every_command_is_in_the_docs(capsys):
    with pytest.raises(SystemExit):
        allo_fast(["--help"])
    text = (ROOT / "docs/runs.md").read_text()
    assert all(
        re.search(rf"allo-fast {name}\b", text) or name in arguments.STAGES for name in {*_commands()} - {"judge"}
    )
