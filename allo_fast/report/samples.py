"""Texts of a run: answers before and after, the first row, and wrong responses with what their tokens weigh."""

from collections import defaultdict
from html import escape

from allo_fast.config import UserError
from allo_fast.data.prompts import as_text
from allo_fast.data.scoring import scorer_name
from allo_fast.method.objectives import Npo
from allo_fast.report.markup import example, section
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages.evaluate import PREDICTIONS, SAMPLES, model_of
from allo_fast.stages.forget import threshold_of, token_weights
from allo_fast.stages.models import tokenizer_of
from allo_fast.stages.problems import PROBLEMS
from allo_fast.training.guard import CHANGE, REPEATED

_SHOWN = 6  # problems, and wrong responses
_LONGEST, _TOKENS = 1200, 400  # characters of a text, and tokens of a wrong response, that are shown


def before_and_after(run: Run) -> str:
    """What the base answers and what trained models do, of problems of data.test: first where they differ."""
    first = _judged(run)
    answers = {model: read_jsonl(unit.folder / PREDICTIONS) for model, unit in first.items()}
    problems, scorer = read_jsonl(first["base"].folder / PROBLEMS), scorer_name(run.config.data.scorer)
    scores = [*zip(*([row.get(scorer, 0) for row in rows] for rows in answers.values()), strict=True)]
    whole, kinds = all(score in (0, 1) for row in scores for score in row), defaultdict(list)
    for number, row in enumerate(scores):
        kinds[row if whole else tuple(score > row[0] for score in row)].append(number)
    order = sorted(kinds, key=lambda kind: (len({*kind}) == 1, -len(kinds[kind])))
    chosen = [kinds[kind][turn] for turn in range(_SHOWN) for kind in order if turn < len(kinds[kind])][:_SHOWN]
    html = ""
    for number in chosen:
        texts = [_response(rows[number]) for rows in answers.values()]
        labels = map("{}: {}{}".format, answers, map(_verdict, scores[number]), (of for of, _ in texts))
        shown = zip(labels, (escape(_cut(text)) for _, text in texts), strict=True)
        html += example(_cut(as_text(problems[number]["prompt"])), *shown)
    said = "Of the first seed; problems on which models differ come before the others, each kind of outcome in turn."
    counts = "; ".join(f"{len(kinds[kind])} {' '.join(map(_verdict, kind))}" for kind in order[:8])
    said += f" In the order {', '.join(answers)}: {counts}." * whole
    return section("Before and after", said, html)


def answers_to_some(run: Run) -> str:
    """Of preferences: what base and trained models answer to a few prompts of data.test, beside the better response."""
    first = _judged(run)
    answers = {
        model: read_jsonl(unit.folder / SAMPLES) for model, unit in first.items() if (unit.folder / SAMPLES).exists()
    }
    if not answers:
        return section("Before and after", "No prompt was answered (evaluate.samples).", "")
    html = ""
    for problem, *rows in zip(read_jsonl(first["base"].folder / PROBLEMS), *answers.values(), strict=False):
        texts = [(model, escape(_cut(row["response"]))) for model, row in zip(answers, rows, strict=True)]
        html += example(
            _cut(as_text(problem["prompt"])),
            *texts,
            ("the better response of the pair", escape(_cut(problem["solution"]))),
        )
    return section("Before and after", "Greedy answers to the first prompts of data.test, of the first seed.", html)


def _judged(run: Run) -> dict[str, Unit]:
    """By model the unit that judged it, of the first seed."""
    first: dict[str, Unit] = {}
    for unit in run.units(["evaluate"]):
        first.setdefault(model_of(unit.key), unit)
    return first


def _verdict(score: float) -> str:
    return {0: "wrong", 1: "right"}.get(score, f"{score:.2f}")


def _response(row: dict) -> tuple[str, str]:
    """Of how many it is the first, where there are several; and it."""
    if "response" in row:
        return "", row["response"]
    return f" of {len(row['responses'])}, of which this is the first", row["responses"][0]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [...]"


def first_row(stage: str, row: dict[str, str]) -> str:
    return example(stage, *((name, escape(_cut(text))) for name, text in row.items()))


def forgotten_tokens(run: Run) -> str:
    """Wrong responses, shaded by what their tokens weigh, beside the right one of their pair."""
    unit: Unit = run.units(["forget"])[0]
    title = "Wrong responses, by token"
    try:
        tokenizer = tokenizer_of(unit)
    except (UserError, OSError) as error:  # a report needs the run alone
        return section(title, f"Not shown: {error}", "")
    rows = read_jsonl(unit.needed("rewards") / "rewards.jsonl")
    chosen = rows[:: max(1, len(rows) // _SHOWN)][:_SHOWN]
    (pairs,) = (made for made in run.units(["pairs"]) if made.key == unit.key)
    right, threshold = _right_ones(pairs, chosen), threshold_of(run.config)
    examples = []
    for row in chosen:
        weights = token_weights(row["rewards"], threshold)
        ids = row["response_ids"]
        tokens = (tokenizer.decode([token]) for token in ids[:_TOKENS])
        wrong = "".join(map(_token, tokens, row["rewards"], weights)) + " [...]" * (len(ids) > _TOKENS)
        beside = right.get((row["id"], row["response"]))
        pair = [("right", escape(_cut(beside)))] if beside is not None else []
        examples.append(example(_cut(as_text(row["prompt"])), ("wrong", wrong), *pair))
    text = "Shade: the token's weight in forgetting; the small number is the reward of a token that weighs something."
    return section(title, text + _forgotten(unit), "".join(examples))


def _token(token: str, reward: float, weight: float) -> str:
    number = f"<sub>{reward:.2f}</sub>" if weight else ""
    return f'<span style="background:rgba(var(--shade),{0.75 * weight:.2f})">{escape(token)}</span>{number}'


def _right_ones(pairs: Unit, chosen: list[dict]) -> dict[tuple[str, str], str]:
    """Of each of these wrong responses a right one."""
    wanted, found = {(row["id"], row["response"]) for row in chosen}, {}
    for pair in read_jsonl(pairs.folder / "pairs.jsonl"):
        if (key := (pair["id"], pair["rejected"])) in wanted:
            found.setdefault(key, pair["chosen"])
        if len(found) == len(wanted):
            break
    return found


def _forgotten(unit: Unit) -> str:
    """What forgetting did to the tokens that it forgets, and to those that it must not."""
    facts = unit.manifest()["facts"]
    gave, cost = facts.get(Npo.CHANGE), facts.get(CHANGE)
    said = []
    if gave is not None:
        said.append(f"Before its last step the log-probability of a forgotten token had changed by {gave:+.3f}")
    if cost is not None:
        said.append(f"After it that of a token of right responses had changed by {cost:+.3f}")
    if (more := facts.get(REPEATED)) is not None:
        said.append(f"The share of greedy responses that repeats runs of four tokens had changed by {more:+.3f}")
    if "ended_before_steps" in facts:
        said.append(f"It ended after {facts['steps']} of {facts['ended_before_steps']} steps")
    if "left_step" in facts:
        said.append(f"What it was after step {facts['left_step']} is left")
    return "".join(f" {sentence}." for sentence in said)
