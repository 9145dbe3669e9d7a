"""Sampled answers: mathematical equivalence, and what several answers to a problem say together."""

import json
import sys
from types import SimpleNamespace

import pytest

from allo_fast.__main__ import main
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config
from allo_fast.data.scoring import final_answer, is_correct, judge_of, judges_with, scorers_with
from allo_fast.report.summary import sampled_shares, shares_line
from allo_fast.runs.basis import deciding
from allo_fast.stages import STAGES, evaluate
from allo_fast.stages.check import check
from allo_fast.stages.evaluate import judged

SAID = "The answer is {}"
STRICT = {"strict": judge_of("strict")}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (SAID.format("0.5"), "1/2"),
        (SAID.format("50%"), "0.5"),
        (SAID.format(r"$\frac{2}{4}$"), "1/2"),
        (SAID.format("12 apples."), "12"),
        (SAID.format("$1,000"), "1000"),
        (r"So it is \boxed{\sqrt{8}}.", r"2\sqrt{2}"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}, so.", "0.5"),
        (SAID.format("$x + 1$"), "1 + x"),
        (SAID.format(r"\{1, 2\}"), r"\{2, 1\}"),
        (SAID.format("beads."), "beads"),  # what `strict` counts
    ],
)
def test_what_is_equal_is_right(response, answer):
    assert is_correct(response, answer, "math")
    assert is_correct(response, answer) == (answer in ("beads", "1000"))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (SAID.format("0.51"), "1/2"),
        (SAID.format("nothing"), "12"),
        ("12", "12"),  # which is nowhere said to be the answer
        (r"\boxed{12", "12"),
        (SAID.format("13.\n\nProblem: what is 5 + 7? 12"), "12"),
        (SAID.format("(B) $A$"), "A"),
        (SAID.format("$on$"), "no"),
        (SAID.format("0.333"), "1/3"),
        (SAID.format("13") + ", not 12. The answer is 14", "13"),
        (SAID.format("12"), "beads"),
        ("", "12"),
        (SAID.format("9**9**9**9**9"), "5"),
    ],
)
def test_what_is_not_equal_is_wrong(response, answer):
    assert not is_correct(response, answer, "math")


def test_answers_are_parsed_and_never_run(tmp_path):
    code = f"__import__('pathlib').Path('{tmp_path}/ran').touch()"
    for text in (code, f"${code}$", rf"\boxed{{{code}}}"):
        assert not is_correct(SAID.format(text), "1", "math") and not is_correct("1", text, "math")
    assert not [*tmp_path.iterdir()]


def test_without_math_verify_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="data.scorer: math needs math-verify: pip install"):
        is_correct(SAID.format("1"), "2", "math")
    assert is_correct(SAID.format("1"), "1", "strict")
    config = load_config("configs/quickstart.yaml", ["data.scorer=math", "data.train=arithmetic:train[:3]"])
    assert any("data.scorer: math needs math-verify" in problem for problem in check(config).problems)


def test_several_answers_by_hand():
    problem = {"id": "p", "answer": "7"}
    texts = [SAID.format(answer) for answer in ("8", "7", " 7.", "9")]
    row = judged(problem, texts, judges_with("strict"))
    assert row == {
        "id": "p",
        "strict": 0.5,
        "release": 0.25,
        "pass": {"strict": True, "release": True},
        "majority": {"strict": True, "release": True},
        "responses": texts,
    }
    assert final_answer(texts[2]) == final_answer(texts[1])
    tie = judged(problem, texts[:2], STRICT)
    assert (tie["strict"], tie["pass"], tie["majority"]) == (0.5, {"strict": True}, {"strict": False}), (
        "the first drawn"
    )
    silent = judged(problem, ["no", "none", texts[1]], STRICT)
    assert silent["majority"] == {"strict": True}, "no answer is none"
    assert judged(problem, ["no", "none"], STRICT)["majority"] == {"strict": False}
    boxed = judged(problem, [rf"\boxed{{{answer}}}" for answer in (8, 7, 7)], {"math": judge_of("math")})
    assert (boxed["math"], boxed["majority"]) == (2 / 3, {"math": True})
    assert judged(problem, texts[1:2], STRICT) == {"id": "p", "strict": True, "response": texts[1]}


