"""How one model does on the test rows. `allo-fast evaluate CONFIG`; `allo-fast eval MODEL CONFIG` for any model.

Sampled problems: a greedy response, whose final answer must match; or `evaluate.num_return_sequences` sampled ones, of
which the share that is right is pass@1, any right one pass@k, and the commonest answer maj@k. All end at `sample.stop`.
Multiple choice: the response with the highest sum of its tokens' log-probabilities wins, as in the paper's tasks. The
sum favours short options; `per_token` says whether the highest mean is right too. With `evaluate.choices: generation`
they are answered as sampled problems are.
Preferences: each pair of a right and a wrong response, by the implicit rewards beta (log pi - log pi0) against the base
model, evaluated before, and by log-probabilities alone, which say more of lengths than of preferences. The base has no
implicit rewards, nor has the model of which `sft` made it.
With `data.scorer: reward_model:FOLDER` a response's score is sigmoid(its reward - that of the base's), the probability
that it wins by Bradley and Terry: of the base itself one half; of several responses the mean over all pairs.

Models are judged in `model.dtype`; a dense warm-up, which is saved in float32, loses there what rounding takes from it.
A tie is wrong, and counted; a score that is not finite is an error. Writes predictions.jsonl: {id, strict, release
(right by either scorer), response} of sampled problems, or {..., pass, majority, responses} of several; of multiple
choice {..., per_token, tie, responses}; of preferences {id, responses}. Where a reward model judges, {id, reward_model,
reward, response}, of several responses the mean reward, and `rewards`. Responses of choices and preferences are {logp,
tokens, correct, ref_logp (by the base model)} in the row's order. samples.jsonl: {id, response}, of preferences, the
greedy answers to the first `evaluate.samples` prompts, for a reader.
"""

import logging
import math
from collections import Counter
from collections.abc import Generator, Mapping
from itertools import product
from pathlib import Path
from statistics import fmean, mode

from allo_fast.config import Config, DataConfig, UserError
from allo_fast.data.prompts import Prompts
from allo_fast.data.scoring import (
    REWARD,
    WINS,
    before_stop,
    best_response,
    final_answer,
    is_tie,
    judges_with,
    pair_margins,
    scorers_with,
)
from allo_fast.data.verifier import Judge, judging_model
from allo_fast.model.generation import generate
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.reward import RewardModel
from allo_fast.runs.rows import Rows, by_chunks, read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages.models import Inference, base_path, inference, made_in, prompts_of
from allo_fast.stages.perplexity import perplexity
from allo_fast.stages.problems import PROBLEMS, QUARANTINE, unit_problems
from allo_fast.stages.scores import response_logps

logger = logging.getLogger(__name__)

PREDICTIONS, SAMPLES = "predictions.jsonl", "samples.jsonl"
_SAMPLE_TOKENS = 256  # of a sample's answer, at most
# The stage that makes each model; none the base, nor the given one where `sft` made the base of it.
PRODUCERS = {"given": None, "base": None, "dpo": "warmup", "allo": "learn", "sparse-dpo": "learn"}


def model_of(key: str) -> str:
    """Which model a unit judges: base, given, or what trained it (`sparse-dpo` of `sparse-dpo-seed-0`)."""
    return key.partition("-seed-")[0]


def execute(unit: Unit) -> Generator[Progress, None, dict]:
    producer = PRODUCERS[model_of(unit.key)]
    path, delta = made_in(unit, unit.needed(producer)) if producer else (base_path(unit), None)
    facts = yield from evaluate(unit, path, unit.needed("evaluate") if unit.key != "base" else None, delta=delta)
    return facts


def compares_with_base(config: Config) -> bool:
    return config.data.format == "preference" or judging_model(config) is not None


def evaluate_alone(run: Run, path: str | Path, base: str | Path) -> Generator[Progress, None, tuple[dict, list[dict]]]:
    """The facts and predictions of the model at `path`; preferences also against the one at `base`, where that goes."""
    unit, against = Unit(run, "evaluate", "model"), None
    if compares_with_base(run.config) and Path(path).resolve() != Path(base).resolve():
        try:
            against = yield from _evaluate_base(Unit(run, "evaluate", "base"), base, path)
        except UserError as error:
            logger.warning("not compared with the base: %s", error)
    unit.folder.mkdir(parents=True)
    facts = yield from evaluate(unit, path, against)
    return facts, list(read_jsonl(unit.folder / PREDICTIONS))  # the folder may go


