import json

from benchmarks.__main__ import main


def test_step_runs_and_counts(tmp_path, capsys):
    main(["step", "--steps", "1", "--out", str(tmp_path / "step.json")])
    dense, sparse = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert dense["state_bytes_per_parameter"] == 16 and sparse["state_bytes_per_parameter"] <= 3.1
    assert sparse["selected"] == int(0.05 * sparse["parameters"]) and dense["tokens"] == sparse["tokens"]
    assert "state_bytes_per_parameter" in capsys.readouterr().out
