"""`python -m benchmarks step`: its pairs, what ours and TRL measure of a tiny model, the table, the profile."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama

from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.data.encoding import corpus_of_pairs
from allo_fast.model.saving import save_model
from allo_kernels import memory
from benchmarks import inputs, step, step_measure, step_ours, step_profile
from benchmarks.__main__ import SHAPES, main

VOCABULARY = 61
SETTINGS = step.Settings(None, "11M", ["float32"], ["choice"], None, ["sparse"], 0.05, 8, 4, 4, 1, {})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("step") / "model"
    save_model(tiny_llama(vocab_size=VOCABULARY), character_tokenizer(), folder)
    return folder


def job(model: Path, folder: Path, contender: str, **changes) -> step_measure.Job:
    """Of two questions with four pairs each, a step a question."""
    (_, made, _), *_ = step._jobs(replace(SETTINGS, model=str(model)), folder)
    return replace(made, contender=contender, dtype="float32", **changes)


def padded(rows: list[dict], micro_pairs: int) -> int:
    """Positions of TRL's batches, in the order of the rows."""
    batches = [rows[first : first + micro_pairs] for first in range(0, len(rows), micro_pairs)]
    sides = ("chosen_ids", "rejected_ids")
    longest = (max(len(row["prompt_ids"]) + len(row[side]) for row in batch for side in sides) for batch in batches)
    return sum(2 * len(batch) * width for batch, width in zip(batches, longest, strict=True))


def test_pairs_have_the_shapes_that_are_stated():
    assert list(inputs.SHAPES) == SHAPES
    chat, choice, groups = (inputs.draw_rows(inputs.SHAPES[name], 400, 1000) for name in SHAPES)
    assert (
        chat == inputs.draw_rows(inputs.SHAPES["chat"], 400, 1000) != inputs.draw_rows(inputs.SHAPES["chat"], 400, 999)
    )
    lengths = [sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in chat]
    assert 430 < sum(lengths) / 400 < 480 and max(lengths) > 1.5 * min(lengths)
    assert {len(row[name]) for row in choice for name in ("chosen_ids", "rejected_ids")} <= set(range(1, 13))
    questions = corpus_of_pairs(choice)
    assert (len(questions.prompts), len(questions.responses), len(questions.examples)) == (100, 500, 400)
    problems = corpus_of_pairs(groups)
    assert len(problems.prompts) == 80 and 4.5 < len(problems.responses) / 80 < 5.7


