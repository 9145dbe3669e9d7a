"""lm-evaluation-harness on an exported folder: its log-probabilities, and its accuracy, are ours."""

import json

import pytest

from allo_fast.__main__ import main
from allo_fast.runs.rows import read_jsonl

ROWS = [
    {"problem": f"{a}+{b}-3\nOptions:\n{a + b - 3}\n{a + b + 3}\n{a - b + 7}", "answer": str(a + b - 3)}
    for a in range(5, 11)
    for b in (4, 6, 7, 8)
]


def options(row: dict) -> list[str]:
    return row["problem"].split("Options:\n")[1].split("\n")


@pytest.mark.xdist_group("runs")
def test_a_shared_task(finished, tmp_path, capsys, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, folder = finished
    (rows := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["export", str(folder), "learn", str(out := tmp_path / "model")]) == 0
    words = [f"data.test={rows}", f"data.train={rows}", "data.format=multiple_choice", "rivals=[]", "method=dpo"]
    words += [f"model.name_or_path={out}", f"output_dir={tmp_path}", "seeds=[0]"]
    assert main(["run", str(config), *words, "name=ours", "warmup.learning_rate=1e-9"]) == 0
    ours = read_jsonl(next((tmp_path / "ours").glob("*-evaluate/base")) / "predictions.jsonl")
    task = {
        "task": "shared",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{problem}}=",
        "doc_to_choice": lambda row: [f"The answer is {option}<eos>" for option in options(row)],  # ours have their end
        "doc_to_target": lambda row: options(row).index(row["answer"]),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    found = lm_eval.simple_evaluate(
        "hf", model_args={"pretrained": str(out), "dtype": "float32"}, tasks=[task], device="cpu", log_samples=True
    )
    samples = sorted(found["samples"]["shared"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(ours) == len(ROWS)
    for row, mine, sample in zip(ROWS, ours, samples, strict=True):
        theirs = dict(zip(options(row), (logp for ((logp, _),) in sample["resps"]), strict=True))
        right, *wrong = [row["answer"], *(option for option in options(row) if option != row["answer"])]
        logps = [response["logp"] for response in mine["responses"]]
        assert logps == pytest.approx([theirs[option] for option in (right, *wrong)], abs=1e-4)
    accuracy = sum(row["strict"] for row in ours) / len(ours)
    assert found["results"]["shared"]["acc,none"] == pytest.approx(accuracy)
