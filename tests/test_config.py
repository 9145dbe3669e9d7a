from pathlib import Path

import pytest
import yaml

from allo_fast.config import Config, UserError
from allo_fast.config_file import load_config, save_config

MINIMAL = "name: x\nmodel: {name_or_path: m}\ndata: {train: a.jsonl, test: b.jsonl}\n"
CONFIGS = sorted(Path(__file__).parents[1].glob("configs/*.yaml"))


def load(tmp_path, text=MINIMAL, overrides=()):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, list(overrides))


def test_the_defaults_are_the_papers(tmp_path):
    config = load(tmp_path)
    assert (config.warmup.learning_rate, config.warmup.beta, config.warmup.warmup_steps) == (1e-6, 0.1, 0.1)
    assert config.warmup.per_device_train_batch_size * config.warmup.gradient_accumulation_steps == 32
    assert (config.forget.learning_rate, config.forget.warmup_steps, config.forget.beta) == (5e-7, 0.03, 0.1)
    assert config.forget.per_device_train_batch_size * config.forget.gradient_accumulation_steps == 128
    assert (config.learn.learning_rate, config.learn.beta, config.epsilon) == (5e-6, 0.1, 0.1)
    assert load(tmp_path, overrides=["method=sparse-dpo"]).epsilon == 1, "plain DPO"
    assert load(tmp_path, overrides=["method=sparse-dpo", "learn.epsilon=0.3"]).epsilon == 0.3
    assert config.learn.per_device_train_batch_size * config.learn.gradient_accumulation_steps == 128
    assert (config.rewards.train.learning_rate, config.rewards.train.num_train_epochs) == (2e-5, 3)
    assert (config.sample.num_return_sequences, config.sample.temperature, config.sample.top_p) == (10, 0.7, 0.95)


def test_overrides_are_yaml(tmp_path):
    config = load(tmp_path, overrides=["learn.learning_rate=3e-5", "seeds=[4, 5]", "model.name_or_path=org/model"])
    assert (config.learn.learning_rate, config.seeds, config.model.name_or_path) == (3e-5, [4, 5], "org/model")


@pytest.mark.parametrize(
    "override, message",
    [
        ("learn.learing_rate=1", "learn.learing_rate: unknown key; did you mean learn.learning_rate?"),
        ("learn.ratios=1", "learn.ratios: unknown key; did you mean learn.ratio?"),
        ("sft.learing_rate=1", "sft.learing_rate: unknown key; did you mean sft.learning_rate?"),
        ("sft.ratio=0", "sft.ratio: .*greater than 0 .got 0."),
        ("lern.ratio=1", "lern: unknown key; did you mean learn?"),
        ("rewards.train.epochs=1", "did you mean rewards.train"),
        ("learn.ratio=1.5", "learn.ratio: .*less than or equal to 1 .got 1.5."),
        ("protocol=papr", "protocol: .*'paper' or 'release'"),
        ("learn.ratio", "expected key.subkey=value"),
        ("name.first=1", "name has no keys of its own"),
        ("seeds=[1, 1]", "seeds: each only once"),
        ("rewards.source=file", "rewards.path goes with rewards.source: file"),
        ("locate.skip=0.99", "more than 1"),
        ("seeds=[", "not YAML"),
        ("model.name_or_path=null", "model.name_or_path: which model?"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, overrides=[override])


def test_a_section_that_is_off_is_turned_on(tmp_path):
    assert load(tmp_path).sft is None and load(tmp_path, overrides=["sft={}"]).sft.learning_rate == 2e-5
    saved = MINIMAL + "sft: null\n"
    assert load(tmp_path, saved).sft is None and load(tmp_path, saved, ["sft.ratio=0.1"]).sft.ratio == 0.1


def test_seeds_that_no_rounding_by_chance_takes_are_refused(tmp_path):
    stochastic = "model.rounding=stochastic"
    assert load(tmp_path, overrides=[stochastic, "seeds=[0, 2147483647]"]).model.rounding == "stochastic"
    for seeds in ("[-1]", "[0, 2147483648]"):
        with pytest.raises(UserError, match="seeds: with model.rounding: stochastic expected 0..2147483647, got"):
            load(tmp_path, overrides=[stochastic, f"seeds={seeds}"])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="expected keys and values, got list"):
        load(tmp_path, "[1]")
    with pytest.raises(UserError, match="expected keys and values, got NoneType"):
        load(tmp_path, "")
    with pytest.raises(UserError, match="data.train: Field required"):
        load(tmp_path, "name: x\nmodel: {name_or_path: m}\ndata: {test: b}\n")


def test_saved_and_loaded_is_the_same(tmp_path):
    config = load(tmp_path, overrides=["learn.ratio=0.07"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert isinstance(load_config(path), Config)
    assert yaml.safe_load(path.read_text())["name"] == path.stem
