"""The main job end to end on a micro model, and everything that can interrupt it."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest
import torch
from conftest import MICRO
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from allo_fast import commands
from allo_fast.__main__ import main
from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config
from allo_fast.console import logged, say
from allo_fast.data.arithmetic import arithmetic_row
from allo_fast.durable import versions, write_json
from allo_fast.method.delta import Delta
from allo_fast.method.selection import Selection
from allo_fast.model import loading
from allo_fast.model.loading import load_tokenizer
from allo_fast.model.weights import named_weights, same_bits
from allo_fast.runs.basis import differences
from allo_fast.runs.home import LOG, MANIFEST
from allo_fast.runs.lock import alone_in
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Progress, Unit
from allo_fast.stages import STAGES, inputs_of, stages_of
from allo_fast.stages.models import tokenizer_of

pytestmark = pytest.mark.xdist_group("runs")  # one finished run for all


def test_one_command_at_a_time(finished, capsys):
    config, folder = finished
    code = f"from allo_fast.runs.lock import *\nwith alone_in(Path({str(folder)!r})): print('in', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"in\n"
        assert main(["run", str(config)]) == 2
        assert f"micro: process {other.pid} of " in capsys.readouterr().err
        other.kill()
    assert main(["run", str(config)]) == 0


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with alone_in(tmp_path / "run"):
        assert "cannot be locked (Function not implemented)" in caplog.text


def test_what_one_process_does_is_not_started_by_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["env"]) == 0, "some schedulers set it everywhere"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["env"]) == 2 and "2 processes were started for what one does" in capsys.readouterr().err


def test_large_files_are_told_apart_by_their_ends(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = []
    for first, last in ((b"a", b"b"), (b"c", b"b"), (b"a", b"c")):
        with (tmp_path / "model.safetensors").open("wb") as file:
            file.write(first)
            file.seek((1 << 26) + 1)
            file.write(last)
        data = {"train": "a.jsonl", "test": "b.jsonl"}
        found.append(str(inputs_of(Config(name="x", model={"name_or_path": str(tmp_path)}, data=data))))
    assert len(set(found)) == 3


def units(config, *overrides):
    run = Run(load_config(config, list(overrides)), STAGES)
    return {f"{unit.name}/{unit.key}": unit for unit in run.units(stages_of(run.config))}


def outputs(folder: Path) -> dict:
    return {str(p.parent.relative_to(folder)): json.loads(p.read_text())["outputs"] for p in folder.rglob(MANIFEST)}


def test_the_folder_is_what_the_design_says(finished):
    _, folder = finished
    stages = "00-pretrain 02-sample 03-pairs 04-warmup 05-locate 06-rewards 07-forget 08-learn 09-evaluate".split()
    files = ["cache", "config.yaml", "log.txt", "report.html", "summary.json"]
    assert sorted(path.name for path in folder.iterdir()) == [*stages, *files]
    manifest = json.loads((folder / "08-learn/seed-1" / MANIFEST).read_text())
    assert {name for name in manifest["basis"] if "/" in name} == {
        *("03-pairs/seed-1/pairs.jsonl", "05-locate/seed-1/forget.safetensors", "05-locate/seed-1/learn.safetensors"),
        *("05-locate/seed-1/counts.json", "07-forget/seed-1/delta.safetensors"),
        *(f"00-pretrain/base/model/{path.name}" for path in (folder / "00-pretrain/base/model").iterdir()),
    }
    assert list(manifest["outputs"]) == ["delta.safetensors"] and list(manifest["logs"]) == ["metrics.jsonl"]
    assert set(manifest["copies"]) >= {"model/model.safetensors", "model/tokenizer.json"}
    assert not (folder / "07-forget/seed-1/model").exists(), "what it passes on is its delta"
    assert manifest["seed"] == 1 and manifest["seconds"] > 0 and manifest["peak_bytes"] > 2**20
    leftovers = ("*.partial", "checkpoint*", "*.sums", "scratch", "STARTED.json")
    assert not [path for pattern in leftovers for path in folder.rglob(pattern)]


def test_the_summary_is_complete(finished):
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert list(summary["models"]) == ["base", "dpo", "allo"]
    for held in summary["models"].values():
        assert held["n"] == 8 and held["ci95"][0] <= held["accuracy"] <= held["ci95"][1]
    assert [len(held["seeds"]) for held in summary["models"].values()] == [1, 2, 2]
    assert set(summary["differences"]) == {"dpo - base", "allo - base", "allo - dpo"}
    for stage, ratio in (("07-forget", 0.05), ("08-learn", 0.1)):
        facts = summary["stages"][f"{stage}/seed-0"]
        assert facts["selected"] == int(ratio * facts["parameters"])
        assert facts["tokens_per_second"] > 0 and facts["seconds"] > 0 and facts["peak_bytes"] > 0
        assert facts["state_bytes"]["moments"] == 8 * facts["selected"]


def test_forgetting_trains_only_the_selected_weights(finished):
    _, folder = finished
    base, trained = (AutoModelForCausalLM.from_pretrained(folder / "00-pretrain/base/model") for _ in range(2))
    Delta.load(folder / "07-forget/seed-0/delta.safetensors").merge_into(trained)
    before, after = named_weights(base), named_weights(trained)
    selection = Selection.load(folder / "05-locate/seed-0/forget.safetensors")
    changed = 0
    for name, weight in after.items():
        outside = torch.ones(weight.numel(), dtype=torch.bool)
        outside[selection.positions(name).unpack()] = False
        assert torch.equal(weight.view(-1)[outside], before[name].view(-1)[outside])
        changed += int((weight != before[name]).sum())
    assert changed > 0.5 * selection.selected


def test_merge_rebuilds_the_trained_model(finished, tmp_path, capsys):
    _, folder = finished
    arguments = [str(folder / "00-pretrain/base/model"), str(folder / "08-learn/seed-0/delta.safetensors")]
    assert main(["merge", *arguments, str(tmp_path / "merged")]) == 0
    merged, trained = (
        named_weights(AutoModelForCausalLM.from_pretrained(path))
        for path in (tmp_path / "merged", folder / "08-learn/seed-0/model")
    )
    assert all(torch.equal(merged[name], trained[name]) for name in trained)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("1").input_ids
    arguments[0] = str(folder / "04-warmup/seed-0/model")
    assert main(["merge", *arguments, str(tmp_path / "wrong")]) == 2
    assert "made for the model" in capsys.readouterr().err and not (tmp_path / "wrong").exists()


def test_eval_of_any_model(finished, capsys):
    config, folder = finished
    assert main(["eval", str(folder / "04-warmup/seed-0/model"), str(config)]) == 0
    rows = (folder / "09-evaluate/dpo-seed-0/predictions.jsonl").read_text().splitlines()
    correct = sum(json.loads(row)["strict"] for row in rows)
    assert f"{correct / 8:.2%} by the strict scorer" in capsys.readouterr().out


def test_a_second_run_does_nothing(copied):
    config, folder = copied
    before = {path: path.stat().st_mtime_ns for path in folder.rglob(MANIFEST)}
    assert main(["run", str(config)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob(MANIFEST)} == before


@pytest.mark.parametrize("stage", ["pretrain", "sample", "warmup", "rewards", "forget", "learn", "evaluate"])
def test_a_killed_stage_continues_to_the_same_result(copied, stage):
    config, folder = copied
    before = outputs(folder)
    key = {"pretrain": "base", "evaluate": "base"}.get(stage, "seed-0")
    unit = units(config)[f"{stage}/{key}"]
    shutil.rmtree(unit.folder)
    killed = unit.execute()
    last = next(p for p in killed if not {"batch", "reference"} & {*p.noun.replace("-", " ").split()} and p.done >= 2)
    killed.close()
    assert not unit.is_complete()
    seen = [progress for progress in unit.execute() if progress.noun == last.noun]
    # A step's checkpoint and a chunk's rows are written before its progress is seen, or right after.
    assert seen[0].done in (last.done, last.done + 1) if last.noun == "step" else seen[0].done > last.done
    after = outputs(folder)
    name = str(unit.folder.relative_to(folder))
    for file, held in before[name].items():
        if file != "metrics.jsonl":  # it holds wall times
            assert after[name][file] == held, file


def refused(capsys, *words) -> str:
    """The one line with which a command ends."""
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("allo-fast: ")]
    assert len(lines) == 1 and not any("Traceback" in line for line in said), said
    return lines[0]


def every_byte(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOG
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "cut": ("03-pairs/seed-0/pairs.jsonl", cut, "03-pairs/seed-0: pairs.jsonl is not what was written"),
    "gone": ("07-forget/seed-1/delta.safetensors", Path.unlink, "07-forget/seed-1: delta.safetensors is gone"),
    "no manifest": ("07-forget/seed-1/MANIFEST.json", Path.unlink, "07-forget/seed-1: MANIFEST.json is gone"),
    "manifest": ("03-pairs/seed-1/MANIFEST.json", cut, "03-pairs/seed-1: MANIFEST.json: damaged: "),
    "null": (
        "03-pairs/seed-1/MANIFEST.json",
        lambda path: path.write_text("null"),
        "MANIFEST.json: damaged: its check",
    ),
    "empty": ("03-pairs/seed-1/MANIFEST.json", lambda path: path.write_text(""), "MANIFEST.json: damaged: Expecting"),
    "fact": (
        "03-pairs/seed-1/MANIFEST.json",
        lambda path: path.write_text(path.read_text().replace('"pairs": ', '"pairs": 1')),
        "MANIFEST.json: damaged: its checksum does not fit",
    ),
}


@pytest.mark.parametrize("file, damage, message", DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_stays_until_it_is_to_be_made_anew(copied, capsys, file, damage, message):
    config, folder = copied
    place = Path(*Path(file).parts[:2])
    whole = every_byte(folder / place)
    damage(folder / file)
    before = every_byte(folder)
    line = refused(capsys, "run", config)
    assert message in line and "--rerun moves it to old-1 and makes it anew" in line
    assert every_byte(folder) == before
    assert main([place.parts[0][3:], str(config), "--rerun"]) == 0
    after = every_byte(folder)
    assert all(after[f"old-1/{name}"] == data for name, data in before.items() if Path(name).is_relative_to(place))
    assert after["old-1/summary.json"] == before["summary.json"]
    logs = {"MANIFEST.json", "metrics.jsonl"}  # they hold wall times
    assert {n: d for n, d in every_byte(folder / place).items() if n not in logs} == {
        n: d for n, d in whole.items() if n not in logs
    }
    assert main(["run", str(config)]) == 0 and "complete" in capsys.readouterr().out


def test_logs_notes_and_copies_that_are_gone_decide_nothing(copied, capsys, caplog):
    config, folder = copied
    (folder / "04-warmup/seed-0/metrics.jsonl").write_text("torn")
    (folder / "00-pretrain/base/model/README.md").write_text("a note")
    (folder / "03-pairs/seed-0/note.txt").write_text("a note")
    shutil.rmtree(folder / "08-learn/seed-1/model")
    assert main(["run", str(config)]) == 0
    assert capsys.readouterr().out.count("complete\n") == len(units(config))
    assert [record.message for record in caplog.records if "curves" in record.message] == [
        f"{folder / '04-warmup/seed-0/metrics.jsonl'}: damaged, or gone; its curves are left out"
    ]


def test_what_other_settings_left_is_not_continued(copied):
    config, folder = copied
    unit = units(config)["sample/seed-0"]
    shutil.rmtree(unit.folder)
    killed = unit.execute()
    next(killed)
    killed.close()
    first = (unit.folder / "responses.jsonl").read_text()
    changed = load_config(config, ["sample.max_new_tokens=4"])
    with pytest.raises(UserError, match="holds another run: sample.max_new_tokens was 12, now 4"):
        Run(changed, STAGES)
    list(Unit(Run(changed, STAGES, rerun=True), "sample", "seed-0").execute())
    assert not (unit.folder / "responses.jsonl").read_text().startswith(first)
    assert (folder / "old-1/02-sample/seed-0/responses.jsonl").read_text() == first


def test_what_is_refused_at_once_leaves_all_as_it_was(copied, capsys, tmp_path):
    config, folder = copied
    before = every_byte(folder)
    refused(capsys, "rewards", config, "rewards.source=file", f"rewards.path={tmp_path}/typo", "--rerun")
    assert every_byte(folder) == before and not list(folder.glob("old-*"))
    assert main(["run", str(config)]) == 0
    fresh = tmp_path / "fresh.yaml"
    fresh.write_text(config.read_text().replace("name: micro", "name: fresh"))
    refused(
        capsys, "sample", fresh, "data.train=typo.jsonl", "model.name_or_path=" + str(folder / "00-pretrain/base/model")
    )
    assert main(["pretrain", str(fresh)]) == 0, "a command that failed has not taken the name"


def test_a_setting_that_names_no_file_any_more_is_a_change(copied, capsys, tmp_path):
    config, folder = copied
    (rewards := tmp_path / "rewards.jsonl").write_text("{}")
    run = Run(load_config(config, [f"rewards.path={rewards}", "rewards.source=file"]), STAGES, rerun=True)
    Unit(run, "rewards", "seed-0")._start()
    assert "rewards.source was file, now " in refused(capsys, "rewards", config)
    assert main(["rewards", str(config), "--rerun"]) == 0, "it names none, so none is to be brought back"


def test_what_an_unfit_file_refuses_late_leaves_the_users_config(copied, capsys, tmp_path):
    config, folder = copied
    (folder / "config.yaml").write_text("# mine\n" + (folder / "config.yaml").read_text())
    before = every_byte(folder)
    (bad := tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "p", "response": "r", "rewards": [0.5]}))
    line = refused(capsys, "run", config, "rewards.source=file", f"rewards.path={bad}", "--rerun")
    assert "rewards, one per token" in line and every_byte(folder) == before and not list(folder.glob("old-*"))


@pytest.mark.parametrize(
    "error, late", [(None, False), (None, True), (UserError("refused"), False), (OSError("unreadable"), False)]
)
def test_what_changes_while_a_stage_reads_it_is_not_taken(copied, tmp_path, error, late):
    """Of a base that the units before read, too."""
    config, folder = copied
    shutil.copytree(folder / "00-pretrain/base/model", base := tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")  # a folder in what is saved
    turns = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    (base / "chat_template.jinja").write_text(turns)
    words = ["name=given", f"model.name_or_path={base}", "data.train=arithmetic:train[:3]", "seeds=[0]"]
    assert main(["pairs", str(config), *words]) == 2, "sample comes first"
    for stage in ("sample", "pairs", "warmup", "warmup"):
        assert main([stage, str(config), *words]) == 0
    before = every_byte(tmp_path / "given")

    def changing(unit):
        if late:
            yield Progress(1, 2, "step")
        if error:
            raise error
        (base / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b" ")
        yield Progress(2, 2, "step")
        return {}

    stages = STAGES | {"warmup": replace(STAGES["warmup"], execute=changing)}
    run = Run(load_config(config, [*words, "warmup.learning_rate=1"]), stages, rerun=True)
    work = Unit(run, "warmup", "seed-0").execute()
    if late and not error:
        assert len(list(work)) == 2, "what was read is read"
    else:
        said = "model.name_or_path: tokenizer.json was .*, now .*, while it was read; give the same command again"
        with pytest.raises((UserError, OSError), match=str(error) if error else said):
            list(work)
    assert late or every_byte(tmp_path / "given") == before, "the older one is there again"


def test_what_a_killed_rerun_moved_is_brought_back(copied, capsys, caplog, monkeypatch):
    config, folder = copied
    before = every_byte(folder / "03-pairs/seed-0")
    unit = Unit(Run(load_config(config, ["pairs.max_pairs=1"]), STAGES, rerun=True), "pairs", "seed-0")
    monkeypatch.setattr("allo_fast.runs.unit.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(unit.execute())
    monkeypatch.undo()
    (folder / "03-pairs/seed-0/.STARTED.json.partial").mkdir(parents=True)
    whole, place = folder / "old-1/03-pairs/seed-0", folder / "03-pairs/seed-0"
    for _ in range(2):
        line = refused(capsys, "run", config)
        assert line == f"allo-fast: {whole}: the same, whole; `mv {whole} {place}`, or --rerun makes it anew"
    shutil.copytree(whole, folder / "old-2/03-pairs/seed-0")
    shutil.move(whole, place)
    assert main(["run", str(config)]) == 0 and every_byte(place) == before
    shutil.rmtree(place)
    assert main(["pairs", str(config), "--rerun"]) == 0
    assert f"{place}: made anew, though {folder}/old-2/03-pairs/seed-0 is the same, whole" in caplog.messages
    cut(folder / "old-2/03-pairs/seed-0/pairs.jsonl")
    shutil.rmtree(place)
    assert main(["run", str(config)]) == 0, "what is damaged is not the same"


def test_half_of_what_came_to_nothing_is_never_there(copied, monkeypatch):
    config, folder = copied
    run = Run(load_config(config, ["pairs.max_pairs=1"]), STAGES, rerun=True)
    before = every_byte(folder / "03-pairs")
    Unit(run, "pairs", "seed-0")._start()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", lambda path, **_: 1 / len(list(path.parent.glob("seed-0"))))  # ends the second
        with pytest.raises(ZeroDivisionError):
            run.home.undo(Path("03-pairs/seed-0"))
    assert sorted(path.name for path in (folder / "03-pairs").iterdir()) == [".seed-0.partial", "seed-1"]
    (folder / "old-1/03-pairs/seed-0").rename(folder / "03-pairs/seed-0")
    Unit(again := Run(run.config, STAGES, rerun=True), "pairs", "seed-0")._start()
    again.home.undo(Path("03-pairs/seed-0"))
    assert every_byte(folder / "03-pairs") == before and main(["run", str(config)]) == 0


def test_a_unit_behind_a_link_that_comes_to_nothing_is_no_traceback(copied, tmp_path):
    config, folder = copied
    shutil.rmtree(unit := folder / "03-pairs/seed-0")
    (tmp_path / "elsewhere").mkdir()
    unit.symlink_to(tmp_path / "elsewhere")
    run = units(config)["pairs/seed-0"].owner
    Unit(run, "pairs", "seed-0")._start()
    run.home.undo(Path("03-pairs/seed-0"))
    assert not unit.exists()


@pytest.mark.skipif(os.stat("/dev/shm").st_dev == os.stat(gettempdir()).st_dev, reason="here /dev/shm is no other disk")
def test_what_lies_on_another_disk_is_not_moved(copied, capsys):
    config, folder = copied
    with TemporaryDirectory(dir="/dev/shm") as disk:
        shutil.move(folder / "03-pairs", disk)
        (folder / "03-pairs").symlink_to(f"{disk}/03-pairs")
        assert main(["run", str(config)]) == 0
        before = every_byte(folder), every_byte(Path(disk))
        said = refused(capsys, "pairs", config, "pairs.max_pairs=1", "--rerun")
        unit, to = folder / "03-pairs/seed-0", folder / "old-1/03-pairs/seed-0"
        assert said == f"allo-fast: {unit}: lies on another disk; move it to {to}, or elsewhere, yourself"
        assert (every_byte(folder), every_byte(Path(disk))) == before and not list(folder.glob("old-*"))


def test_nothing_is_moved_before_what_is_needed_is_there(copied, capsys):
    config, folder = copied
    (folder / "08-learn/seed-0/MANIFEST.json").write_text("{}")
    shutil.rmtree(folder / "03-pairs/seed-0")
    before = every_byte(folder)
    assert "03-pairs/seed-0: not complete" in refused(capsys, "learn", config, "--rerun")
    assert every_byte(folder) == before and not list(folder.glob("old-*"))


def test_a_changed_setting_runs_what_it_affects_and_no_more(copied, capsys):
    config, folder = copied
    assert main(["run", str(config), "learn.learning_rate=2e-3"]) == 2
    assert "learn.learning_rate was 0.001, now 0.002" in capsys.readouterr().err
    assert main(["run", str(config), "forget.beta=0.2", "--rerun"]) == 0
    said = capsys.readouterr().out
    assert "warmup seed-0: complete" in said and "rewards seed-1: complete" in said
    for again in ("forget seed-0", "learn seed-0", "evaluate allo-seed-1"):
        assert f"{again}: complete" not in said


def test_a_setting_that_is_gone_is_a_change(copied, capsys):
    config, _ = copied
    manifest = (unit := units(config)["sample/seed-0"]).manifest()
    thinking = {"data.chat_template_kwargs.thinking": False}
    write_json(unit.folder / MANIFEST, manifest | {"basis": manifest["basis"] | thinking})
    assert "data.chat_template_kwargs.thinking was False, now not there" in refused(capsys, "run", config)


def test_too_little_memory_is_one_line(copied, capsys, monkeypatch):
    monkeypatch.setattr(commands, "load_config", lambda *given: bytearray(1 << 60))
    assert main(["run", str(copied[0])]) == 2
    assert capsys.readouterr().err == "allo-fast: out of memory\n"


def test_what_is_said_is_in_one_file(copied, capsys):
    config, folder = copied
    before = (folder / "log.txt").read_text()
    assert re.match(r"\S+ \S+ allo-fast run \S+micro\.yaml\n", before) and before.endswith(" done\n")
    assert " learn seed-1: parameters " in before and "\nallo - base: " in before
    assert main(["run", str(config), "learn.save_steps=3"]) == 0
    added = (folder / "log.txt").read_text().removeprefix(before)
    assert " learn.save_steps=3\n" in added and "learn.save_steps was 1, now 3" in added and ": complete\n" in added
    (folder / "08-learn/seed-0" / MANIFEST).write_text("{}")
    assert main(["learn", str(config)]) == 2
    *_, ended = (folder / "log.txt").read_text().splitlines()
    assert re.fullmatch(r"[-0-9]{10} [0-9:,]{12} ended: .*", ended) and "MANIFEST.json" in ended
    capsys.readouterr()
    with logged(Path("/dev/full"), "x"):
        say("on a full disk")
    assert capsys.readouterr() == ("on a full disk\n", "")


def test_what_changes_nothing_that_was_begun_is_taken_and_said(copied, capsys, caplog):
    config, folder = copied
    assert main(["run", str(config), "learn.save_steps=3", "seeds=[0]", "rivals=[]"]) == 0
    assert capsys.readouterr().out.count(": complete\n") == 10
    said = "learn.save_steps was 1, now 3"
    assert [record.message for record in caplog.records if said in record.message] == [
        f"{folder / 'config.yaml'}: seeds was [0, 1], now [0], rivals was ['dpo'], now [], {said}"
    ]
    assert load_config(folder / "config.yaml").learn.save_steps == 3
    assert sorted(path.name for path in (folder / "old-1").iterdir()) == ["config.yaml", "report.html", "summary.json"]
    assert main(["run", str(config), "learn.save_steps=4", "seeds=[0]", "rivals=[]"]) == 0
    assert not (folder / "old-2").exists(), "how often it is saved makes no other run"
    shutil.rmtree(unfinished := folder / "08-learn/seed-0")
    next(work := units(config)["learn/seed-0"].execute())
    work.close()
    started = (unfinished / "STARTED.json").read_bytes()
    run = Run(load_config(config, ["learn.save_minutes=1", "learn.skip_nonfinite_steps=2"]), STAGES)
    next(work := Unit(run, "learn", "seed-0").execute())
    assert (unfinished / "STARTED.json").read_bytes() == started, "it goes on"


def test_that_later_stages_may_be_refused_is_said_before(copied, capsys):
    config, folder = copied
    shutil.rmtree(folder / "03-pairs/seed-1")
    assert main(["run", str(config)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "complete, but from stages that are not: warmup seed-1, rewards seed-1, learn seed-1; they need"
    )
    assert main(["run", str(config)]) == 0 and "not:" not in capsys.readouterr().out


def test_a_report_needs_what_lies_in_the_run_alone(copied, tmp_path, capsys):
    config, folder = copied
    base, data = tmp_path / "base", tmp_path / "rows.jsonl"
    shutil.copytree(folder / "00-pretrain/base/model", base)
    data.write_text("".join(json.dumps(arithmetic_row("train", n)) + "\n" for n in range(1000, 1006)))
    words = [str(config), "name=given", f"data.train={data}", f"model.name_or_path={base}", "seeds=[0]", "method=dpo"]
    assert main(["run", *words]) == 0
    data.rename(renamed := tmp_path / "other.jsonl")
    capsys.readouterr()
    assert main(["report", *words]) == 0
    assert re.search("sample.* is not there; bring it back, or name where it lies", refused(capsys, "run", *words))
    words[2] = f"data.train={renamed}"
    assert main(["run", *words]) == 0
    assert capsys.readouterr().out.count(": complete\n") == 5, "what a file is called decides nothing"
    assert re.search(r"data.train was all, now \[0:3\]", refused(capsys, "run", *words, f"data.train={renamed}[:3]"))
    (tmp_path / "given/04-warmup/seed-0/MANIFEST.json").write_text("{}")
    assert re.search(
        "04-warmup.*: MANIFEST.json: damaged.*run `allo-fast warmup CONFIG --rerun`", refused(capsys, "report", *words)
    )


@pytest.mark.parametrize("damage", ["is gone", "is not what was written"])
def test_half_of_a_copy_is_none(copied, capsys, damage):
    config, folder = copied
    weights = folder / "08-learn/seed-1/model/model.safetensors"
    weights.unlink() if damage == "is gone" else weights.write_bytes(b"")
    line = refused(capsys, "run", config)
    assert line == f"allo-fast: {weights}: {damage}; move {weights.parent} away; `allo-fast export` makes it again"
    assert main(["export", str(folder), "learn", str(out := folder.parent / "out"), "--seed", "1"]) == 0
    shutil.rmtree(weights.parent)
    assert main(["run", str(config)]) == 0 and (out / "model.safetensors").exists()


def test_what_is_added_to_a_model_is_not_read(copied, capsys):
    config, folder = copied
    for name in ("chat_template.jinja", "model.safetensors.index.json", "additional_chat_templates/tool_use.jinja"):
        path = folder / "04-warmup/seed-0/model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        for words in (["run", config], ["export", folder, "warmup", folder.parent / "out"]):
            assert refused(capsys, *words) == f"allo-fast: {path}: was not made here; move it away"
        path.unlink()
    assert main(["run", str(config)]) == 0


def test_a_summary_of_other_settings_does_not_stay(copied, capsys):
    config, folder = copied
    before = every_byte(folder)
    changed = load_config(config, ["learn.learning_rate=2e-3"])
    next(Unit(Run(changed, STAGES, rerun=True), "learn", "seed-0").execute())
    assert load_config(folder / "config.yaml") == changed
    for name in ("summary.json", "report.html", "config.yaml"):
        assert (folder / "old-1" / name).read_bytes() == before[name]
    assert not (folder / "summary.json").exists() and not (folder / "report.html").exists()


def test_changed_input_files_are_named(copied, tmp_path):
    config, folder = copied
    data, base = tmp_path / "test.jsonl", tmp_path / "base"
    data.write_text(json.dumps({"problem": "1+1", "solution": "The answer is 2", "answer": "2"}) + "\n")
    shutil.copytree(folder / "00-pretrain/base/model", base)
    settings = [f"data.test={data}", f"data.train={data}", f"model.name_or_path={base}"]

    def unit(*more):
        return Unit(Run(load_config(config, [*settings, *more]), STAGES, rerun=True), "evaluate", "base")

    list(unit().execute())
    (base / "README.md").write_text("a note beside the weights")
    (base / "tokenizer_old").mkdir()
    for name in ("model.safetensors.bak", "tokens.log"):
        (base / name).write_text("beside it")
    assert unit().is_complete()
    (moved := tmp_path / "elsewhere").mkdir()
    shutil.copytree(base, moved / "base")
    assert unit(f"model.name_or_path={moved}/base", f"data.test={shutil.copy(data, moved)}").is_complete()
    text = data.read_text()
    data.write_text(text * 2)
    first, second = (hashlib.sha256(said.encode()).hexdigest()[:12] for said in (text, text * 2))
    assert unit().look() == (False, f"data.test: the file was {first}..., now {second}...")
    data.unlink()
    with pytest.raises(UserError, match=f"data.test: {data} is not there; bring it back, or name where it lies"):
        unit().look()
    data.write_text(text)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    assert unit().changed_base() == "", "a delta knows its weights"
    (base / "chat_template.jinja").write_text("")
    with pytest.raises(UserError, match="base: model.name_or_path: chat_template.jinja was not there, now "):
        tokenizer_of(unit())
    assert "model.name_or_path: model.safetensors was " in unit().look()[1]


def test_weights_count_wherever_the_index_has_them(copied, tmp_path):
    config, folder = copied
    shutil.copytree(folder / "00-pretrain/base/model", base := tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    shards = {name: f"{'ab'[n % 2]}/model.safetensors" for n, name in enumerate(tensors)}
    for shard in set(shards.values()):
        (base / shard).parent.mkdir()
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, base / shard, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    unit = Unit(Run(load_config(config, [f"model.name_or_path={base}", "name=x"]), STAGES), "sample", "seed-0")
    before = unit.basis()
    assert {f"model.name_or_path: {name}/model.safetensors" for name in "ab"} < before.keys()
    save_file(
        {name: t + 1 for name, t in load_file(base / "b/model.safetensors").items()}, base / "b/model.safetensors"
    )
    assert re.fullmatch("model.name_or_path: b/model.safetensors was .*, now .*", differences(before, unit.basis()))


def test_the_order_of_a_saved_sets_files_counts(copied, tmp_path):
    config, folder = copied
    rows = [{"prompt": str(number), "chosen": "1", "rejected": "2"} for number in range(4)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows", num_shards=2)
    words = [f"model.name_or_path={folder / '00-pretrain/base/model'}", f"data.train={tmp_path / 'rows'}", "name=x"]
    unit = Unit(Run(load_config(config, words), STAGES), "sample", "seed-0")
    before = unit.basis()
    state = json.loads((tmp_path / "rows/state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "rows/state.json").write_text(json.dumps(state))
    assert differences(before, unit.basis()).startswith("data.train: file 1 of 2 was ")


def test_what_the_hub_has_is_told_apart_by_its_contents(finished, tmp_path, monkeypatch):
    config, folder = finished
    hub = tmp_path / "hub/models--org--base"
    for name in "ab":
        shutil.copytree(folder / "00-pretrain/base/model", hub / "snapshots" / (name * 40))
        (hub / "snapshots" / (name * 40) / "merges.txt").write_text(name)
        (hub / "snapshots" / (name * 40) / "model.safetensors.index.json").write_text("{}")
    (hub / "refs").mkdir()

    def begin(cache="hub", revision="a", name="org/base"):
        """A process in which main is at this revision."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / cache))
        (tmp_path / cache / "models--org--base/refs/main").write_text(revision * 40)
        loading._cached.cache_clear()
        return Unit(Run(load_config(config, [f"model.name_or_path={name}", "name=hub"]), STAGES), "sample", "seed-0")

    first = (unit := begin()).basis()
    assert {"model.name_or_path: model.safetensors", "model.name_or_path: merges.txt"} < first.keys()
    (hub / "refs/main").write_text("b" * 40)
    assert unit.basis() == first, "as long as the process lasts"
    assert load_tokenizer("org/base").name_or_path.endswith("a" * 40)
    assert re.match(
        r"model.name_or_path: merges.txt was \S+, now \S+$", differences(first, begin(revision="b").basis())
    )
    (hub / "snapshots" / ("a" * 40) / "README.md").write_text("a note")
    shutil.copytree(tmp_path / "hub", tmp_path / "elsewhere")
    shutil.copytree(hub / "snapshots" / ("a" * 40), tmp_path / "base")
    assert begin("elsewhere").basis() == begin(name=tmp_path / "base").basis() == first
    shutil.rmtree(hub)
    with pytest.raises(UserError, match="^org/base: no model configuration that can be read"):
        hub.joinpath("refs").mkdir(parents=True)
        begin().basis()


