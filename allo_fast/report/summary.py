"""What a run found: summary.json for programs, a table for the terminal."""

import json
from array import array
from itertools import combinations
from statistics import fmean

from allo_fast.config import Config
from allo_fast.data.encoding import count_trained, prompt_digest
from allo_fast.data.intervals import accuracy_interval, difference_interval, mean_interval, problem_values
from allo_fast.data.scoring import REWARD, WINS, pair_margins, scorer_name, scorers_with
from allo_fast.durable import versions, write_bytes
from allo_fast.runs.home import SUMMARY
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.stages import stages_of
from allo_fast.stages.evaluate import PREDICTIONS, model_of
from allo_fast.stages.problems import PROBLEMS

ACCURACIES = {  # by what pairs are scored
    "rewards": "rewards/accuracies",
    "logps": "logps/accuracies",
    "logps_per_token": "logps/accuracies_per_token",
}
Values = dict[str, list[list[float]]]  # by model or metric: per seed one number a problem


def summarize(run: Run) -> dict:
    """Writes summary.json: how good each model is, with intervals, and what each stage cost; every unit is complete."""
    units = run.units(stages_of(run.config))
    manifests = {f"{unit.stage.number:02d}-{unit.name}/{unit.key}": unit.manifest() for unit in units}
    preference = run.config.data.format == "preference"
    summary = {
        "name": run.config.name,
        "protocol": run.config.protocol,
        "seeds": run.config.seeds,
        "data": _data(run),
        **(_preferences if preference else _accuracies)(run.config, _predictions(run)),
        "stages": {
            name: {"seconds": manifest["seconds"], "peak_bytes": manifest["peak_bytes"], **manifest["facts"]}
            for name, manifest in manifests.items()
        },
        "versions": versions(),
    }
    for unit in run.units(["evaluate"]):
        if perplexity := unit.manifest()["facts"].get("perplexity"):
            summary["models"][model_of(unit.key)].setdefault("perplexity", []).append(perplexity)
    write_bytes(run.folder / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def _data(run: Run) -> dict[str, dict[str, int]]:
    """How many rows of data.train and data.test are used, and set aside; trained: test prompts that train, too."""
    units = {"train": run.units(["sample"])[0], "test": next(u for u in run.units(["evaluate"]) if u.key == "base")}
    facts = {key: unit.manifest()["facts"] for key, unit in units.items()}
    data = {key: {"rows": counts["problems"], "set_aside": counts["quarantined"]} for key, counts in facts.items()}
    digests = {key: array("Q", map(prompt_digest, read_jsonl(unit.folder / PROBLEMS))) for key, unit in units.items()}
    data["test"]["trained"] = count_trained(digests["test"], digests["train"])
    return data


def _predictions(run: Run) -> dict[str, list[list[dict]]]:
    """model -> per seed -> predictions, in the order of the test problems; what was given comes before the base."""
    predictions: dict[str, list[list[dict]]] = {}
    for unit in sorted(run.units(["evaluate"]), key=lambda unit: unit.key != "given"):
        predictions.setdefault(model_of(unit.key), []).append(read_jsonl(unit.folder / PREDICTIONS))
    return predictions


def _accuracies(config: Config, predictions: dict[str, list[list[dict]]]) -> dict[str, dict]:
    """Of each model the share of problems that it answers right, and the differences."""
    models, scorer = {}, scorer_name(config.data.scorer)
    for model, seeds in predictions.items():
        scorers = scorers_with(config.data.scorer)
        by_scorer = {name: accuracy_interval([[row[name] for row in rows] for rows in seeds]) for name in scorers}
        accuracy, interval = by_scorer[scorer]
        if model == "base" and REWARD in seeds[0][0]:  # wins over itself
            interval = (0.5, 0.5)
        models[model] = {
            "accuracy": accuracy,
            "n": len(seeds[0]),
            "ci95": interval,
            "seeds": [sum(row[scorer] for row in rows) / len(rows) for rows in seeds],
            "scorers": {name: scores[0] for name, scores in by_scorer.items()},
        }
        models[model] |= sampled_shares(seeds, scorer)
        if REWARD in seeds[0][0]:
            models[model] |= {REWARD: [fmean(row[REWARD] for row in rows) for rows in seeds], "scorers": {}}
        if "tie" in seeds[0][0]:
            models[model]["ties"] = sum(row["tie"] for rows in seeds for row in rows)
    right = {model: [[row[scorer] for row in rows] for rows in seeds] for model, seeds in predictions.items()}
    return {"models": models, "differences": _paired_differences(right)}


def sampled_shares(seeds: list[list[dict]], scorer: str) -> dict[str, dict]:
    """pass@k and maj@k, of predictions that have several responses each."""
    if "majority" not in seeds[0][0]:
        return {}
    k, shares = len(seeds[0][0]["responses"]), {}
    for name, key in (("pass", "pass"), ("maj", "majority")):
        accuracy, interval = accuracy_interval([[row[key][scorer] for row in rows] for rows in seeds])
        shares[f"{name}@{k}"] = {"accuracy": accuracy, "ci95": interval}
    return shares


def _preferences(config: Config, predictions: dict[str, list[list[dict]]]) -> dict[str, dict]:
    """Of each model its `preference_metrics`, with the beta that it was trained with, and differences of accuracies."""
    # Implicit rewards are those of what was trained from the base.
    betas = {
        "given": None,
        "base": None,
        "dpo": config.warmup.beta,
        **dict.fromkeys(("sparse-dpo", "allo"), config.learn.beta),
    }
    models, values = {}, {}
    for model, seeds in predictions.items():
        beta = betas[model]
        values[model], ties = preference_values(seeds, beta)
        pairs = sum(len(pair_margins(row["responses"], beta)["logps"]) for row in seeds[0])
        metrics = preference_metrics(values[model], ties, pairs)
        models[model] = {"n": len(seeds[0]), "pairs": pairs, "beta": beta, "metrics": metrics}
    differences = {}
    for metric in ACCURACIES.values():
        comparable = {model: by_metric[metric] for model, by_metric in values.items() if metric in by_metric}
        differences |= {f"{names}, {metric}": d for names, d in _paired_differences(comparable).items()}
    return {"models": models, "differences": differences}


def preference_values(seeds: list[list[dict]], beta: float | None) -> tuple[Values, dict[str, int]]:
    """By metric the numbers of the problems, whose mean is the mean over pairs; and by accuracy the ties of all seeds.

    rewards/accuracies and rewards/margins as TRL's: the share of pairs whose right response has the higher implicit
    reward, and by how much; logps/accuracies: the higher log-probability; logps/accuracies_per_token: by the token.
    seeds: per seed the predictions.
    """
    margins = [[pair_margins(row["responses"], beta) for row in rows] for rows in seeds]
    values, ties = {}, {}
    for score in margins[0][0]:
        name, of_score = ACCURACIES[score], [[row[score] for row in rows] for rows in margins]
        values[name] = [problem_values([[float(x > 0) for x in pairs] for pairs in rows]) for rows in of_score]
        ties[name] = sum(pairs.count(0) for rows in of_score for pairs in rows)
        if score == "rewards":
            values["rewards/margins"] = [problem_values(rows) for rows in of_score]
    return values, ties


def preference_metrics(values: Values, ties: dict[str, int], pairs: int) -> dict[str, dict]:
    """By metric {mean, ci95: clustered by problem, seeds: each one's mean, ties of an accuracy}; pairs: of one seed."""
    metrics = {}
    for name, numbers in values.items():
        mean, interval = accuracy_interval(numbers, pairs) if name in ties else mean_interval(numbers)
        metrics[name] = {"mean": mean, "ci95": interval, "seeds": [fmean(row) for row in numbers]}
        if name in ties:
            metrics[name]["ties"] = ties[name]
    return metrics


def _paired_differences(values: Values) -> dict[str, dict]:
    """Paired by problem, which is far sharper than comparing two intervals; values: by model."""
    differences = {}
    for worse, better in combinations(values, 2):
        points, interval = difference_interval(values[better], values[worse])
        differences[f"{better} - {worse}"] = {"points": points, "ci95": interval}
    return differences


def table(summary: dict) -> str:
    """How good the models are, as text."""
    models = summary["models"]
    lines = _preference_lines(models) if is_preference(summary) else _accuracy_lines(models)
    for name, difference in summary["differences"].items():
        low, high = difference["ci95"]
        lines.append(f"{name}: {percent(difference['points'], '+')} ({percent(low, '+')} .. {percent(high, '+')})")
    return "\n".join(lines + more_lines(models) + trained_line(summary["data"]["test"]))


def more_lines(models: dict[str, dict]) -> list[str]:
    """What else there is of each model, a number a seed: perplexity of data.text, its responses' rewards."""
    said = {"perplexity": "perplexity of data.text", REWARD: "mean reward"}
    return [
        f"{name}: {words} {' '.join(f'{value:.4g}' for value in model[key])}"
        for key, words in said.items()
        for name, model in models.items()
        if model.get(key)
    ]


def score_name(model: dict) -> str:
    """What `accuracy` is of a model: by a reward model, the share of wins over the base's responses to expect."""
    return "wins" if REWARD in model else "accuracy"


def trained_line(test: dict[str, int]) -> list[str]:
    """What is not held out; none where all is."""
    return [f"data.test: {test['trained']} of {test['rows']} prompts are in data.train, too"] if test["trained"] else []


def is_preference(summary: dict) -> bool:
    return any("metrics" in model for model in summary["models"].values())


def _accuracy_lines(models: dict[str, dict]) -> list[str]:
    first = next(iter(models.values()))
    names = "".join(f" {scorer:>8}" for scorer in first["scorers"])
    lines = [f"{'model':<12}{score_name(first):>10}{'95 % interval':>20}{'n':>7}{names}  per seed"]
    for name, model in models.items():
        scorers = "".join(
            f" {percent(accuracy):>{max(8, len(scorer))}}" for scorer, accuracy in model["scorers"].items()
        )
        seeds = " ".join(map(percent, model["seeds"]))
        interval = shown_interval("accuracy", model["ci95"])
        lines.append(f"{name:<12}{percent(model['accuracy']):>10}{interval:>20}{model['n']:>7}{scorers}  {seeds}")
    return lines + answer_lines(models)


def answer_lines(models: dict[str, dict]) -> list[str]:
    """Of several responses to a problem pass@k and maj@k, and ties."""
    lines = [shares_line(name, model) for name, model in models.items() if any("@" in key for key in model)]
    return lines + [ties_line(name, model["ties"]) for name, model in models.items() if model.get("ties")]


def _preference_lines(models: dict[str, dict]) -> list[str]:
    lines = [f"{'model':<12}{'metric':<28}{'mean':>9}{'95 % interval':>24}{'n':>7}{'pairs':>7}  per seed"]
    ties = []
    for label, model in models.items():
        for name, metric in model["metrics"].items():
            numbers = f"{shown(name, metric['mean']):>9}{shown_interval(name, metric['ci95']):>24}"
            seeds = " ".join(shown(name, mean) for mean in metric["seeds"])
            lines.append(f"{label:<12}{name:<28}{numbers}{model['n']:>7}{model['pairs']:>7}  {seeds}")
            ties += [ties_line(f"{label}, {name}", metric["ties"])] if metric.get("ties") else []
    return lines + ties


def evaluation_line(config: Config, facts: dict, rows: list[dict]) -> str:
    """What `allo-fast eval` says of one model: its facts and predictions, with the beta of the run's last stage."""
    if config.data.format == "preference":
        beta = config.warmup.beta if config.method == "dpo" else config.learn.beta
        metrics = preference_metrics(*preference_values([rows], beta), facts["pairs"])
        parts = [f"{name} {shown(name, m['mean'])} ({shown_interval(name, m['ci95'])})" for name, m in metrics.items()]
        counted = f"{facts['pairs']} pairs of {facts['problems']} problems"
        ties = [ties_line(name, metric["ties"]) for name, metric in metrics.items() if metric.get("ties")]
    else:
        scorers = scorers_with(config.data.scorer)
        by = {scorer: f"by the {scorer} scorer" for scorer in scorers} | {WINS: "of wins over the base"}
        parts = [f"{facts[name] / facts['problems']:.2%} {by[name]}" for name in scorers if name in facts]
        parts += (
            [shares_line("sampled", shares)]
            if (shares := sampled_shares([rows], scorer_name(config.data.scorer)))
            else []
        )
        counted = f"{facts['problems']} problems"
        ties = [ties_line("of these", facts["ties"])] if facts.get("ties") else []
    lost = [f"perplexity of data.text {facts['perplexity']:.4g}"] if "perplexity" in facts else []
    parts += [f"mean reward {facts[REWARD]:.4g}"] if REWARD in facts else []
    return "; ".join([", ".join(parts), f"{counted}, {facts['quarantined']} rows set aside", *ties, *lost])


def shares_line(name: str, model: dict) -> str:
    """pass@k and maj@k of several responses to a problem."""
    parts = [
        f"{key} {percent(shares['accuracy'])} ({shown_interval('accuracy', shares['ci95'])})"
        for key, shares in model.items()
        if "@" in key
    ]
    return f"{name}: {', '.join(parts)}"


def ties_line(name: str, count: int) -> str:
    return f"{name}: {count} ties, counted as wrong"


def shown_interval(metric: str, ends: tuple[float, float] | None) -> str:
    return " .. ".join(shown(metric, end) for end in ends) if ends else "one problem"


def shown(metric: str, value: float) -> str:
    """A share as a percentage, a margin as a number."""
    return f"{value:z.3g}" if metric.endswith("margins") else percent(value)


def percent(value: float, sign: str = "") -> str:
    """To a tenth; what rounds to zero has no minus. sign: "+" for that of a positive number too."""
    return f"{value:{sign}z.1%}"
