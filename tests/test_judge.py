"""Win rates by a judge behind a server."""

import json
import re

import pytest
from conftest import tiny_llama
from test_server import chosen, serving, transformers_serving, with_serve
from tiny import CHATML, byte_level

from allo_fast.__main__ import main
from allo_fast.compare.judging import STYLES, read_responses, verdict, wins
from allo_fast.config import UserError
from allo_fast.data.intervals import accuracy_interval
from allo_fast.model.saving import save_model
from allo_fast.runs.rows import read_jsonl


def write(path, texts: dict) -> str:
    path.write_text("".join(json.dumps({"instruction": k, "output": v}) + "\n" for k, v in texts.items()))
    return str(path)


QUESTIONS = [f"question {number} of {{first}}?" for number in range(20)]


@pytest.fixture
def files(tmp_path):
    return (
        write(tmp_path / "a.jsonl", {text: f"good {{second}} {text}" for text in QUESTIONS}),
        write(tmp_path / "b.jsonl", {text: f"bad, but longer {text}" for text in reversed(QUESTIONS)}),
    )


def parts(body) -> tuple[str, str, str]:
    return re.fullmatch(
        r"(?s)# Instruction\n\n(.*)\n\n# Response \w\n\n(.*)\n\n# Response \w\n\n(.*)\n\n# Your.*",
        body["messages"][1]["content"],
    ).groups()


def prefers_good(path, body):
    asked, first, second = parts(body)
    assert first.endswith(asked) and second.endswith(asked), "texts stay as they are, whatever braces they have"
    better = first.startswith("good")
    if "m or M" in body["messages"][1]["content"]:
        return 200, chosen(["m" if better else "M"])
    return 200, chosen([f"Mine: 7. [[A=B]]? No.\n[[{'A>>B' if better else 'B>A'}]]"])


@pytest.mark.parametrize("style", STYLES)
def test_the_better_one_wins_in_both_places(files, tmp_path, capsys, style):
    with serving(prefers_good) as (url, asked):
        words = [*files, str(tmp_path / "out.jsonl"), "--url", url, "--model", "judge", "--style", style]
        assert main(["judge", *words]) == 0
        assert len(asked) == 40 and all(body["temperature"] == 0 and body["model"] == "judge" for _, body, _ in asked)
        out = capsys.readouterr().out
        assert "the first wins 100.0% (" in out and "of 20 questions; both orders agree on 100.0%; 0 verdicts" in out
        assert main(["judge", *words]) == 0
        assert len(asked) == 40 and capsys.readouterr().out == out, "nothing is asked twice"
    rows = list(read_jsonl(tmp_path / "out.jsonl"))
    assert [row["order"] for row in rows[:4]] == [0, 1, 0, 1] and [row["score"] for row in rows[:4]] == [1, 0, 1, 0]


def test_a_judge_of_places_sees_no_difference(files, tmp_path, capsys):
    with serving(lambda path, body: (200, chosen(["m"]))) as (url, _):
        assert main(["judge", *files, str(tmp_path / "out.jsonl"), "--url", url, "--model", "x"]) == 0
    assert "the first wins 50.0%" in (out := capsys.readouterr().out) and "both orders agree on 0.0%" in out


def test_what_was_judged_before_it_failed_is_kept(files, tmp_path, capsys, monkeypatch):
    def fails_late(path, body):
        return prefers_good(path, body) if "question 1" not in parts(body)[0] else (401, {})

    words = [*files, str(tmp_path / "out.jsonl"), "--model", "judge"]
    with serving(fails_late) as (url, _):
        assert main(["judge", *words, "--url", url]) == 2
    with serving(prefers_good) as (url, asked):
        assert main(["judge", *words, "--url", url]) == 0
        assert 0 < len(asked) <= 40