def test_a_stage_does_not_trust_what_is_out_of_date(copied, capsys):
    config, _ = copied
    line = refused(capsys, "learn", config, "--rerun", "forget.beta=0.9")
    assert "07-forget/seed-0: forget.beta was 0.1, now 0.9; run `allo-fast forget CONFIG --rerun` first" in line
    assert "forget.beta was 0.1, now 0.9" in refused(capsys, "report", config, "forget.beta=0.9")
    assert main(["report", str(config)]) == 0, "what was refused changed nothing"


def test_the_configuration_of_a_run(copied, caplog):
    config, folder = copied
    saved, dumped = folder / "config.yaml", (folder / "config.yaml").read_text()
    saved.write_text("# mine\n" + dumped)
    assert main(["run", str(saved)]) == 0 and saved.read_text().startswith("# mine"), "as it says the same, it stays"
    assert main(["pairs", str(saved), "seeds=[0]", "--rerun"]) == 0
    assert (folder / "old-1/config.yaml").read_text().startswith("# mine")
    saved.write_text("")
    assert main(["run", str(config)]) == 0 and load_config(saved) == load_config(config)
    assert f"{saved}: expected keys and values, got NoneType" in caplog.text
    assert (folder / "old-2/config.yaml").read_text() == ""
    saved.unlink()
    assert main(["run", str(config)]) == 0, "each unit knows what it was made with"