def _evaluate_base(unit: Unit, path: str | Path, reader: str | Path) -> Generator[Progress, None, Path]:
    """The folder of the evaluation of the base at `path`, on the rows as the model at `reader` reads them."""
    preference = unit.config.data.format == "preference"
    if preference and load_tokenizer(path).get_vocab() != load_tokenizer(reader).get_vocab():
        raise UserError(f"{reader} has another vocabulary than {path}")
    unit.folder.mkdir(parents=True)
    yield from evaluate(unit, path, reader=reader)
    return unit.folder


def evaluate(
    unit: Unit,
    path: str | Path,
    against: Path | None = None,
    reader: str | Path | None = None,
    delta: Path | None = None,
) -> Generator[Progress, None, dict]:
    """How the model at `path`, with a delta of it if any, does, and how many test rows were set aside.

    against: the folder of the base model's evaluation, whose rows are judged, token by token the same, and whose
    log-probabilities implicit rewards compare with. reader: the model whose tokenizer and template read the rows; None:
    the one at `path`. Raises UserError for scores that are not finite.
    """
    prompts = prompts_of(unit.config, load_tokenizer(reader or path))
    problems, quarantined = _problems(unit, prompts, against, path, reader or path)
    scoring = bool(problems[0]["responses"]) and not unit.config.generates_answers
    reference = read_jsonl(against / PREDICTIONS) if against and not (scoring and unit.key == "given") else None
    judges = {} if scoring else _judges(unit.config)
    with inference(unit, path, delta, scoring=scoring) as frozen:

        def work(chunk: list[dict], start: int) -> list[dict]:
            judged = reference[start : start + len(chunk)] if reference else [None] * len(chunk)
            if not scoring:
                answers = _answered(frozen, prompts, chunk, start, unit.config, judges)
                return [_won(*row, is_base=unit.key == "base") for row in zip(answers, judged, strict=True)]
            logps = response_logps(frozen, chunk)
            return [_scored(unit, delta or path, *row) for row in zip(chunk, logps, judged, strict=True)]

        size = unit.config.evaluate.batch_size
        size = size if scoring else frozen.at_once(size)
        rows = yield from by_chunks(unit, PREDICTIONS, problems, size, "problem", work, frozen.sharded)
        if unit.config.data.format == "preference" and unit.config.evaluate.samples and not frozen.sharded:
            yield from _samples(unit, frozen, prompts, problems[: unit.config.evaluate.samples])
    lost = (yield from perplexity(unit, path, delta, reader or path)) if unit.config.data.text else {}
    return {"problems": len(rows), "quarantined": quarantined, **_counts(rows, unit.config.data), **lost}


def _samples(unit: Unit, frozen: Inference, prompts: Prompts, problems: Rows) -> Generator[Progress, None, Rows]:
    tokens = min(unit.config.evaluate.max_new_tokens, _SAMPLE_TOKENS)

    def work(chunk: list[dict], start: int) -> list[dict]:
        asked = [problem["prompt_ids"] for problem in chunk]
        texts = generate(frozen.model, prompts.tokenizer, asked, prompts.end_tokens, max_new_tokens=tokens, first=start)
        return [{"id": row["id"], "response": text} for row, (text,) in zip(chunk, texts, strict=True)]

    return by_chunks(unit, SAMPLES, problems, len(problems), "sample", work, sharded=False)


def _problems(unit: Unit, prompts: Prompts, against: Path | None, *paths: str | Path) -> tuple[Rows, int]:
    """The test rows that the models at `paths` can read, and how many were set aside; or those of the base."""
    if against:
        return read_jsonl(against / PROBLEMS), len(read_jsonl(against / QUARANTINE))
    return unit_problems(unit, "test", prompts, unit.config.evaluate.max_new_tokens, *paths)


def _scored(unit: Unit, path: str | Path, row: dict, logps: list[float], reference: dict | None) -> dict:
    """reference: what the base's evaluation found of the row."""
    if not all(map(math.isfinite, logps)):
        raise UserError(f"{path}: the log-probabilities of the responses to {row['id']} are {logps}: not finite")
    responses = [
        {"logp": logp, "tokens": len(response["ids"]), "correct": response["correct"]}
        for logp, response in zip(logps, row["responses"], strict=True)
    ]
    if unit.config.data.format != "preference":
        return {"id": row["id"], **_chosen(row, responses, unit.config.data.scorer), "responses": responses}
    if reference:
        for response, judged in zip(responses, reference["responses"], strict=True):
            response["ref_logp"] = judged["logp"]
    return {"id": row["id"], "responses": responses}


