"""What each method, rival and score makes of a run: its stages, what they read, and what it compares."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import MICRO, tiny_llama, units_read
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.config import Config, ModelConfig
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.method.delta import Delta
from allo_fast.method.selection import Selection
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights, same_bits
from allo_fast.plan.job import disk_bytes
from allo_fast.runs.rows import read_jsonl
from allo_fast.stages import STAGES, stages_of
from allo_fast.stages.driving import hidden_updates
from allo_fast.training.zero import training_sections

pytestmark = pytest.mark.xdist_group("runs")
FIRST, LAST = ["sample", "pairs"], ["evaluate"]
SPARSE = ["method=sparse-dpo", "model.dtype=bfloat16"]
DELTA, MIB = {"locate": {"score": "delta"}}, 1 << 20


def config(**changes) -> Config:
    about = {"name": "x", "model": {"name_or_path": "m"}, "data": {"train": "a", "test": "b"}}
    return Config(**about | changes)


@pytest.mark.parametrize(
    "changes, stages, trained, models",
    [
        ({}, ["locate", "rewards", "forget", "learn"], ["rewards.train", "forget", "learn"], ["allo"]),
        (
            DELTA,
            ["warmup", "locate", "rewards", "forget", "learn"],
            ["warmup", "rewards.train", "forget", "learn"],
            ["allo"],
        ),
        (
            {"rivals": ["dpo"], "rewards": {"source": "implicit"}},
            ["warmup", "locate", "rewards", "forget", "learn"],
            ["warmup", "rewards.dpo", "forget", "learn"],
            ["dpo", "allo"],
        ),
        ({"method": "sparse-dpo"}, ["locate", "learn"], ["learn"], ["sparse-dpo"]),
        (
            {"method": "sparse-dpo", "rivals": ["dpo"]},
            ["warmup", "locate", "learn"],
            ["warmup", "learn"],
            ["dpo", "sparse-dpo"],
        ),
        ({"method": "dpo"}, ["warmup"], ["warmup"], ["dpo"]),
        ({"method": "dpo", "rivals": ["dpo"]}, ["warmup"], ["warmup"], ["dpo"]),
    ],
)
def test_stages_of_each_method(changes, stages, trained, models):
    made = config(**changes)
    assert stages_of(made) == FIRST + stages + LAST
    assert list(training_sections(made)) == trained
    assert STAGES["evaluate"].keys(made) == ["base", *(f"{model}-seed-0" for model in models)]
    known = {(name, key) for name in stages_of(made) for key in STAGES[name].keys(made)}
    for name, key in known:
        assert set(STAGES[name].needs(made, key)) <= known, "a stage reads what the run has"


def test_a_given_model_is_not_pretrained(tmp_path, capsys):
    (path := tmp_path / "c.yaml").write_text(yaml.safe_dump(config().model_dump() | {"output_dir": str(tmp_path)}))
    assert main(["pretrain", str(path)]) == 2
    assert "pretrain: not a stage of this run, whose stages are sample, pairs, locate" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "locate, needs",
    [
        ({}, ["pairs"]),
        ({"score": "snr"}, ["pairs"]),
        ({"score": "random"}, []),
        ({"score": "magnitude"}, []),
        ({"after": "another"}, []),
        ({"score": "delta"}, ["warmup"]),
    ],
)
def test_locating_reads_what_its_score_is_made_of(locate, needs):
    made = config(locate=locate, rivals=["dpo"])
    assert [name for name, _ in STAGES["locate"].needs(made, "seed-0")] == needs


def test_a_located_change_depends_on_the_other_models_files(tmp_path):
    save_model(tiny_llama(), character_tokenizer(), tmp_path / "after")
    made = config(model={"name_or_path": str(tmp_path)}, locate={"after": str(tmp_path / "after")})
    assert STAGES["locate"].files(made)["locate.after"]["model.safetensors"] == tmp_path / "after/model.safetensors"


def test_locating_depends_on_the_files_of_another_reference(tmp_path):
    save_model(tiny_llama(), character_tokenizer(), tmp_path / "other")
    made = config(model={"name_or_path": str(tmp_path)}, warmup={"reference": str(tmp_path / "other")})
    assert STAGES["locate"].files(made)["warmup.reference"]["model.safetensors"] == tmp_path / "other/model.safetensors"


def test_the_disk_of_a_run_is_what_it_keeps():
    ratios = {"model": {"name_or_path": "m", "dtype": "bfloat16"}, "forget": {"ratio": 0.05}, "learn": {"ratio": 0.1}}
    data = {"train": "a", "test": "b"}

    def mib(**changes):
        return disk_bytes(Config(name="x", data=data, **ratios, **changes), MIB) / MIB

    deltas, selections = 6 * (0.05 + 0.15), 2 * (0.05 + 0.1)
    rewriter = 2 * 0.05  # its selection; beside its checkpoint lie the scores that it was made of
    allo, passing = deltas + selections + rewriter, 12 * 0.05 + 4
    assert mib(save_models="none") == pytest.approx(allo + passing, rel=1e-4)
    assert mib() == pytest.approx(allo + passing + 2, rel=1e-4), "the last model in bfloat16"
    assert mib(save_models="all", seeds=[0, 1]) == pytest.approx(2 * (allo + 4) + passing, rel=1e-4)
    assert mib(rivals=["dpo"]) == pytest.approx(allo + 2 + 4 + 12, rel=1e-4), "dense DPO in float32, and its checkpoint"
    assert mib(rewards={"ratio": 1}) == pytest.approx(allo - rewriter + 2 + 12, rel=1e-4), "a dense rewriter"
    assert mib(method="dpo") == pytest.approx(4 + 12)
    best = {"pairs": {"eval_size": 0.1}, "warmup": {"load_best_model_at_end": True}}
    assert mib(method="dpo", **best) == pytest.approx(4 + 3 * 12), "the best that one knows, and a better one since"
    assert mib(method="sparse-dpo") == pytest.approx(6 * 0.1 + 2 * 0.1 + 2 + 4, rel=1e-4), "scores, more than 12 * 0.1"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A finished run of sparse DPO beside dense DPO, in bfloat16; what it said, and its folder."""
    folder = tmp_path_factory.mktemp("sparse")
    path = folder / "micro.yaml"
    path.write_text(MICRO.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        assert main(["run", str(path), *SPARSE]) == 0
    return "\n".join(said), folder / "micro"


@pytest.fixture
def copied_sparse(sparse, tmp_path):
    """A configuration and the folder of its run, a copy of `sparse`, to be changed."""
    path, (_, folder) = tmp_path / "micro.yaml", sparse
    path.write_text(MICRO.format(folder=tmp_path))
    shutil.copytree(folder, tmp_path / "micro")
    settings = tmp_path / "micro/config.yaml"
    settings.write_text(settings.read_text().replace(str(folder.parent), str(tmp_path)))
    return path, tmp_path / "micro"


def test_sparse_dpo_trains_the_located_weights_from_the_base(sparse):
    _, folder = sparse
    assert sorted(path.name for path in folder.glob("0*")) == [
        *("00-pretrain", "02-sample", "03-pairs", "04-warmup", "05-locate", "08-learn", "09-evaluate")
    ]
    manifest = json.loads((folder / "08-learn/seed-1/MANIFEST.json").read_text())
    assert units_read(manifest) == {"pretrain/base", "pairs/seed-1", "locate/seed-1"}
    base, trained = (
        AutoModelForCausalLM.from_pretrained(folder / path, dtype=torch.bfloat16)
        for path in ("00-pretrain/base/model", "08-learn/seed-1/model")
    )
    delta = Delta.load(folder / "08-learn/seed-1/delta.safetensors")
    selection = Selection.load(folder / "05-locate/seed-1/learn.safetensors")
    assert {name: at.unpack().tolist() for name, at in delta.positions.items()} == {
        name: selection.positions(name).unpack().tolist() for name in selection.names
    }
    delta.merge_into(base)
    weights = named_weights(trained)
    assert all(same_bits(weight.data, weights[name].data) for name, weight in named_weights(base).items())
    steps = read_jsonl(folder / "08-learn/seed-1/metrics.jsonl")
    assert {step["key_tokens"] for step in steps} == {1.0}, "plain DPO: every token is key"


def test_sparse_dpo_is_compared_under_its_name(sparse):
    said, folder = sparse
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "dpo", "sparse-dpo"]
    assert [len(model["seeds"]) for model in summary["models"].values()] == [1, 2, 2]
    assert set(summary["differences"]) == {"dpo - base", "sparse-dpo - base", "sparse-dpo - dpo"}
    manifest = json.loads((folder / "09-evaluate/sparse-dpo-seed-1/MANIFEST.json").read_text())
    assert units_read(manifest) == {"pretrain/base", "learn/seed-1", "evaluate/base"}
    rows = [line for line in said.splitlines() if re.match(r"(model|base|dpo|sparse-dpo) {2,}", line)]
    assert len(rows) == 4 and len({re.search(r"accuracy|%", row).end() for row in rows}) == 1, "in one column"
    page = (folder / "report.html").read_text()
    assert "sparse-dpo - dpo" in page and "<h2>Selected weights</h2>" in page
    assert "share of weights selected for learn" in page and "selected for forget" not in page
    assert "<h2>Wrong responses, by token</h2>" not in page and ">forget</text>" not in page
    assert ">warmup</text>" in page and ">learn</text>" in page