def test_other_software_is_said_once_a_unit(copied, monkeypatch, caplog):
    config, _ = copied
    unit = units(config)["sample/seed-0"]
    shutil.rmtree(unit.folder)
    next(killed := unit.execute())
    killed.close()
    monkeypatch.setattr("allo_fast.runs.unit.versions", lambda: versions() | {"torch": "1.0"})
    list(unit.execute())
    (line,) = [record.message for record in caplog.records if "software" in record.message]
    assert re.search(r"sample/seed-0: continued with other software: torch was \S+, now 1.0$", line)


def test_unknown_options_are_refused(copied):
    with pytest.raises(SystemExit):
        main(["run", str(copied[0]), "--return"])


def test_method_dpo_ends_with_the_dense_model(finished, capsys):
    config, folder = finished
    assert main(["run", str(config), "method=dpo", "name=dense", "seeds=[0]"]) == 0
    assert re.search(r"^dpo +\d", capsys.readouterr().out, re.MULTILINE)
    dense = folder.parent / "dense"
    assert list(json.loads((dense / "summary.json").read_text())["models"]) == ["base", "dpo"]
    assert not (dense / "05-locate").exists() and (dense / "report.html").exists()


def test_protocol_release_runs_and_differs(finished):
    config, folder = finished
    assert main(["run", str(config), "protocol=release", "name=release", "seeds=[0]", "learn.epsilon=0.5"]) == 0
    facts = json.loads((folder.parent / "release" / "summary.json").read_text())["stages"]["07-forget/seed-0"]
    ours = json.loads((folder / "summary.json").read_text())["stages"]["07-forget/seed-0"]
    assert facts["forgotten_tokens"] == facts["tokens"] > ours["forgotten_tokens"], "every token has a weight p_t"
    assert facts["state_bytes"]["gradients"] > ours["state_bytes"]["gradients"], "clip: all keeps dense gradients"
    assert facts["selected"] != ours["selected"]