def test_useful_tokens_by_hand():
    row = {"id": "0", "prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [3]}
    assert inputs.useful_tokens([row]) == 3 + 1 + 0
    assert inputs.useful_tokens([row, {**row, "rejected_ids": [9, 9, 9]}]) == 3 + 1 + 0 + 2
    assert inputs.useful_tokens([row, {**row, "id": "1", "prompt_ids": [5]}]) == 4 + 1 + 1


def test_step_runs_and_counts(model, tmp_path, capsys, monkeypatch):
    """Ours in a process of its own; the rivals' environment is not there, which fails nothing."""
    monkeypatch.setattr(step, "RIVALS", tmp_path / "bin/python")
    (pairs := tmp_path / "pairs.jsonl").write_text("".join(
        json.dumps({**row, "prompt": "as a run writes it"}) + "\n"
        for row in inputs.draw_rows(inputs.SHAPES["choice"], 8, VOCABULARY)
    ))  # fmt: skip
    words = ["--model", str(model), "--dtypes", "float32", "--contenders", "sparse", "trl", "--repeats", "1"]
    words += ["--train", str(pairs), "--step-pairs", "4", "--micro-pairs", "4", "--ours", "max_grad_norm=0.5"]
    assert main(["step", *words, "--out", str(tmp_path / "step.json")]) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert written["ours"] == {"max_grad_norm": 0.5} and written["versions"]["torch"] and written["threads"] > 0
    sparse, trl = written["rows"]
    (outcome,) = sparse["outcomes"]
    assert outcome["trained"] == int(0.05 * outcome["parameters"]) and outcome["losses"][-1] < outcome["losses"][0]
    assert 0.9 < sparse["useful_tokens"] / outcome["positions"] <= 1
    assert outcome["reference_positions"] == outcome["positions"]
    assert 4 * 1.2 < outcome["state_bytes"] / outcome["parameters"] < 4 * 2, (
        "float32, values, gradients, moments, originals"
    )
    assert 0 < outcome["import_bytes"] < outcome["peak_bytes"] and outcome["seconds"] > 0 < outcome["cpu_seconds"]
    assert trl["error"] == ".venv-rivals is absent: make rivals"
    assert "make rivals" in (said := capsys.readouterr().out) and "x TRL" in said


def test_contenders_by_their_names(model, tmp_path):
    rows = inputs.draw_rows(inputs.SHAPES["choice"], 8, VOCABULARY)
    for name, checkpointed, budget in (
        ("sparse", False, None),
        ("sparse-768", False, 768),
        ("sparse-768-checkpointed", True, 768),
    ):
        named = job(model, tmp_path, name)
        policy = step_ours.make_policy(named)
        trainer = step_ours.make_trainer(policy, named, rows, tmp_path / name)
        assert (policy.model.is_gradient_checkpointing, trainer.config.max_tokens_per_batch) == (checkpointed, budget)


def test_pairs_that_are_set_aside_are_an_error(model, tmp_path):
    named = job(model, tmp_path, "sparse")
    lengths = [
        sum(map(len, (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]))) for row in named.rows("pairs")
    ]
    with pytest.raises(RuntimeError, match=r"[1-7] of 8 pairs are longer than the budget"):
        step_ours.measure(replace(named, settings={"max_tokens_per_batch": max(lengths) - 3}))


def test_trl_trains_on_the_same_tokens(model, tmp_path):
    pytest.importorskip("trl", reason="the rival is TRL")
    from benchmarks import step_rivals

    ours = step_ours.measure(job(model, tmp_path, "sparse"))
    alive = memory.live_bytes()  # of other tests
    dense = step_ours.measure(job(model, tmp_path, "dense"))
    before = memory.live_bytes()
    theirs = step_rivals.measure(job(model, tmp_path, "trl-checkpointed", micro_pairs=8, step_pairs=8))
    assert theirs.logps == pytest.approx(ours.logps, rel=1e-5) == dense.logps
    assert theirs.losses[-1] < theirs.losses[0] - 0.001 and theirs.losses == pytest.approx(dense.losses, abs=2e-3)
    assert theirs.positions == theirs.reference_positions == padded(job(model, tmp_path, "").rows("pairs"), 8)
    assert theirs.trained == theirs.parameters == dense.trained == ours.parameters
    states = theirs.state_bytes - before
    assert states == pytest.approx(20 * theirs.parameters, rel=0.05), "with the reference's weights"
    assert dense.state_bytes - alive == pytest.approx(16 * dense.parameters, rel=0.05)


@pytest.mark.skipif(not step.RIVALS.exists(), reason="PEFT's adapters live in .venv-rivals: make rivals")
def test_a_sparse_adapter_trains_as_many_weights(model, tmp_path):
    outcome = step._launch(job(model, tmp_path, "peft-supertuning"), tmp_path)
    assert isinstance(outcome, step_measure.Outcome), outcome
    layers = len([name for name, _ in tiny_llama().named_modules() if name.endswith("proj")])
    selected, added = int(0.05 * tiny_llama().num_parameters()), outcome.trained
    assert selected - layers <= added <= selected
    assert outcome.parameters == tiny_llama().num_parameters() + added


def test_a_loss_that_does_not_fall_is_an_error(model, tmp_path, monkeypatch):
    step_measure.check_falls([0.693, 0.6, 0.5])
    with pytest.raises(RuntimeError, match="its loss does not fall from ln 2: 0.6930, 0.6925"):
        step_measure.check_falls([0.693, 0.6925])
    with pytest.raises(RuntimeError, match="from ln 2"):
        step_measure.check_falls([1.2, 0.5])
    monkeypatch.setattr(step_ours, "RATES", {"some": 1e-12})
    with pytest.raises(RuntimeError, match="does not fall"):
        step_ours.measure(job(model, tmp_path, "sparse"))


