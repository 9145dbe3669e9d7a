import json

import pytest
from conftest import read_problems, shared

from allo_fast.config import UserError
from allo_fast.data.arithmetic import arithmetic_row, careless_solution, character_tokenizer
from allo_fast.data.intervals import accuracy_interval, difference_interval
from allo_fast.data.scoring import is_correct

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def lines(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


ROW = {"problem": "1+1", "solution": "The answer is 2", "answer": "2"}


def test_problems_and_slices(tmp_path):
    source = lines(tmp_path, *({**ROW, "problem": str(i)} for i in range(5)))
    problems, quarantined = read_problems(source, "problems")
    assert [p.prompt for p in problems] == ["0", "1", "2", "3", "4"] and not quarantined
    assert problems[0].id == "rows.jsonl:1"
    assert [p.prompt for p in read_problems(source + "[1:3]", "problems")[0]] == ["1", "2"]
    assert [p.prompt for p in read_problems(source + "[:2]", "problems")[0]] == ["0", "1"]


@pytest.mark.parametrize(
    "row, reason",
    [
        ("{torn", "not JSON"),
        ("[1]", "expected an object, got list"),
        ({"problem": "x", "answer": "2"}, "no field 'solution'"),
        ({**ROW, "answer": None}, "answer: expected a text, got None"),
        ({**ROW, "answer": "  "}, "answer: expected a text"),
        ({**ROW, "problem": 3}, "problem: expected a text, got 3"),
    ],
)
def test_bad_rows_are_set_aside_with_the_reason(tmp_path, row, reason):
    problems, quarantined = read_problems(lines(tmp_path, ROW, row), "problems")
    assert len(problems) == 1
    assert quarantined[0].id == "rows.jsonl:2" and reason in quarantined[0].reason


def test_unusable_sources(tmp_path):
    for source, message in (
        (str(tmp_path / "none.jsonl"), "none.jsonl: no such file"),
        (lines(tmp_path, ""), "the file is empty"),
        ("arithmetic:train", "name a slice"),
    ):
        with pytest.raises(UserError, match=message):
            read_problems(source, "problems")
    with pytest.raises(UserError, match="no usable row; .*no field 'problem'"):
        read_problems(lines(tmp_path, {"a": 1}), "problems")


def test_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\n" + json.dumps(ROW).encode())
    problems, quarantined = read_problems(str(path), "problems")
    assert len(problems) == 1 and "not JSON" in quarantined[0].reason


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"problem": "p", "solution": "s", "answer": "a", "answer": "b"}', "the key 'answer' stands twice"),
        (
            '{"problem": "p", "solution": "s", "answer": "a", "x": {"y": [{"z": 1, "z": 1}]}}',
            "the key 'z' stands twice",
        ),
        ('{"problem": "p", "solution": "s", "answer": "a", "x": ' + "[" * 60 + "]" * 60 + "}", "more than 50 deep"),
        (
            '{"problem": "p", "solution": "s", "answer": "a", "x": ' + '{"x":' * 900 + "1" + "}" * 901,
            "more than 50 deep",
        ),
        ('{"problem": ' + "[" * 100_000, "more than 50 deep"),
        (r'{"problem": "p\ud800", "solution": "s", "answer": "a"}', "half a character"),
        ('{"problem": 5, "solution": "s", "answer": "a"}', "problem: expected a text, got 5"),
    ],
    ids=range(7),
)
def test_a_strange_row_is_set_aside_alone(tmp_path, line, reason):
    for text in (f"{json.dumps(ROW)}\n{line}\n{json.dumps(ROW)}", f"[{json.dumps(ROW)},\n{line},{json.dumps(ROW)}\n]"):
        if line.endswith("[") and text[0] == "[":
            continue  # an array that is never closed is no array
        problems, (bad,) = read_problems(lines(tmp_path, text), "problems")
        assert [problem.id for problem in problems] == ["rows.jsonl:1", "rows.jsonl:3"]
        assert bad.id == "rows.jsonl:2" and reason in bad.reason


def test_gsm8k(tmp_path):
    row = {"question": "q", "answer": "It takes 2/2=<<2/2=1>>1 bolt.\n#### 1,000"}
    source = lines(tmp_path, row, {"question": "q", "answer": "no marker"})
    (problem,), (bad,) = read_problems(source, "gsm8k")
    assert problem.solution == "It takes 2/2=1 bolt.\nThe answer is 1,000" and problem.answer == "1,000"
    assert "####" in bad.reason