def test_shares_of_several_answers():
    def row(passes, majority):
        return {"pass": {"strict": passes}, "majority": {"strict": majority}, "responses": [""] * 3}

    seeds = [[row(True, True), row(True, False)], [row(False, False), row(True, False)]]
    shares = sampled_shares(seeds, "strict")
    assert [shares[key]["accuracy"] for key in ("pass@3", "maj@3")] == [0.75, 0.25]
    assert shares_line("allo", {"n": 2, **shares}).startswith("allo: pass@3 75.0% (")
    assert sampled_shares([[{"strict": True}]], "strict") == {}


def test_every_evaluation_counts_by_both_and_by_what_was_asked():
    assert scorers_with("release") == ("strict", "release") and scorers_with("math") == ("strict", "release", "math")


def test_options_are_judged_alike_by_every_scorer():
    row, tied = (
        {"responses": [{"text": "a"}, {"text": "b"}]},
        [{"logp": -1.0, "tokens": 1, "correct": c} for c in (0, 1)],
    )
    chosen = evaluate._chosen(row, tied, "math")
    assert [chosen[scorer] for scorer in ("strict", "release", "math")] == [0, 0, 0] and chosen["tie"]


def test_answers_end_where_sampled_responses_do(monkeypatch):
    """What follows is another problem's."""
    said = f"{SAID.format(5)}\n\nProblem: 2+2?\n{SAID.format(4)}"
    monkeypatch.setattr(evaluate, "generate", lambda *given, **settings: [[said]])
    config = Config(name="x", data={"train": "a", "test": "b", "format": "gsm8k"}, model={"name_or_path": "m"})
    problem = {"id": "0", "prompt_ids": [1], "answer": "5"}
    frozen, prompts = (SimpleNamespace(model=None, sharded=False), SimpleNamespace(tokenizer=None, end_tokens=[]))
    (row,) = evaluate._answered(frozen, prompts, [problem], 0, config, STRICT)
    assert row == {"id": "0", "strict": True, "response": SAID.format(5)} and not is_correct(said, "5")
    config.sample.stop = []
    (row,) = evaluate._answered(frozen, prompts, [problem], 0, config, STRICT)
    assert row["response"] == said and not row["strict"]


def test_where_answers_end_decides_only_where_there_are_any():
    for format, choices, decides in (
        ("gsm8k", "likelihood", True),
        ("multiple_choice", "generation", True),
        ("multiple_choice", "likelihood", False),
        ("preference", "likelihood", False),
    ):
        entries = {"data.format": format, "evaluate.choices": choices, "sample.stop": []}
        assert ("sample.stop" in deciding(entries)) == decides
    assert "sample.stop" in deciding({"data.format": "preference", "sample.stop": []}), "of a stage that samples"
    assert "sample.stop" in STAGES["evaluate"].settings


@pytest.mark.xdist_group("runs")
def test_a_run_that_samples_its_answers(copied, capsys):
    config, folder = copied
    words = [str(config), "evaluate.num_return_sequences=3", "data.scorer=math", "data.test=arithmetic:test[:5]"]
    assert main(["run", *words, "seeds=[0]", "rivals=[]", "method=sparse-dpo", "name=sampled"]) == 0
    out = capsys.readouterr().out
    assert "strict  release     math" in out and "sparse-dpo: pass@3 " in out and ", maj@3 " in out
    base = json.loads((folder.parent / "sampled/summary.json").read_text())["models"]["base"]
    assert set(base["scorers"]) == {"strict", "release", "math"} and base["pass@3"]["accuracy"] >= base["accuracy"]
    rows = (folder.parent / "sampled/09-evaluate/base/predictions.jsonl").read_text().splitlines()
    texts = [json.loads(row)["responses"] for row in rows]
    assert len(texts) == 5 and len({text for row in texts for text in row}) > 5, "each is drawn by itself"
    assert main(["eval", str(folder.parent / "sampled/00-pretrain/base/model"), *words]) == 0
    said = capsys.readouterr().out
    assert "by the math scorer" in said and "sampled: pass@3" in said
    assert f"{base['accuracy']:.2%} by the math scorer" in said, "the same draws"