def test_updates_that_bfloat16_hides_are_said_once_a_unit(copied_sparse, caplog):
    path, folder = copied_sparse
    small = ["learn", str(path), *SPARSE, "learn.learning_rate=1e-7", "--rerun"]
    for said in (2, 2):  # seeds; a complete stage says nothing again
        assert main(small) == 0
        lines = [record.message for record in caplog.records if "of the selected weights moved" in record.message]
        assert len(lines) == said, lines
    facts = json.loads((folder / "08-learn/seed-0/MANIFEST.json").read_text())["facts"]
    assert lines[0] == (
        f"learn seed-0: only {facts['changed'] / facts['selected']:.1%} of the selected weights moved: the updates of "
        "the others are below bfloat16's rounding. A larger learning rate moves more of them; "
        "model.rounding=stochastic or model.dtype=float32 lets all count"
    )
    caplog.clear()
    assert main([*small, "model.rounding=stochastic"]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"], "the advice was followed"


@pytest.mark.parametrize(
    "dtype, rounding, changed, warns",
    [
        ("bfloat16", "nearest", 49, True),
        ("bfloat16", "nearest", 50, False),
        ("bfloat16", "stochastic", 1, False),
        ("float32", "nearest", 1, False),
        ("float32", "nearest", 0, True),
        ("bfloat16", "nearest", None, False),
    ],
)
def test_who_is_told_of_hidden_updates(dtype, rounding, changed, warns):
    facts = {"steps": 3} | ({} if changed is None else {"selected": 100, "changed": changed})
    assert bool(hidden_updates(ModelConfig(dtype=dtype, rounding=rounding), facts)) == warns


def test_rounding_by_chance_has_the_seed_of_its_unit(copied_sparse, capsys):
    path, folder = copied_sparse
    assert main(["run", str(path), *SPARSE, "model.rounding=stochastic"]) == 2
    assert "model.rounding was nearest, now stochastic" in capsys.readouterr().err
    assert main(["run", str(path), *SPARSE, "model.rounding=stochastic", "--rerun"]) == 0
    said = capsys.readouterr().out
    assert "locate seed-0: complete" in said and "warmup seed-1: complete" in said
    assert "learn seed-0: complete" not in said and "evaluate sparse-dpo-seed-0: complete" not in said
    for seed in (0, 1):
        learned = folder / f"08-learn/seed-{seed}"
        base, trained = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            for path in (folder / "00-pretrain/base/model", learned / "model")
        )
        delta = Delta.load(learned / "delta.safetensors")
        assert delta.rounding_seed == seed
        delta.merge_into(base)
        weights = named_weights(trained)
        assert all(same_bits(weight.data, weights[name].data) for name, weight in named_weights(base).items())
        parts = zip(delta.positions.items(), delta.values.values(), strict=True)
        assert any((weights[name].view(-1)[at.unpack()] != value.bfloat16()).any() for (name, at), value in parts)


