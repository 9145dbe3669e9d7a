"""Generated tasks of reasoning-gym as a data source."""

import sys
from types import SimpleNamespace

import pytest

from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.data import gym
from allo_fast.data.sources import is_generated, read_rows, source_files
from allo_fast.plan.rows import count_rows
from allo_fast.stages import STAGES


class Tasks:
    """As the library's data sets: an entry depends on the seed and its own number alone."""

    def __init__(self, settings):
        self.settings = settings

    def __getitem__(self, index):
        return {"question": f"{index}?", "answer": str(self.settings["seed"] + index), "metadata": {"n": index}}


def create_dataset(name, size, seed, terms=2, kinds=("a",)):
    if name != "sums":
        raise ValueError(f"Dataset '{name}' not registered")
    assert terms > 0, "terms must be positive"
    return Tasks({"size": size, "seed": seed, "terms": terms, "kinds": kinds})


LIBRARY = SimpleNamespace(create_dataset=create_dataset, factory=SimpleNamespace(DATASETS={"sums": None}))


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", LIBRARY)


def test_rows_are_problems(library):
    (where, row), _ = read_rows("reasoning_gym:sums?terms=3[4:6]")
    assert where == "reasoning_gym:sums?terms=3:4"
    said = {"question": "4?", "answer": "4", "metadata": {"n": 4}}
    assert row() == {"problem": "4?", "solution": "The answer is 4", **said}
    assert is_generated("reasoning_gym:sums") and source_files("reasoning_gym:sums[:3]") == []


def test_settings_are_numbers_lists_and_texts(library, monkeypatch):
    seen = {}
    monkeypatch.setattr(sys.modules["reasoning_gym"], "create_dataset", lambda name, **words: seen.update(words))
    read_rows('reasoning_gym:sums?terms=3&other=x&flag=true&empty=&kinds=["+","b"][:9]')
    assert seen == {"size": 9, "seed": 0, "terms": 3, "kinds": ["+", "b"], "other": "x", "flag": True, "empty": ""}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("reasoning_gym:sums?seed=1[:3]", "seed: problem i of seed 1 is i . 1 of seed 0"),
        ("reasoning_gym:nothing[:3]", "'nothing' not registered$"),
        ("reasoning_gym:sms[:3]", "'sms' not registered; did you mean sums[?]"),
        ("reasoning_gym:sums?trems=3[:3]", "unexpected keyword argument 'trems'"),
        ("reasoning_gym:sums?terms=0[:3]", "terms must be positive"),
        ("reasoning_gym:sums", "the generator is endless; name a slice like reasoning_gym:sums"),
    ],
)
def test_what_the_library_does_not_know(library, source, said):
    with pytest.raises(UserError, match=said):
        read_rows(source)


def test_a_task_that_only_a_judge_knows_has_no_solution():
    entry = {"question": "q", "answer": None, "metadata": {}}
    assert gym._row(entry) == {"problem": "q", **entry}


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="reasoning_gym:sums: needs reasoning-gym: pip install reasoning-gym"):
        gym.gym_rows("reasoning_gym:sums", 0, 1)


def test_a_run_knows_its_tasks_by_name(library):
    overrides = ["data.train=reasoning_gym:sums[:5]", "data.format=problems", "model.name_or_path=configs"]
    config = load_config("configs/smollm2_qa.yaml", overrides)
    assert "data.train" not in STAGES["sample"].files(config)
    assert count_rows(config).problems == 5


def test_the_library_itself():
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    rows = [row() for _, row in read_rows("reasoning_gym:chain_sum?max_terms=3&max_digits=1[10:13]")]
    tasks = reasoning_gym.create_dataset("chain_sum", seed=0, size=99, max_terms=3, max_digits=1)
    assert [(row["problem"], row["answer"]) for row in rows] == [
        (tasks[n]["question"], tasks[n]["answer"]) for n in (10, 11, 12)
    ], "whatever the slice"