def test_the_published_codes_problems(tmp_path):
    row = {"input": "q", "output": "It is not 3. The answer is near.\nThe answer is 1,000 ", "level": 2}
    source = lines(tmp_path, row, {"input": "q", "output": "no marker"}, {"input": "q", "output": "The answer is "})
    (problem,), (bad, empty) = read_problems(source, "release")
    assert (problem.prompt, problem.solution, problem.answer) == ("q", row["output"], "1,000")
    assert "ends in 'The answer is" in bad.reason and bad.reason == empty.reason


def test_multiple_choice_in_both_layouts(tmp_path):
    text = {"problem": "Stars are\nOptions:\nlights\nGas balls\nwarm", "answer": "gas balls", "solution": "why"}
    arc = {
        "question_stem": "Stars are",
        "choices": {"text": ["lights", "Gas balls", "warm"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    problems, _ = read_problems(lines(tmp_path, text, arc), "multiple_choice")
    for problem in problems:
        assert problem.prompt == text["problem"] and problem.answer == "Gas balls"
        assert problem.right == ("The answer is Gas balls",)
        assert problem.wrong == ("The answer is lights", "The answer is warm")
    assert [p.solution for p in problems] == ["why", "The answer is Gas balls"]
    _, bad = read_problems(lines(tmp_path, text, {**text, "answer": "moon"}), "multiple_choice")
    assert "expected exactly one of the options" in bad[0].reason


@pytest.mark.parametrize("line", ["Options: ", "Options:\r"])
def test_the_line_of_options(tmp_path, line):
    row = {"problem": f"Which?\n{line}\n red \nblue\n", "answer": "red"}
    ((problem,), _) = read_problems(lines(tmp_path, row), "multiple_choice")
    assert problem.right == ("The answer is red",) and problem.wrong == ("The answer is blue",)


@pytest.mark.parametrize("question", ["Pick one:\nred\nblue", "Which?\nOptions:\nred\nblue\n\nAnswer briefly."])
def test_other_lines_are_no_options(tmp_path, question):
    good = {"problem": "q\nOptions:\na\nb", "answer": "a"}
    rows = lines(tmp_path, good, {"problem": question, "answer": "red"}, {**good, "solution": 5})
    _, (first, second) = read_problems(rows, "multiple_choice")
    assert "expected a line 'Options:'" in first.reason and second.reason == "solution: expected a text, got 5"


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"question": "q", "choices": ["a"], "answerKey": "A"}, "choices.text: expected a list"),
        (
            {"question": "q", "choices": {"text": [1], "label": ["A"]}, "answerKey": "A"},
            "choices.text: expected a list",
        ),
        ({"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "B"}, "exactly one"),
    ],
)
def test_malformed_choices_are_set_aside(tmp_path, row, reason):
    good = {"problem": "q\nOptions:\na\nb", "answer": "a"}
    _, (bad,) = read_problems(lines(tmp_path, good, {"question": "q", **row}), "multiple_choice")
    assert reason in bad.reason


def test_arithmetic_is_right_repeatable_and_held_out():
    train = [arithmetic_row("train", index) for index in range(300)]
    test = [arithmetic_row("test", index) for index in range(300)]
    assert train == [arithmetic_row("train", index) for index in range(300)]
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    for row in train + test:
        numbers = row["problem"].replace("-", "+-").split("+")
        assert sum(map(int, numbers)) == int(row["answer"]) >= 0
        for step in row["solution"].split(". The answer is ")[0].split(", "):
            left, right = step.split("=")
            assert sum(map(int, left.replace("-", "+-").split("+"))) == int(right)
        assert is_correct(row["solution"], row["answer"])


def test_a_careless_solution_reads_the_first_minus_as_a_plus():
    assert careless_solution("17-3+4-5") == "17+3=20, 20+4=24, 24-5=19. The answer is 19"
    for row in (arithmetic_row("train", index) for index in range(100)):
        assert (careless_solution(row["problem"]) == row["solution"]) == ("-" not in row["problem"])


def test_character_tokenizer_round_trip(tmp_path):
    tokenizer = character_tokenizer()
    text = "12+9-3=?#>\nThe answer is 18, -4."
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == text


AROUND = (
    '"beads".',
    "(beads).",
    "`beads`.",
    "'beads'.",
    "**(beads)**.",
    "_beads._",
    "\u201cBeads.\u201d",
    "(beads",
    "beads].",
    "[(beads)]",
)


@pytest.mark.parametrize(
    "response, answer, strict, release",
    [
        ("So. The answer is beads", "beads", True, True),
        ("The answer is beads.", "beads", True, False),
        ("the answer is: **Beads**\nBye", "beads", True, False),
        ("The answer is beads", "Beads", True, False),
        ("The answer is 1. The answer is 2", "2", True, True),
        ("The answer is $1,000.00", "1000", True, False),
        ("The answer is 20%", "20", True, False),
        ("beads", "beads", False, False),
        ("The answer is", "beads", False, False),
        ("The answer is bead", "beads", False, False),
        ("The answer is 12", "2", False, False),
        ("The answer is 1234567", "1234568", False, False),
        ("The answer is .5", "0.50", True, False),
        ("The answer is 5", ".5", False, False),
        ("The answer is -3", "3", False, False),
        ("The answer is 1,2", "12", False, False),
        ("The answer is 0,123", "123", False, False),
        ("The answer is 1,00,000", "100000", False, False),
        ("The answer is -1,234,567.50", "-1234567.5", True, False),
        ("The answer is 1234567890123456789012345678901", "1234567890123456789012345678902", False, False),
        ("The answer is 0.10000000000000000000000000000000", "0.10000000000000000000000000000001", False, False),
        (f"The answer is {'9' * 5000}", f"00{'9' * 5000}.0", True, False),
        ("The answer is \u0663.\u0665", "3.5", True, False),
        ("The answer is .", "0", False, False),
        ("The answer is -", "0", False, False),
        ("The answer is -0", "0", True, False),
        *((f"The answer is {said}", "beads", True, False) for said in AROUND),
        ("The answer is $42$.", "42", True, False),
        ("The answer is (.5).", "0.5", True, False),
        ("The answer is [1,2)", "(1,2]", False, False),
        ("The answer is f(x).", "f(x)", True, False),
        ("The answer is ((1, 2), 3)", "(1, 2), 3", True, False),
        ("The answer is", "?", False, False),
        ("The answer is ?", "?", True, True),
        (f"The answer is {'(' * 3000}7{')' * 3000}", "7", True, False),
    ],
)
def test_scorers(response, answer, strict, release):
    assert is_correct(response, answer) == strict
    assert is_correct(response, answer, "release") == release


@pytest.mark.parametrize("name, ceiling", [("openbookqa_validation", 0.87), ("qasc_train", 0.79)])
def test_the_release_scorer_fails_gold_answers(name, ceiling):
    rows = [json.loads(line) for line in shared(f"data/{name}.jsonl").read_text().splitlines()]
    for scorer, expected in (("strict", 1.0), ("release", ceiling)):
        share = sum(is_correct(row["solution"], row["answer"], scorer) for row in rows) / len(rows)
        assert share == pytest.approx(expected, abs=0.01), scorer


def test_intervals_of_one_seed():
    mean, (low, high) = accuracy_interval([[True] * 45 + [False] * 55])
    assert mean == 0.45 and (low, high) == pytest.approx((0.356, 0.548), abs=2e-3)  # Wilson's, by hand
    mean, interval = accuracy_interval([[False] * 10])
    assert mean == 0 and interval == pytest.approx((0, 0.2775), abs=1e-3)


@pytest.mark.parametrize("right", [0, 1, 39, 40])
def test_an_interval_holds_its_mean_at_any_size(right):
    for count in range(max(1, right), 200):
        mean, (low, high) = accuracy_interval([[True] * right + [False] * (count - right)])
        assert low <= mean <= high, (right, count)


def test_intervals_of_several_seeds():
    one = [True, False] * 50
    _, single = accuracy_interval([one])
    _, copies = accuracy_interval([one, one, one])
    assert copies == pytest.approx(single, abs=1e-3), "three copies of one seed say no more than one"
    apart = [[n < share for n in range(500)] for share in (150, 250, 350)]
    _, (low, high) = accuracy_interval(apart)
    assert low < 0.4 and high > 0.6, "seeds that disagree widen it"


def test_intervals_of_differences():
    one, base = [True, False] * 50, [False] * 100
    mean, (low, high) = difference_interval([one], [[not x for x in one]])
    assert mean == 0 and high == pytest.approx(1.96 / 10, abs=0.01) and low == pytest.approx(-high)
    mean, (low, high) = difference_interval([one], [one])
    assert mean == 0 and low < 0 < high, "never differing is not certainty"
    assert difference_interval([one, one], [base]) == difference_interval([one, one], [base, base])
    assert difference_interval([one, one], [base])[0] == 0.5


@pytest.mark.parametrize("n", [1, 12, 100])
def test_a_difference_is_never_beyond_all(n):
    mean, (low, high) = difference_interval([[True] * n], [[False] * n])
    assert mean == high == 1 and -1 <= low < 1
    mean, (low, high) = difference_interval([[False] * n], [[True] * n])
    assert mean == low == -1 and -1 < high <= 1
