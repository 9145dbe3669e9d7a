"""Exported folders have a card, and go to the hub when asked."""

import json
import re
import shutil

import pytest
import yaml
from transformers import AutoModelForCausalLM

from allo_fast import publishing
from allo_fast.__main__ import main
from allo_fast.method.delta import Delta
from allo_fast.publishing import model_card
from allo_fast.runs.run import Run
from allo_fast.runs.unit import Unit
from allo_fast.stages import STAGES

pytestmark = pytest.mark.xdist_group("runs")  # one finished run for all


class Hub:
    """Stands for huggingface_hub.HfApi."""

    said: list = []

    def create_repo(self, repository, private, exist_ok):
        self.said.append((repository, private, exist_ok))
        return f"https://hub/{repository}"

    def upload_folder(self, repo_id, folder_path):
        self.said.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_the_card_of_an_exported_folder(finished, tmp_path, capsys):
    _, folder = finished
    assert main(["export", str(folder), "learn", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n", "nothing is uploaded that was not asked for"
    card = (tmp_path / "out/README.md").read_text()
    _, about, text = card.split("---\n", 2)
    assert yaml.safe_load(about) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["allo-fast", "allo"],
    }
    facts = json.loads((folder / "summary.json").read_text())
    learnt = facts["stages"]["08-learn/seed-0"]
    entries = sum(map(len, Delta.load(folder / "08-learn/seed-0/delta.safetensors").positions.values()))
    assert entries >= learnt["selected"], "forgetting's are in it"
    assert f"a model that the run pretrained: {entries:,} of its {learnt['parameters']:,} weights (" in text
    assert text.startswith("\n# micro: learn, seed-0\n") and "allo-fast run config.yaml" in text
    accuracy = facts["models"]["allo"]["accuracy"]
    assert (
        f"| allo | accuracy | {accuracy:.1%} |" in text and "\n- allo - dpo: " in text and "paired by problem" in text
    )
    assert "- data.train: 6 rows, 0 set aside" in text and "arXiv:2406.12606" in text
    assert (folder / "config.yaml").read_text() in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "base, named", [("org/model", True), (".", False), ("models/gone", False), ("/data/x/llama", False)]
)
def test_only_a_base_of_the_hub_is_linked(copied, monkeypatch, base, named):
    _, folder = copied
    monkeypatch.setattr(publishing, "try_to_load_from_cache", lambda name, _: "/cache" if name == "org/model" else None)
    run = Run.read(folder, STAGES)
    run.config.model.name_or_path = base
    card = model_card(run, Unit(run, "warmup", "seed-0"))
    assert ("base_model: org/model\n" in card) == named and ("base_model" in card) == named
    assert "weights (" not in card, "dense DPO trained all"
    run.config.sft = run.config.warmup
    name = base.rpartition("/")[2] if base != "." else ""
    assert f"Trained from {name}, after fine-tuning in the run (sft)." in model_card(run, Unit(run, "warmup", "seed-0"))
    assert "Pretrained in the run." in model_card(run, Unit(run, "pretrain", "base"))


def test_a_card_says_which_of_the_results_are_its_own(copied):
    run = Run.read(copied[1], STAGES)
    for stage, key, said in (
        ("learn", "seed-1", "This model is `allo`, of seed-1."),
        ("warmup", "seed-0", "This model is `dpo`, of seed-0."),
        ("pretrain", "base", "This model is `base`, of base."),
        ("forget", "seed-0", "This model itself was not judged; others of its run were."),
    ):
        assert f"\n{said}\nMeans over seeds 0 1, with 95 % intervals:\n" in model_card(run, Unit(run, stage, key))
    run.config.sft = run.config.warmup
    assert "This model itself was not judged" in model_card(run, Unit(run, "pretrain", "base"))


def test_preferences_and_a_run_without_a_summary(copied):
    _, folder = copied
    run, path = Run.read(folder, STAGES), folder / "summary.json"
    metric = {"mean": 0.75, "ci95": [0.7, 0.8]}
    summary = json.loads(path.read_text()) | {"models": {"allo": {"metrics": {"rewards/accuracies": metric}}}}
    path.write_text(json.dumps(summary))
    unit = Unit(run, "learn", "seed-1")
    assert "| allo | rewards/accuracies | 75.0% | 70.0% .. 80.0% |" in model_card(run, unit)
    judged = {"accuracy": 0.6, "ci95": [0.5, 0.7], "reward": [1.25]}
    path.write_text(json.dumps(summary | {"models": {"allo": judged}}))
    card = model_card(run, unit)
    assert "| allo | wins | 60.0% | 50.0% .. 70.0% |" in card and "\n- allo: mean reward 1.25" in card
    path.unlink()
    assert "## Data and results" not in model_card(run, unit) and "## Citation" in model_card(run, unit)


def test_to_the_hub_when_asked(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(publishing, "HfApi", Hub)
    words = ["export", str(finished[1]), "learn", str(tmp_path / "out"), "--push-to-hub", "me/mine", "--private"]
    assert main(words) == 0
    created, (repository, files) = Hub.said
    assert created == ("me/mine", True, True) and repository == "me/mine"
    assert {"README.md", "config.json", "model.safetensors"} <= {*files}
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mine"


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(finished, tmp_path, monkeypatch, capsys):
    words = ["export", str(finished[1]), "learn", str(tmp_path / "out"), "--push-to-hub", "me/mine"]

    class Refusing(Hub):
        def upload_folder(self, repo_id, folder_path):
            raise LookupError("no route")

    monkeypatch.setattr(publishing, "HfApi", Refusing)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert re.search(r"--push-to-hub me/mine: the folder is whole: .*/out: LookupError: no route", said)
    assert (tmp_path / "out/model.safetensors").exists()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.undo()
    assert main(words) == 2 and not (tmp_path / "out").exists(), "offline, as tests are: nothing is exported first"
    assert main([*words[:-2], "--private"]) == 2 and "add --push-to-hub" in capsys.readouterr().err