def test_what_the_sampler_is_asked(copied, monkeypatch):
    config, _ = copied
    asked, seeds = {}, []

    def record(model, tokenizer, prompts, end_tokens, *, seed, first, **settings):
        asked.setdefault(run.config.protocol, tokenizer.decode(prompts[0]))
        seeds.extend((seed, first + number) for number in range(len(prompts)))
        return [["The answer is 1"] * 3 for _ in prompts]

    monkeypatch.setattr("allo_fast.stages.sample.generate", record)
    for protocol in ("paper", "release"):
        run = Run(load_config(config, [f"protocol={protocol}"]), STAGES, rerun=True)
        for key in ("seed-0", "seed-1"):
            shutil.rmtree((unit := Unit(run, "sample", key)).folder)
            list(unit.execute())
    assert asked["release"] == asked["paper"] + " ", "the release's own defect"
    assert len(set(seeds)) == len(seeds) / 2 == 2 * len(read_jsonl(unit.folder / "problems.jsonl")), (
        "a seed of its own for every problem and run seed"
    )


def test_rewards_from_a_file(copied, tmp_path, capsys):
    config, folder = copied
    given = tmp_path / "rewards.jsonl"
    files = (folder / f"06-rewards/seed-{seed}/rewards.jsonl" for seed in (0, 1))
    rows = [row for file in files for row in file.read_text().split("\n")]
    given.write_text("\n".join(filter(None, rows)) + "\n")
    source = ["rewards.source=file", f"rewards.path={given}", "--rerun"]
    assert main(["rewards", str(config), *source]) == 0
    first = json.loads((folder / "06-rewards/seed-0/rewards.jsonl").read_text().splitlines()[0])
    assert first == json.loads(rows[0])
    given.write_text(json.dumps({**first, "rewards": first["rewards"][:-1]}) + "\n")
    assert main(["rewards", str(config), *source]) == 2
    assert f"expected {len(first['rewards'])} rewards, one per token, got {len(first['rewards']) - 1}" in (
        capsys.readouterr().err
    )