def outcome(**changes) -> step_measure.Outcome:
    values = {"pairs": 8, "seconds": 4.0, "cpu_seconds": 2.0, "peak_bytes": 3 * 10**9, "import_bytes": 10**9}
    values |= {"state_bytes": 10**8, "parameters": 1000, "trained": 50, "positions": 200, "reference_positions": 200}
    return step_measure.Outcome(**{**values, "losses": [0.69, 0.1], "logps": [-9.0, -8.0], "versions": {}, **changes})


def test_the_table_and_what_trained_something_else():
    dense = [outcome(cpu_seconds=seconds) for seconds in (6.0, 5.0, 40.0)]
    rows = [step.Row("chat", "sparse", "float32", 190, [outcome()]), step.Row("chat", "trl", "float32", 190, dense)]
    cells = step.table(step._checked(rows)).splitlines()
    if not torch.cuda.is_available():
        assert cells[1].split() == "sparse float32 2.000 0.250 3.00 48 95.0% 3.00 2.00 0.100 50".split()
    other = replace(rows[1], outcomes=[outcome(logps=[-9.0, -8.1])])
    checked = step._checked([rows[0], other])
    assert [row.failed for row in checked] == [False, True]
    assert "[-9.0, -8.1], the first row's [-9.0, -8.0]" in step.table(checked)
    lost = replace(other, outcomes=[outcome(logps=[-9.0, float("nan")])])
    assert step._checked([rows[0], lost])[1].error
    rough = replace(other, dtype="bfloat16", outcomes=[outcome(logps=[-9.0, -8.2])])
    assert not step._checked([rough, rows[0]])[1].error, "of two dtypes the rougher one says how near is near"


def test_why_a_process_failed():
    raised = "Traceback (most recent call last):\n  File\nallo_fast.config.UserError: no such model\n"
    assert step.reason(raised) == "allo_fast.config.UserError: no such model"
    ranked = "[rank1]: Traceback\n[rank1]: ValueError: odd\nelastic ChildFailedError:\n=====\n"
    assert step.reason(ranked) == "[rank1]: ValueError: odd"
    assert step.reason("Killed\n\n") == "Killed" and step.reason("") == "it said nothing"


def test_every_range_of_the_profile_is_seen(model, tmp_path, capsys):
    """A function that is renamed, or no longer called, is missed here."""
    measured = job(model, tmp_path, "sparse", profile=str(tmp_path / "trace.json"))
    outcome = step_ours.measure(measured)
    forward = {step_profile.DECODER, "head"}
    every = (
        {*step_profile.RANGES, step_profile.REST} | forward | {f"{step_profile.REFERENCE}{name}" for name in forward}
    )
    _, *lines, last = capsys.readouterr().out.splitlines()
    rows = {line[8:30].strip(): (line[:8].strip(), float(line[30:40])) for line in lines}
    assert set(rows) == every
    spent = {kind: sum(ms for side, ms in rows.values() if side == kind) for kind in ("model", "engine", "once")}
    whole = sum(spent.values())
    assert 500 * outcome.seconds < whole < 1001 * outcome.seconds, "nearly all of it; the table itself takes time, too"
    printed = [float(share) for share in re.findall(r"([\d.]+)%", last)]
    assert printed == pytest.approx(
        [100 * spent[kind] / whole for kind in ("engine", "once")], abs=0.5
    )  # of rounded rows
    labels = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {f"allo: {name}" for name in step_profile.RANGES} <= labels and "aten::mm" in labels


def test_a_range_s_time_is_without_that_of_ranges_within(monkeypatch):
    now = iter([0, 1, 3, 6, 10, 15])
    monkeypatch.setattr(step_profile, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = step_profile.Clock()
    with clock.enter("outer"):
        with clock.enter("inner"):
            pass
    clock.enter("last").__enter__()
    assert clock.seconds == {step_profile.REST: 6, "outer": 6, "inner": 3}