def test_what_lies_there_is_not_written_over(files, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = [*files, str(out), "--model", "judge"]
    with serving(prefers_good) as (url, asked):
        assert main(["judge", *words, "--url", url]) == 0
        before = out.read_bytes()
        write(tmp_path / "b.jsonl", {text: "other" for text in QUESTIONS})
        assert main(["judge", *words, "--url", url]) == 2 and out.read_bytes() == before
        for own in ('{"mine": 1}\n', "no JSON\n", "[1]\n"):
            out.write_text(own)
            assert main(["judge", *words, "--url", url]) == 2 and out.read_text() == own
        assert len(asked) == 40 and "out.jsonl: holds something else" in capsys.readouterr().err


@with_serve
def test_transformers_serve_as_a_judge(tmp_path, capsys, monkeypatch):
    """What a model says that never learned to judge is unclear, but it is asked, and what it says is kept."""
    monkeypatch.setattr("allo_fast.compare.judging.MAX_TOKENS", 8)
    tokenizer = byte_level("<|im_start|>", "<|im_end|>", eos="<|im_end|>", template=CHATML)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    save_model(tiny_llama(**sizes), tokenizer, base := tmp_path / "base")
    first, second = (write(tmp_path / f"{name}.jsonl", {"Is it hot?": f"{name}."}) for name in ("yes", "no"))
    with transformers_serving() as url:
        words = [first, second, str(out := tmp_path / "out.jsonl"), "--url", url, "--model", str(base)]
        code = main(["judge", *words])
    rows = list(read_jsonl(out))
    assert len(rows) == 2 and all(row["said"] for row in rows)
    assert (code == 2) == all(row["score"] is None for row in rows)


@pytest.mark.parametrize(
    ("style", "said", "score"),
    [
        ("alpaca_eval", "m", 1.0),
        ("alpaca_eval", " **M**\n", 0.0),
        ("alpaca_eval", "Both are short, and right.\n\nm", 1.0),
        ("alpaca_eval", "The better response is 'M'.", 0.0),
        ("alpaca_eval", "Verdict: m", 1.0),
        ("alpaca_eval", "Hmm", None),
        ("alpaca_eval", "I'm sorry, I cannot decide.", None),
        ("alpaca_eval", "Both are wrong, I\u2019m not sure", None),
        ("alpaca_eval", "m or M", None),
        ("alpaca_eval", "This is 5 m", None),
        ("arena_hard", "[[A>B]] is wrong: [[B>>A]]", 0.0),
        ("arena_hard", "[[A=B]]", 0.5),
        ("arena_hard", "A>B", None),
    ],
)
def test_verdicts(style, said, score):
    assert verdict(STYLES[style], said) == score


def test_wins_by_hand():
    def rows(*pairs):
        return [{"score": score} for pair in pairs for score in pair]

    result = wins(rows((1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, None), (None, None)))
    assert result["wins"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4) and result["questions"] == 4
    assert (result["agree"], result["unclear"]) == (2 / 3, 3)
    assert result["ci95"] == accuracy_interval([[1.0, 1.0, 0.5, 0.5]])[1]
    with pytest.raises(UserError, match="no verdict is clear"):
        wins(rows((None, None)))


def test_what_cannot_be_compared(files, tmp_path, capsys):
    other = write(tmp_path / "c.jsonl", {QUESTIONS[0]: "x"})
    assert main(["judge", files[0], other, str(tmp_path / "o"), "--url", "http://x", "--model", "j"]) == 2
    assert "they answer other instructions: 20 and 1, of which 1 are the same" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl:1: no field 'output'"):
        read_responses(tmp_path / "bad.jsonl")


@pytest.mark.xdist_group("runs")
def test_an_evaluation_of_a_run(finished):
    folder = next(finished[1].glob("*-evaluate/base"))
    found = read_responses(folder)
    predictions = list(read_jsonl(folder / "predictions.jsonl"))
    assert [*found.values()] == [row["response"] for row in predictions] and len(found) == 8
