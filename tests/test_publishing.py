"""Exported folders have a card, and go to the hub when asked."""

import json
import re

import huggingface_hub
import pytest
import yaml
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
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
    assert f"{learnt['selected']:,} of its {learnt['parameters']:,} weights (9.99%)" in text
    assert text.startswith("\n# micro: learn, seed-0\n") and "allo-fast run config.yaml" in text
    accuracy = facts["models"]["allo"]["accuracy"]
    assert (
        f"| allo | accuracy | {accuracy:.1%} |" in text and "\n- allo - dpo: " in text and "paired by problem" in text
    )
    assert "- data.train: 6 rows, 0 set aside" in text and "arXiv:2406.12606" in text
    assert (folder / "config.yaml").read_text() in text
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("base, named", [("org/model", True), (".", False)], ids=["of the hub", "a folder here"])
def test_only_a_base_on_the_hub_is_linked(copied, base, named):
    _, folder = copied
    run = Run.read(folder, STAGES)
    run.config.model.name_or_path = base
    card = model_card(run, Unit(run, "warmup", "seed-0"))
    assert ("base_model: org/model\n" in card) == named and ("base_model" in card) == named
    assert "weights (" not in card, "dense DPO trained all"


def test_preferences_and_a_run_without_a_summary(copied):
    _, folder = copied
    run, path = Run.read(folder, STAGES), folder / "summary.json"
    metric = {"mean": 0.75, "ci95": [0.7, 0.8]}
    summary = json.loads(path.read_text()) | {"models": {"allo": {"metrics": {"rewards/accuracies": metric}}}}
    path.write_text(json.dumps(summary))
    unit = Unit(run, "learn", "seed-1")
    assert "| allo | rewards/accuracies | 75.0% | 70.0% .. 80.0% |" in model_card(run, unit)
    path.unlink()
    assert "## Data and results" not in model_card(run, unit) and "## Citation" in model_card(run, unit)


def test_to_the_hub_when_asked(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ["export", str(finished[1]), "learn", str(tmp_path / "out"), "--push-to-hub", "me/mine", "--private"]
    assert main(words) == 0
    created, (repository, files) = Hub.said
    assert created == ("me/mine", True, True) and repository == "me/mine"
    assert {"README.md", "config.json", "model.safetensors"} <= {*files}
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/mine"


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["export", str(finished[1]), "learn", str(tmp_path / "out"), "--push-to-hub", "me/mine"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"--push-to-hub me/mine: .*; the folder is whole: ", said)
    assert (tmp_path / "out/model.safetensors").exists()
