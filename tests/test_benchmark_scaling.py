"""`python -m benchmarks scaling`: what varies, what a point measures, the figure."""

import json
from dataclasses import replace

import pytest

from benchmarks import scaling
from benchmarks.__main__ import main

TINY = replace(scaling.BASE, size="1M", prompt=12, response=8, problems=2)


def test_one_thing_varies_at_a_time():
    for varied, points in scaling.VARIED.items():
        assert scaling.BASE in points or varied == "tokens of a sequence"
        rows = [scaling.Row(varied, point, 10, 1.0, 1, 1, 1) for point in points]
        places = [scaling._place(varied, replace(row, parameters=place)) for place, row in enumerate(rows)]
        assert places == sorted(set(places)), varied


def test_a_point_s_pairs_and_bytes():
    row = scaling.measure("responses a prompt", replace(TINY, responses=3))
    assert (row.pairs, row.useful_tokens) == (4, 2 * (12 + 3 * 7)) and row.cpu_seconds > 0
    assert row.state_bytes / row.parameters == pytest.approx(5.25, abs=0.05), "weights, and 25 bytes for each of 5 %"
    dense = scaling.measure("weights", replace(TINY, ratio=None))
    assert dense.state_bytes == 16 * dense.parameters


def test_what_it_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "VARIED", {"weights": [TINY], "ratio": [TINY, replace(TINY, ratio=0.2)]})
    assert main(["scaling", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["point"]["ratio"] for row in found["rows"]] == [0.05, None, 0.05, 0.2] and found["threads"]
    assert [plan["model"] for plan in found["plans"]] == [name for name in scaling.PLANNED for _ in range(2)]
    for plan in found["plans"]:
        assert plan["sparse_bytes"] < 0.3 * plan["dense_bytes"] and plan["zero_stage"] in (0, 3)
    assert "CPU microseconds a useful token" in (tmp_path / "scaling.svg").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1 + 8
