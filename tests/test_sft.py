"""Fine-tuning before all else: what it trains, what starts from it, and that nothing changes without it."""

import json
import re
import shutil

import pytest
import torch
from conftest import MICRO, tiny_llama, units_read
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.method.delta import Delta
from allo_fast.method.selection import Selection
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights, same_bits
from allo_fast.runs.rows import read_jsonl, write_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.problems import right_responses
from allo_fast.stages.sft import corpus_of_right_responses
from allo_fast.training.zero import trained_ratio, training_sections, trains_densely

pytestmark = pytest.mark.xdist_group("sft")  # one finished run for all
PLAIN = [
    "seeds=[3]",
    "rivals=[]",
    "method=sparse-dpo",
    "locate.score=linear",
    "locate.windows=1",
    "model.dtype=bfloat16",
]
SFT = "sft={learning_rate: 1e-2, gradient_accumulation_steps: 1, ratio: 0.2, save_steps: 1}"


def job(folder):
    path = folder / "micro.yaml"
    path.write_text(MICRO.format(folder=folder))
    return str(path)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished run, of a model that it pretrained and fine-tuned itself: what it said, and its folder."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert main(["run", job(folder), *PLAIN, SFT]) == 0
    return "\n".join(said), folder / "micro"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def same_weights(first, second):
    first, second = named_weights(first), named_weights(second)
    return all(same_bits(first[name].data, second[name].data) for name in first)


def unit_of(config, name, *overrides, key="base"):
    return Unit(Run(load_config(config, [*PLAIN, *overrides]), STAGES, rerun=True), name, key)


def inputs(unit_folder):
    return units_read(json.loads((unit_folder / "MANIFEST.json").read_text()))