def test_a_stage_alone_says_what_it_waits_for(tmp_path, capsys):
    config = tmp_path / "micro.yaml"
    config.write_text(MICRO.format(folder=tmp_path))
    assert main(["learn", str(config)]) == 2
    assert "run `allo-fast pretrain CONFIG` first" in capsys.readouterr().err


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path, capsys):
    config = tmp_path / "micro.yaml"
    config.write_text(MICRO.format(folder=tmp_path))
    (tmp_path / "micro").mkdir()
    (tmp_path / "micro" / "thesis.txt").write_text("precious")
    assert main(["run", str(config)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "micro").iterdir()] == ["thesis.txt"]


def test_what_was_killed_at_its_first_write_begins_again(copied):
    config, folder = copied
    shutil.rmtree(folder)
    (torn := folder / "00-pretrain/base/.STARTED.json.partial").mkdir(parents=True)
    (torn / "STARTED.json").write_text("to")
    assert main(["pretrain", str(config)]) == 0 and not list(folder.rglob("*.partial"))


def test_what_was_killed_before_its_first_progress_says_then_what_run_it_is(copied):
    config, folder = copied
    shutil.rmtree(folder)
    run = Run(load_config(config), STAGES)
    assert Unit(run, "pretrain", "base")._start()[0] and not (folder / "config.yaml").exists()
    work = Unit(run, "pretrain", "base").execute()
    next(work)
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.max_prompt_tokens=3"], "data.train: .* no usable row; .*data.max_prompt_tokens is 3"),
        (["model.name_or_path=/nowhere"], "/nowhere: no such file or folder"),
        (["pairs.gold=never"], "no pair left: of 6 problems 6 have no correct response"),
        (["forget.threshold=0"], "no token's reward is below forget.threshold"),
        (["data.max_response_tokens=2", "data.format=multiple_choice"], "no usable row"),
    ],
)
def test_mistakes_end_with_one_line(copied, capsys, overrides, message):
    config, _ = copied
    assert main(["run", str(config), *overrides, "--rerun"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said) and "Traceback" not in said


def test_too_long_for_the_model(copied, capsys):
    config, _ = copied
    with pytest.raises(UserError, match="has .* tokens, the model reads 512"):
        from allo_fast.data.corpus import Corpus
        from allo_fast.stages.driving import check_lengths

        corpus = Corpus()
        corpus.add([5] * 510, [[5] * 3])
        check_lengths(AutoModelForCausalLM.from_pretrained(config.parent / "micro/00-pretrain/base/model"), corpus)


def test_options_are_judged_by_likelihood_and_bfloat16_states_are_3_1_bytes_per_parameter(copied, tmp_path):
    config, folder = copied
    data = tmp_path / "choice.jsonl"
    rows = [{"problem": f"{i}+1\nOptions:\n{i + 1}\n{i + 2}\n99", "answer": str(i + 1)} for i in range(5)]
    data.write_text("\n".join(map(json.dumps, rows)))
    choice = ["data.format=multiple_choice", f"data.train={data}", f"data.test={data}", "name=choice", "seeds=[0]"]
    choice += [f"model.name_or_path={folder / '00-pretrain/base/model'}", "model.dtype=bfloat16", "learn.ratio=0.05"]
    assert main(["run", str(config), *choice]) == 0
    pairs = [json.loads(x) for x in (tmp_path / "choice/03-pairs/seed-0/pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 10 and pairs[0]["chosen"] == "The answer is 1"
    answers = (tmp_path / "choice/09-evaluate/base/predictions.jsonl").read_text().splitlines()
    assert all(json.loads(row)["response"].startswith("The answer is ") for row in answers)
    stages = json.loads((tmp_path / "choice/summary.json").read_text())["stages"]
    assert all(3.0 < stages[f"{name}/seed-0"]["state_bytes_per_parameter"] <= 3.1 for name in ("07-forget", "08-learn"))
    assert main(["export", str(tmp_path / "choice"), "learn", str(tmp_path / "exported")]) == 0
    exported, trained = (
        named_weights(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))
        for path in (tmp_path / "exported", tmp_path / "choice/08-learn/seed-0/model")
    )
    assert all(same_bits(weight.data, exported[name].data) for name, weight in trained.items())
    assert main(["learn", str(config), *choice, "learn.learning_rate=1e-30", "--rerun"]) == 0
    forgotten, still = (
        Delta.load(tmp_path / f"choice/{name}/seed-0/delta.safetensors").values for name in ("07-forget", "08-learn")
    )
    assert all(torch.equal(values, still[name]) for name, values in forgotten.items())
    assert any((values != values.bfloat16()).any() for values in forgotten.values()), "with what bfloat16 would lose"


def test_what_a_killed_session_left_is_no_output_and_goes(copied):
    config, folder = copied
    learned = folder / "08-learn/seed-0"
    shutil.rmtree(learned)
    running = units(config)["learn/seed-0"].execute()
    next(running)
    for name in (".MANIFEST.json.partial", "model/.torn.partial"):
        (learned / name).mkdir(parents=True)
        (learned / name / "torn").write_text("torn")
    deque(running, maxlen=0)
    manifest = json.loads((learned / "MANIFEST.json").read_text())
    assert {path.name for path in learned.iterdir()} == {"MANIFEST.json", "delta.safetensors", "metrics.jsonl", "model"}
    assert not [name for kind in ("outputs", "copies", "logs") for name in manifest[kind] if "partial" in name]
    (learned / "scratch").mkdir()
    (learned / "checkpoint-3.safetensors").write_text("as where it was killed while it removed them")
    assert main(["run", str(config)]) == 0
    assert not (learned / "scratch").exists() and not (learned / "checkpoint-3.safetensors").exists()
