"""Models of a finished run as Hugging Face folders, and which of them a run keeps by itself."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from allo_fast.__main__ import main
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.durable import read_json, write_json
from allo_fast.method.delta import Delta
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights, same_bits
from allo_fast.runs.home import MANIFEST
from tests.conftest import SAME_BITS, tiny_llama

pytestmark = pytest.mark.xdist_group("runs")  # one finished run for all


def loaded(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def same_weights(first, second):
    first, second = named_weights(first), named_weights(second)
    return first.keys() == second.keys() and all(same_bits(first[name].data, second[name].data) for name in first)


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "forget", "learn"])
def test_every_stage_that_makes_a_model_is_exported(finished, tmp_path, capsys, stage):
    _, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert main(["export", str(folder), stage, str(tmp_path / "out"), "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    expected = loaded(folder / "00-pretrain/base/model")
    if stage in ("forget", "learn"):
        number = {"forget": 7, "learn": 8}[stage]
        Delta.load(folder / f"0{number}-{stage}/seed-1/delta.safetensors").merge_into(expected)
    if stage == "warmup":
        expected = loaded(folder / "04-warmup/seed-1/model")
    exported = loaded(tmp_path / "out")
    assert same_weights(exported, expected) and exported.generation_config.eos_token_id is not None
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("1").input_ids
    if stage == "learn":
        assert same_weights(exported, loaded(folder / "08-learn/seed-1/model"))
        assert not same_weights(exported, loaded(folder / "08-learn/seed-0/model"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, "nothing is written into the run"


def test_a_run_that_was_moved_is_exported_in_its_dtype(finished, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(finished[1], moved)
    settings = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(settings.replace("dtype: float32", "dtype: bfloat16"))
    assert main(["export", str(moved), "warmup", str(tmp_path / "out")]) == 2, "it was made in another"
    manifest = read_json(path := moved / "04-warmup/seed-0" / MANIFEST)
    write_json(path, manifest | {"basis": manifest["basis"] | {"model.dtype": "bfloat16"}})
    assert main(["export", str(moved), "warmup", str(tmp_path / "out")]) == 0
    exported = loaded(tmp_path / "out")
    assert exported.dtype == torch.bfloat16
    assert same_weights(exported, loaded(moved / "04-warmup/seed-0/model", torch.bfloat16)), "the first seed"


def test_what_cannot_be_exported_is_one_line(copied, tmp_path, capsys):
    config, folder = copied
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    shutil.rmtree(folder / "08-learn/seed-1")
    shutil.copytree(folder / "04-warmup/seed-0", other := folder / "04-warmup/seed-1", dirs_exist_ok=True)
    with (folder / "07-forget/seed-0/delta.safetensors").open("ab") as file:
        file.write(b"0")
    cases = (
        ([folder, "learn", tmp_path / "taken"], "taken: exists already"),
        ([folder, "learn", folder / "09-learn" / ".." / "new"], "new: inside the run; name a folder elsewhere"),
        ([folder, "sample", tmp_path / "out"], "sample: not a stage that makes a model; those are pretrain, sft, warm"),
        ([folder, "learn", tmp_path / "out", "--seed", "7"], "micro: has no seed 7; its seeds are 0, 1"),
        (
            [folder, "learn", tmp_path / "out", "--seed", "1"],
            "08-learn/seed-1: not complete; run `allo-fast",
        ),
        (
            [folder, "forget", tmp_path / "out"],
            "07-forget/seed-0: delta.safetensors is not what was written; run `allo-fast",
        ),
        ([folder, "warmup", tmp_path / "out", "--seed", "1"], f"{other}: seed was 0, now 1; run `allo-fast warmup"),
        ([tmp_path / "nowhere", "learn", tmp_path / "out"], "nowhere: not the folder of a run"),
    )
    for words, message in cases:
        assert main(["export", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
    settings = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(settings.replace("method: allo", "method: sparse-dpo"))
    assert main(["export", str(folder), "forget", str(tmp_path / "out")]) == 2
    assert (
        "micro: has no forget; its stages are pretrain, sample, pairs, warmup, locate, learn" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


@SAME_BITS
@pytest.mark.parametrize("kept, stages", [("all", ["07-forget", "08-learn"]), ("none", [])])
def test_which_models_are_kept_changes_no_delta(copied, kept, stages):
    config, folder = copied
    deltas = {path: path.read_bytes() for path in folder.rglob("0[78]*/seed-0/delta.safetensors")}
    for stage in ("07-forget", "08-learn"):
        shutil.rmtree(folder / stage / "seed-0")
    for stage in ("forget", "learn"):
        assert main([stage, str(config), f"save_models={kept}"]) == 0
    assert [path.parts[-3] for path in sorted(folder.glob("0[78]*/seed-0/model"))] == stages
    assert len(deltas) == 2 and {path: path.read_bytes() for path in deltas} == deltas
    assert main(["run", str(config)]) == 0, "a run that keeps others is the same run"


def test_what_is_saved_does_not_say_how_it_was_loaded(tmp_path):
    for offline in (True, False):
        tokenizer = character_tokenizer()
        tokenizer.init_kwargs["local_files_only"] = offline
        save_model(tiny_llama(vocab_size=len(tokenizer)), tokenizer, tmp_path / str(offline))
    first, second = ((tmp_path / name / "tokenizer_config.json").read_bytes() for name in ("True", "False"))
    assert first == second and b"local_files_only" not in first