def test_a_fraction_of_the_given_model_trains(tuned):
    said, folder = tuned
    given, base = loaded(folder / "00-pretrain/base/model"), loaded(folder / "01-sft/base/model")
    facts = json.loads((folder / "summary.json").read_text())["stages"]["01-sft/base"]
    assert facts["selected"] == int(0.2 * facts["parameters"]) and facts["changed"] > 0.9 * facts["selected"]
    assert facts["examples"] == facts["problems"] == 6 and base.dtype == torch.bfloat16
    selection = Selection.load(folder / "01-sft/base/selection.safetensors")
    weights = named_weights(given)
    for name, weight in named_weights(base).items():
        moved = (weight != weights[name]).view(-1)
        moved[selection.positions(name).unpack()] = False
        assert not moved.any(), f"{name}: outside the selection"
    Delta.load(folder / "01-sft/base/delta.safetensors").merge_into(given)
    assert same_weights(given, base)
    losses = [step["loss"] for step in read_jsonl(folder / "01-sft/base/metrics.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "first response: '15+5=20, 20-14=6, 6+13=19. The answer is 19<eos>'\nsample" in said, "what trains"


def test_all_that_follows_starts_from_it(tuned):
    _, folder = tuned
    assert inputs(folder / "01-sft/base") == {"pretrain/base"}
    assert inputs(folder / "02-sample/seed-3") == inputs(folder / "09-evaluate/base") == {"sft/base"}
    assert inputs(folder / "08-learn/seed-3") == {"sft/base", "pairs/seed-3", "locate/seed-3"}
    assert inputs(folder / "09-evaluate/given") == {"pretrain/base", "evaluate/base"}
    learned, base = Delta.load(folder / "08-learn/seed-3/delta.safetensors"), loaded(folder / "01-sft/base/model")
    learned.merge_into(base)
    assert same_weights(base, loaded(folder / "08-learn/seed-3/model"))
    with pytest.raises(UserError, match="made for the model"):
        learned.merge_into(loaded(folder / "00-pretrain/base/model"))


def test_it_is_the_base_as_if_it_had_been_given(tuned, tmp_path):
    """Runs without `sft` whose model is the fine-tuned one, and the one before."""
    _, folder = tuned
    responses = (folder / "02-sample/seed-3/responses.jsonl").read_bytes()
    answers = {key: read_jsonl(folder / f"09-evaluate/{key}/predictions.jsonl") for key in ("base", "given")}
    for key, stage in (("base", "01-sft"), ("given", "00-pretrain")):
        model = f"model.name_or_path={folder / stage / 'base/model'}"
        sample = unit_of(job(tmp_path), "sample", model, f"name={key}", key="seed-3")
        evaluate = unit_of(job(tmp_path), "evaluate", model, f"name={key}")
        for unit in (sample, evaluate):
            list(unit.execute())
        assert ((sample.folder / "responses.jsonl").read_bytes() == responses) == (key == "base")
        assert read_jsonl(evaluate.folder / "predictions.jsonl") == answers[key]
    assert answers["base"] != answers["given"]


def test_what_it_did_is_shown(tuned):
    said, folder = tuned
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["models"]) == ["given", "base", "sparse-dpo"]
    assert list(summary["differences"]) == ["base - given", "sparse-dpo - given", "sparse-dpo - base"]
    assert re.search(r"^given +\d", said, re.MULTILINE)
    page = (folder / "report.html").read_text()
    assert ">sft</text>" in page and "pretrained here, fine-tuned here (sft)" in page
    assert "<figcaption>01-sft</figcaption>" in page and "<figcaption>02-sample</figcaption>" in page


def test_all_weights_train_at_ratio_1(tuned, tmp_path, capsys):
    config, model = job(tmp_path), f"model.name_or_path={tuned[1] / '00-pretrain/base/model'}"
    assert main(["sft", config, *PLAIN, SFT, "sft.ratio=1", model]) == 0
    folder = tmp_path / "micro/01-sft/base"
    assert not {path.name for path in folder.iterdir()} & {"delta.safetensors", "selection.safetensors"}
    facts = json.loads((folder / "MANIFEST.json").read_text())["facts"]
    assert facts["state_bytes_per_parameter"] == 16 and "selected" not in facts
    given, base = (named_weights(loaded(path)) for path in (tuned[1] / "00-pretrain/base/model", folder / "model"))
    assert all((base[name] != given[name]).float().mean() > 0.5 for name in base if "norm" not in name)
    assert {weight.dtype for weight in base.values()} == {torch.bfloat16}


@pytest.mark.parametrize("ratio", [0.2, 1])
def test_a_killed_stage_continues_to_the_same_model(tuned, tmp_path, ratio):
    model, settings = f"model.name_or_path={tuned[1] / '00-pretrain/base/model'}", [f"sft.ratio={ratio}"]
    settings += ["model.rounding=stochastic", "save_models=none"]
    unit = unit_of(job(tmp_path), "sft", SFT, *settings, model)
    list(unit.execute())
    expected = unit.contents()
    assert "model/model.safetensors" in expected, "there is no run without its base"
    shutil.rmtree(unit.folder)
    killed = unit.execute()
    assert next(progress.done for progress in killed if progress.noun == "step" and progress.done == 3)
    killed.close()
    assert not unit.is_complete()
    steps = [progress.done for progress in unit.execute() if progress.noun != "reference batch"]
    assert steps[0] in (3, 4) and unit.contents() == expected, "neither located again nor trained from the start"
    if ratio < 1:
        delta, given = Delta.load(unit.folder / "delta.safetensors"), loaded(tuned[1] / "00-pretrain/base/model")
        delta.merge_into(given)
        assert same_weights(given, loaded(unit.folder / "model")) and delta.rounding_seed == 3


def test_other_seeds_are_other_models(tuned, tmp_path):
    model = f"model.name_or_path={tuned[1] / '00-pretrain/base/model'}"
    found = {}
    for seeds in ("[3, 0]", "[0, 3]"):
        unit = unit_of(job(tmp_path), "sft", SFT, model, f"seeds={seeds}")
        list(unit.execute())
        found[seeds] = unit.contents()["model/model.safetensors"], unit.manifest()["seed"]
    trained = json.loads((tuned[1] / "01-sft/base/MANIFEST.json").read_text())["outputs"]["model/model.safetensors"]
    assert found["[3, 0]"] == (trained["sha256"], 3), "the first seed decides"
    assert found["[0, 3]"][0] != trained["sha256"] and found["[0, 3]"][1] == 0


def test_without_it_a_run_is_what_it_was(tuned, tmp_path, capsys):
    """Turned on, it runs again what starts from the base; turned off again, what was there before still fits."""
    config, copy = job(tmp_path), tmp_path / "micro"
    shutil.copytree(tuned[1] / "00-pretrain", copy / "00-pretrain")
    shutil.copy(tuned[1] / "config.yaml", copy)
    assert main(["sample", config, *PLAIN, "--rerun"]) == 0
    assert main(["sft", config, *PLAIN]) == 2
    assert "sft: not a stage of this run, whose stages are pretrain, sample, pairs, locate" in capsys.readouterr().err
    assert main(["sft", config, *PLAIN, SFT, "--rerun"]) == 0
    assert main(["pretrain", config, *PLAIN, SFT]) == 0
    assert "pretrain base: complete" in capsys.readouterr().out
    assert main(["pairs", config, *PLAIN, SFT]) == 2
    assert "02-sample/seed-3: " in capsys.readouterr().err
    assert main(["sample", config, *PLAIN, "--rerun"]) == 0
    assert "sample seed-3: complete" in capsys.readouterr().out


def test_it_stands_between_what_is_given_and_the_base():
    data, model = {"train": "a", "test": "b"}, {"name_or_path": "m"}
    off, on = (Config(name="x", data=data, model=model, **changes) for changes in ({}, {"sft": {}}))
    assert [name for name in stages_of(on) if name not in stages_of(off)] == ["sft"] == stages_of(on)[:1]
    assert STAGES["sample"].needs(off, "seed-0") == [] and STAGES["sample"].needs(on, "seed-0") == [("sft", "base")]
    assert STAGES["evaluate"].keys(on) == ["base", "given", "allo-seed-0"]
    known = {(name, key) for name in stages_of(on) for key in STAGES[name].keys(on)}
    assert all(set(STAGES[name].needs(on, key)) <= known for name, key in known)
    assert list(training_sections(on))[0] == "sft" and "sft" not in training_sections(off)


def test_it_is_sparse_by_default():
    data, model = {"train": "a", "test": "b"}, {"name_or_path": "m"}
    lean, dense = (Config(name="x", data=data, model=model, sft=settings) for settings in ({}, {"ratio": 1}))
    assert (trained_ratio(lean, "sft"), trained_ratio(dense, "sft")) == (0.05, None)
    assert not trains_densely(lean, "sft") and trains_densely(dense, "sft")


def test_the_right_responses_train_each_once():
    sampled = {"id": "a", "prompt_ids": [1], "solution": "gold", "solution_ids": [7, 8], "responses": []}
    judged = [([2], True), ([3], False), ([4, 5], True), ([2], True)]
    given = {"id": "b", "prompt_ids": [6], "solution": "gold", "responses": []}
    given["responses"] = [{"text": "x", "ids": ids, "correct": correct} for ids, correct in judged]
    assert [[response["ids"] for response in right_responses(row)] for row in (sampled, given)] == [
        [[7, 8]],
        [[2], [4, 5]],
    ]
    corpus = corpus_of_right_responses([sampled, given], None, 0)
    trained = [(corpus.prompts[response.prompt], response.tokens) for response in corpus.responses]
    assert trained == [([1], [7, 8]), ([6], [2]), ([6], [4, 5])] and corpus.examples == [(0,), (1,), (2,)]
    draws = [corpus_of_right_responses([sampled, given] * 9, 5, seed).examples for seed in (0, 0, 1)]
    assert len(set(draws[0])) == 5 and draws[0] == draws[1] != draws[2]


@pytest.fixture
def preferences(tmp_path):
    """A configuration of preferences whose right response is the shorter one, in the folder of its model."""
    tokenizer = character_tokenizer()
    save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / "given")
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": f"{i}, so {i + 2}"} for i in range(8)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(tmp_path / "rows.jsonl"), "test": str(tmp_path / "rows.jsonl"), "format": "preference"}
    train = {"learning_rate": 1e-3, "gradient_accumulation_steps": 1}
    settings = {"name": "judged", "output_dir": str(tmp_path), "method": "sparse-dpo", "data": data, "learn": train}
    settings |= {"model": {"name_or_path": str(tmp_path / "given"), "dtype": "float32"}, "sft": train}
    settings["locate"] = {"windows": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    return tmp_path


def test_implicit_rewards_are_against_the_fine_tuned_model(preferences, capsys):
    config, folder = str(preferences / "config.yaml"), preferences / "judged"
    assert main(["run", config]) == 0
    models = json.loads((folder / "summary.json").read_text())["models"]
    assert list(models) == ["given", "base", "sparse-dpo"]
    for name in ("given", "base"):
        assert list(models[name]["metrics"]) == ["logps/accuracies", "logps/accuracies_per_token"]
    base, trained = (
        read_jsonl(folder / f"09-evaluate/{key}/predictions.jsonl") for key in ("base", "sparse-dpo-seed-0")
    )
    for row, origin in zip(trained, base, strict=True):
        assert [r["ref_logp"] for r in row["responses"]] == [r["logp"] for r in origin["responses"]]
    given = read_jsonl(folder / "09-evaluate/given/predictions.jsonl")
    chosen = [sum(row["responses"][0]["logp"] for row in rows) for rows in (given, base)]
    assert chosen[0] < chosen[1], "it trained on what was chosen"
    margins = models["sparse-dpo"]["metrics"]["rewards/margins"]["mean"]
    capsys.readouterr()
    assert main(["eval", str(folder / "08-learn/seed-0/model"), config]) == 0
    assert f"rewards/margins {margins:.3g} " in capsys.readouterr().out, "against the base in the run's folder"
    (folder / "01-sft/base/model/model.safetensors").write_bytes(b"other")
    assert main(["eval", str(folder / "08-learn/seed-0/model"), config]) == 2
    assert "01-sft/base: model/model.safetensors is not what was written" in capsys.readouterr().err
    shutil.rmtree(folder / "01-sft")
    assert main(["eval", str(folder / "08-learn/seed-0/model"), config]) == 0
    assert "rewards/" not in capsys.readouterr().out


def test_rows_without_a_right_response_are_said_by_key(preferences, capsys):
    config = str(preferences / "config.yaml")
    write_jsonl(preferences / "rows.jsonl", [{"prompt": "1+1=", "completion": "3", "label": False}] * 2)
    for command in ("sft", "check"):
        assert main([command, config]) == 2
        said = capsys.readouterr()
        assert re.search(r"data.train: .*rows.jsonl: no usable row; .*no right completion", said.err + said.out)
    write_jsonl(preferences / "rows.jsonl", [{"problem": "1+1", "answer": "2"}])
    assert main(["sft", config, "data.format=problems", "name=problems", "sample.max_new_tokens=8"]) == 2
    assert re.search(r"data.train: .*no usable row; .*no field 'solution'", capsys.readouterr().err)


def test_a_ratio_that_selects_nothing_is_said_before(preferences, capsys):
    config = str(preferences / "config.yaml")
    assert main(["check", config, "sft.ratio=1e-9"]) == 2
    assert "nothing is selected: ratio 1e-09 of" in capsys.readouterr().out
    assert main(["check", config]) == 0
    assert "first response: '1<eos>'" in capsys.readouterr().out


def test_its_model_is_exported(tuned, tmp_path, capsys):
    _, folder = tuned
    assert main(["export", str(folder), "sft", str(tmp_path / "out")]) == 0
    assert same_weights(loaded(tmp_path / "out"), loaded(folder / "01-sft/base/model"))
    settings = (folder / "config.yaml").read_text()
    shutil.copytree(folder, tmp_path / "off")
    (tmp_path / "off/config.yaml").write_text(re.sub(r"sft:\n(  .*\n)+", "sft: null\n", settings))
    assert main(["export", str(tmp_path / "off"), "sft", str(tmp_path / "no")]) == 2
    assert "off: has no sft; its stages are pretrain, sample" in capsys.readouterr().err