def _chosen(row: dict, responses: list[dict], scorer: str) -> dict:
    """Which response wins: there is no text to judge, so all scorers agree."""
    logps = [response["logp"] for response in responses]
    best = best_response(logps, responses)
    per_token = best_response([response["logp"] / response["tokens"] for response in responses], responses)
    return {
        **dict.fromkeys(scorers_with(scorer), responses[best]["correct"]),
        "per_token": responses[per_token]["correct"],
        "tie": is_tie(logps, responses),
        "response": row["responses"][best]["text"],
    }


def _judges(config: Config) -> Mapping[str, Judge]:
    """Of a reward model, which is loaded now, the rewards."""
    if path := judging_model(config):
        return {REWARD: RewardModel(path, config.model, config.data.prompt_template)}
    return judges_with(config.data.scorer)


def _won(answered: dict, reference: dict | None, is_base: bool) -> dict:
    """With the probability that it wins against the base's, where both are known and have rewards."""
    if REWARD not in answered or not (reference or is_base):
        return answered
    own, others = (row.get("rewards", [row[REWARD]]) for row in (answered, reference or answered))
    chances = [0.5 + 0.5 * math.tanh((a - b) / 2) for a, b in product(own, others)]  # the sigmoid, without overflow
    return answered | {WINS: fmean(chances)}


def _answered(
    frozen: Inference, prompts: Prompts, chunk: list[dict], start: int, config: Config, judges: Mapping[str, Judge]
) -> list[dict]:
    """start: the number of the chunk's first problem, which decides what is drawn."""
    settings, several = config.evaluate, config.evaluate.num_return_sequences > 1
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p} if several else {}
    answers = generate(
        frozen.model,
        prompts.tokenizer,
        [problem["prompt_ids"] for problem in chunk],
        prompts.end_tokens,
        max_new_tokens=settings.max_new_tokens,
        first=start,
        num_return_sequences=settings.num_return_sequences,
        rows=settings.batch_size * settings.num_return_sequences,
        sharded=frozen.sharded,
        **sampling,
    )
    cut = [[before_stop(text, config.sample.stop) for text in texts] for texts in answers]
    return [judged(problem, texts, judges) for problem, texts in zip(chunk, cut, strict=True)]


def judged(problem: dict, texts: list[str], judges: Mapping[str, Judge]) -> dict:
    """A row of predictions.jsonl.

    Of several responses `pass` is the best one's score, and the majority's answer is the commonest text, the first of
    equals; no answer is none, unless no response has one.
    """
    right = [{scorer: judge(text, problem) for scorer, judge in judges.items()} for text in texts]
    if len(texts) == 1:
        return {"id": problem["id"], **right[0], "response": texts[0]}
    if REWARD in judges:
        rewards = [row[REWARD] for row in right]
        return {"id": problem["id"], REWARD: fmean(rewards), "rewards": rewards, "responses": texts}
    answers = [final_answer(text) for text in texts]
    votes = [answer for answer in answers if answer is not None] or answers
    return {
        "id": problem["id"],
        **{scorer: fmean(row[scorer] for row in right) for scorer in judges},
        "pass": {scorer: max(row[scorer] for row in right) for scorer in judges},
        "majority": right[answers.index(mode(votes))],
        "responses": texts,
    }


def _counts(rows: Rows, data: DataConfig) -> dict[str, int | float]:
    """How many are right, and how many ties are among the others; of preferences, how many pairs there are and tie."""
    counts = Counter()
    counted = {name: name for name in (*scorers_with(data.scorer), "per_token")} | {"tie": "ties"}
    for row in rows:
        if data.format != "preference":
            counts.update({count: row[name] + 0 for name, count in counted.items() if name in row})
        else:
            margins = pair_margins(row["responses"], 1.0)
            counts.update(pairs=len(margins["logps"]))
            counts.update({f"{score}/ties": of_pairs.count(0) for score, of_pairs in margins.items()})
    rewards = {REWARD: fmean(row[REWARD] for row in rows)} if REWARD in rows[0] else {}
    return dict(counts) | rewards
