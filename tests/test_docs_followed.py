"""Commands of README and docs/, done as they stand there, by a user with 40 pairs and a tiny model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import tiny_llama

from allo_fast.__main__ import main
from allo_fast.model.saving import save_model
from tests.tiny import family

ROOT = Path(__file__).parents[1]
MODEL = "models/SmolLM2-135M-Instruct"
DELTA = "08-learn/seed-0/delta.safetensors"
# What docs/runs.md's summary leaves open. What is not done here is done by other tests.
FILLED = {
    "MODEL": MODEL,
    "BASE": MODEL,
    "M": MODEL,
    "ROWS": "my_pairs.jsonl",
    "FILE": "other.yaml",
    "CONFIG": "my.yaml",
    "RUN": "runs/my",
    "STAGE": "learn",
    "DELTA": f"runs/my/{DELTA}",
    "N": "1",
    "G": "16",
    "S": "0",
    "WORD": "beta",
}
ELSEWHERE = ("compare", "convert", "kernels")


def blocks(page: str, section: str) -> list[str]:
    """The lines of its blocks without a language, their remarks left out."""
    text = (ROOT / page).read_text().partition(f"# {section}\n")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"^```\n(.*?)```", text, re.DOTALL | re.MULTILINE)).splitlines()
    return [line.partition("#")[0].strip() for line in lines if "allo-fast" in line]


def do(command: str) -> int:
    program, *words = shlex.split(command)
    assert program.removeprefix(".venv/bin/") == "allo-fast"
    return main(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where the README was followed."""
    folder = tmp_path_factory.mktemp("user")
    tokenizer = family("chatml")
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    save_model(model, tokenizer, folder / MODEL)
    rows = [{"prompt": f"Is {n} even?", "chosen": str(n % 2 == 0), "rejected": f"{n} is a number."} for n in range(40)]
    (folder / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        commands = blocks("README.md", "Your own pairs")
        assert [command.split()[1] for command in commands] == ["init", "check", "run"]
        for command in commands:
            assert do(command) == 0
    return folder


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")


def test_the_readme(place):
    assert (place / "runs/my/report.html").stat().st_size > 10_000


def filled(line: str) -> str:
    """A line of the summary without what may be left out, and what it does."""
    command = re.sub(r"\[[^]]*\]", "", line.partition("  ")[0]).replace("CONFIG | RUN", "CONFIG")
    return " ".join(FILLED.get(word, word) for word in command.split())


SUMMARY = [line for line in blocks("docs/runs.md", "Commands, and runs that end early") if line.startswith("allo-fast")]


@pytest.mark.parametrize("line", [line for line in SUMMARY if not any(word in line for word in ELSEWHERE)])
def test_the_summary(here, line):
    assert do(filled(line).replace(" OUT", " out")) == 0


def test_the_summary_was_found():
    assert len(SUMMARY) > 12 and sum(any(word in line for word in ELSEWHERE) for line in SUMMARY) == 5


def test_serving(here):
    Path("runs/my").rename("runs/polite")
    assert [do(command) for command in blocks("docs/library.md", "Serving")] == [0]
    assert Path("polite/model.safetensors").is_file()


def test_where_only_peft_is_installed(here):
    (exclude,) = re.findall(r"`locate\.exclude: (\[.*?\])`", (ROOT / "docs/library.md").read_text())
    assert do(f"allo-fast run my.yaml name=polite 'locate.exclude={exclude}'") == 0
    assert [do(command) for command in blocks("docs/library.md", "Where only PEFT is installed")] == [0, 0]
    assert Path("adapter/adapter_config.json").is_file() and Path("delta.safetensors").is_file()
