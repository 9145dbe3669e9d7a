"""Every key is explained, and the page in docs/ is what the source says."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from allo_fast.__main__ import main
from allo_fast.config import Config
from allo_fast.config_file import NOT_KEYS, known_keys
from allo_fast.config_keys import as_markdown, keys_of
from allo_fast.section import Section

DOCS = Path(__file__).parent.parent / "docs" / "keys.md"


class Inner(Section):
    depth: int = 3  # how deep


class Outer(Section):
    needed: str
    # Above it
    # and on; also
    rate: float = Field(0.5, gt=0, le=1)  # behind it
    kind: Literal["a", "b"] | Annotated[float, Field(ge=0)] | None = None
    several: list[int] = [1, 2]  # of a list
    free: dict[str, Any] = {}
    empty: str = ""
    inner: Inner = Inner()
    maybe: Inner | None = None  # perhaps


class Changed(Outer):
    rate: float = Field(0.25, gt=0)
    needed: str = "x"  # no more


def test_what_a_section_says():
    assert [(key.name, key.default, key.takes, key.about) for key in keys_of(Outer)] == [
        ("needed", None, "text", ""),
        ("rate", "0.5", "number, > 0, <= 1", "Above it and on; also behind it"),
        ("kind", "null", "a, b or number or null", ""),
        ("several", "[1, 2]", "a list: whole number", "of a list"),
        ("free", "{}", "keys and values", ""),
        ("empty", '""', "text", ""),
        ("inner.depth", "3", "whole number", "how deep"),
        ("maybe", "null", "the keys `maybe.depth`, ..., or null", "perhaps"),
        ("maybe.depth", "3", "whole number", "how deep"),
    ]
    changed = {key.name: key for key in keys_of(Changed)}
    assert (changed["rate"].default, changed["rate"].takes) == ("0.25", "number, > 0")
    assert changed["rate"].about == "Above it and on; also behind it", "of what it changes"
    assert (changed["needed"].default, changed["needed"].about) == ("x", "no more")


@pytest.mark.parametrize("key", keys_of(Config), ids=lambda key: key.name)
def test_every_key_is_explained(key):
    assert key.about and key.takes


def test_every_key_is_there():
    found = {key.name for key in keys_of(Config)}
    sections = {name.rpartition(".")[0] for name in found}
    assert {name for name in known_keys(Config) if name not in sections} <= found


def test_the_page_is_what_the_source_says(capsys):
    assert DOCS.read_text() == as_markdown(), "allo-fast keys --markdown > docs/keys.md"
    assert main(["keys", "--markdown"]) == 0 and capsys.readouterr().out == as_markdown()
    page = as_markdown()
    assert page.count("| `adam_beta1` |") == 1 and "`learn.adam_beta1`" not in page, "once, of all"
    assert "| `learn.gradient_accumulation_steps` | 32 |" in page and "| `sample.temperature` | 0.7 |" in page


def test_a_key_is_found_by_a_word(capsys):
    assert main(["keys", "MARGIN"]) == 0
    out = capsys.readouterr().out
    assert "learn.simpo_gamma: default 0.5; number, >= 0. of simpo and confpo: the margin" in out
    assert "beta" not in out and max(map(len, out.splitlines())) <= 100
    assert main(["keys", "data.train"]) == 0 and "data.train: must be set; text" in capsys.readouterr().out
    assert main(["keys", "rpo_alpha"]) == 0 and "learn.loss_weights: default null" in capsys.readouterr().out
    assert main(["keys", "max_steps"]) == 2
    assert NOT_KEYS["max_steps"] in capsys.readouterr().err
    assert main(["keys", "no such word"]) == 2
    assert "no such word: in no key's name or explanation" in capsys.readouterr().err
