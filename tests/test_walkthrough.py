"""`python -m benchmarks.walkthrough`: what it runs, shows and refuses; the walk itself takes half an hour."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import walkthrough
from benchmarks.walkthrough import ROOT, STEPS, Step, Taken, page, shown, walk


@pytest.fixture
def repository(tmp_path):
    """With one commit."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_steps_run_in_a_clone_as_they_stand(repository, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (repository / "a.txt").write_text("not committed\n")
    steps = [Step("", "cat a.txt b.txt; pwd; echo $PYTHONPATH.", "b.txt", "two\n"), Step("", "echo 3 >&2")]
    taken = walk(steps, str(repository), tmp_path / "clone")
    assert [each.printed for each in taken] == ["one\ntwo\n~/allo-fast\n.", "3"] and taken[0].seconds > 0
    assert "echo 3" in capsys.readouterr().out


def test_a_step_that_fails_ends_the_walk(repository, tmp_path):
    with pytest.raises(SystemExit, match="(?s)false: 1.*told"):
        walk([Step("", "echo told; false"), Step("", "touch after")], str(repository), tmp_path / "clone")
    assert not (tmp_path / "clone/after").exists()


def test_what_is_shown_has_no_progress_and_is_not_endless(tmp_path):
    bars = "learn:  20%|##   | 1/5\nstep\rstep 2\nsaved 5it [00:01, 3it/s]\nWARNING: Location 'file:///x' is ignored\n"
    assert shown("made\n\n", bars + "warned  \n", tmp_path) == "made\nwarned"
    lines = shown("\n".join(map(str, range(100))), "", tmp_path).splitlines()
    assert (
        lines[:24] == list(map(str, range(24)))
        and lines[24] == "[...]"
        and lines[25:] == list(map(str, range(76, 100)))
    )


def test_the_page_has_every_step_and_its_time():
    text = page(
        [Step("First:", "run a", "f.py", "x = 1\n"), Step("Then:", "run b")], [Taken("A", 100), Taken("B", 2)], "x"
    )
    assert "1 min 42 s in all on x." in text and "`f.py`:\n\n```python\nx = 1\n```" in text
    assert re.findall(r"\$ (.*)\n(.*)\n```\n\n(.*)", text) == [("run a", "A", "1 min 40 s"), ("run b", "B", "2.0 s")]


def test_the_pairs_are_two_hundred(tmp_path):
    (tmp_path / "make_pairs.py").write_text(walkthrough.PAIRS)
    subprocess.run([sys.executable, "make_pairs.py"], cwd=tmp_path, check=True)
    rows = [json.loads(line) for line in (tmp_path / "my_pairs.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 200
    assert all(row["chosen"] in row["rejected"] and row["chosen"] != row["rejected"] for row in rows)


def test_the_page_in_docs_is_of_these_steps():
    """Whoever changes a step takes the walk again."""
    commands = re.findall(r"^\$ (.*)$", (ROOT / "docs/walkthrough.md").read_text(), re.MULTILINE)
    assert commands == [step.command for step in STEPS]