def test_dense_dpo_alone_is_a_result(sparse, tmp_path, capsys):
    """Its rival is itself."""
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(folder=tmp_path))
    base = f"model.name_or_path={sparse[1] / '00-pretrain/base/model'}"
    assert main(["run", str(path), "method=dpo", "rivals=[dpo]", "seeds=[0]", base]) == 0
    assert re.search(r"^dpo +\d", capsys.readouterr().out, re.MULTILINE)
    assert list(json.loads((tmp_path / "micro/summary.json").read_text())["models"]) == ["base", "dpo"]
    assert main(["learn", str(path), "method=dpo", base]) == 2
    assert "learn: not a stage of this run, whose stages are sample, pairs, warmup, evaluate" in (
        capsys.readouterr().err
    )


def test_other_losses_train_all_weights_and_some(sparse, tmp_path):
    path, micro = tmp_path / "micro.yaml", tmp_path / "micro"
    path.write_text(MICRO.format(folder=tmp_path))
    given = ["seeds=[0]", "rivals=[]", f"model.name_or_path={sparse[1] / '00-pretrain/base/model'}"]
    assert main(["run", str(path), *given, "method=dpo", "warmup.loss_type=sft"]) == 0
    for step in (steps := read_jsonl(micro / "04-warmup/seed-0/metrics.jsonl")):
        assert step["loss"] == pytest.approx(-step["rewards/chosen"] / 0.1), "rewards are beta times means"
    assert steps and not (micro / "cache").exists(), "no reference is asked"
    shutil.rmtree(micro)
    losses = ["learn.loss_type=[ipo, simpo]", "learn.loss_weights=[0.5, 1]", "learn.simpo_gamma=9"]
    assert main(["run", str(path), *given, "method=sparse-dpo", "warmup.loss_type=orpo", *losses]) == 0
    first = read_jsonl(micro / "08-learn/seed-0/metrics.jsonl")[0]
    # Before the first update ipo is (1 / 2 beta)^2, and d of simpo about as far below zero as gamma.
    assert first["loss"] == pytest.approx(0.5 * (1 / (2 * 0.1)) ** 2 + 9, abs=0.3)
    assert first["rewards/margins"] == 0 and (micro / "cache").exists()
    assert (micro / "05-locate/seed-0/learn.safetensors").exists()
