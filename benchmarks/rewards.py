"""Token rewards by each source, on one job: do they tell wrong tokens from right ones, what follows, what it costs.

A token of a wrong response is wrong where the smallest edit to a correct response of its problem (the nearest of those
that were sampled, or the gold solution where none was) replaces or removes it. auc: how often a wrong token has a lower
reward than a right one, ties as a half. shaded: at the job's threshold. The whole method runs with each source after
another, from the same responses, in a run NAME-rewards.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from allo_fast.__main__ import main
from allo_fast.config import Config
from allo_fast.config_file import load_config
from allo_fast.durable import versions
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES
from allo_fast.stages.forget import threshold_of, token_weights
from allo_fast.stages.responses import REWARDS, wrong_responses

Weights = dict[tuple, list[float]]  # of a response's tokens in forgetting


@dataclass(frozen=True)
class Row:
    source: str
    auc: float  # of all seeds' tokens
    wrong_shaded: float  # share of the wrong tokens
    right_shaded: float  # share of the right ones
    accuracy: float  # after the whole method
    seconds: float  # of the stage, a seed
    peak_mib: float
    bytes_per_weight: float | None


def run(path: Path, overrides: list[str], sources: list[str], out: Path | None) -> list[Row]:
    """Prints a table; writes JSON when `out` is given."""
    config, rows, weights = load_config(path, overrides), [], {}
    if config.data.format == "preference":
        raise SystemExit("data.format: preference has no right answers to compare with")
    if config.method != "allo":
        raise SystemExit(f"method: {config.method} has no token rewards")
    overrides = [*overrides, f"name={config.name}-rewards"]  # the job's own run stays as it is
    print(
        f"{'source':<12}{'auc':>7}{'wrong_shaded':>14}{'right_shaded':>14}{'accuracy':>10}{'seconds':>9}{'peak_mib':>10}"
    )
    for source in sources:
        row, weights[source] = _measured(path, config, overrides, source)
        rows.append(row)
        print(
            f"{row.source:<12}{row.auc:>7.3f}{row.wrong_shaded:>14.3f}{row.right_shaded:>14.3f}{row.accuracy:>10.3f}"
            f"{row.seconds:>9.1f}{row.peak_mib:>10.0f}",
            flush=True,
        )
    agreement = {f"{a}, {b}": _agreement(weights[a], weights[b]) for a in sources for b in sources if a < b}
    for pair, share in agreement.items():
        print(f"{pair:<26} shade the same tokens: {share:.3f}")
    if out:
        facts = {"config": config.model_dump(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
        out.write_text(json.dumps({**facts, "agreement": agreement, "rows": [*map(asdict, rows)]}, indent=1))
    return rows


def _measured(path: Path, config: Config, overrides: list[str], source: str) -> tuple[Row, Weights]:
    words = [*overrides, f"rewards.source={source}"]
    if main(["run", str(path), *words, "--rerun"]):
        raise SystemExit(f"{source} failed")
    owner = Run(load_config(path, words), STAGES)
    units = [Unit(owner, "rewards", f"seed-{seed}") for seed in config.seeds]
    responses = {(unit.seed, *response): tokens for unit in units for response, tokens in _tokens(unit).items()}
    wrong, rewards, weights = torch.tensor([token for tokens in responses.values() for token in tokens]).T
    manifests, summary = [unit.manifest() for unit in units], json.loads((owner.folder / "summary.json").read_text())
    row = Row(
        source=source,
        auc=auc(-rewards, wrong.bool()),
        wrong_shaded=float(weights[wrong.bool()].mean()),
        right_shaded=float(weights[~wrong.bool()].mean()),
        accuracy=summary["models"][config.method]["accuracy"],
        seconds=sum(manifest["seconds"] for manifest in manifests) / len(manifests),
        peak_mib=max(manifest["peak_bytes"] for manifest in manifests) / 2**20,
        bytes_per_weight=manifests[0]["facts"].get("state_bytes_per_parameter"),
    )
    return row, {response: [weight for _, _, weight in tokens] for response, tokens in responses.items()}


def _tokens(unit: Unit) -> dict[tuple, list[tuple[float, float, float]]]:
    """Of each response's tokens: is it wrong, its reward, its weight in forgetting."""
    correct = {(row["id"], tuple(row["response_ids"])): row["correct"] for row in wrong_responses(unit)}
    tokens = {}
    for row in read_jsonl(unit.folder / REWARDS):
        ids = row["response_ids"]
        nearest = min(correct[row["id"], tuple(ids)], key=lambda other: Levenshtein.distance(ids, other))
        wrong = {edit.src_pos for edit in Levenshtein.editops(ids, nearest) if edit.tag != "insert"}
        weights = token_weights(row["rewards"], threshold_of(unit.config))
        tokens[row["id"], *ids] = [(float(i in wrong), row["rewards"][i], weights[i]) for i in range(len(ids))]
    return tokens


def auc(scores: Tensor, positive: Tensor) -> float:
    """How often a positive's score is above a negative's, ties as a half (Mann-Whitney); both [N]."""
    values, places = scores.unique(return_inverse=True)
    above = torch.zeros(len(values)).index_add_(0, places, positive.float())
    below = torch.zeros(len(values)).index_add_(0, places, (~positive).float())
    won = (above * (below.cumsum(0) - below / 2)).sum()
    return float(won / (positive.sum() * (~positive).sum()))


def _agreement(first: Weights, second: Weights) -> float:
    """Of the tokens that either shades, the share that both do; of responses that both have rewards of."""
    both = [response for response in first if response in second]
    one, other = (torch.tensor([w > 0 for r in both for w in weights[r]]) for weights in (first, second))
    return float((one & other).sum() / (one | other).sum())
