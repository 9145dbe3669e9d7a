import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from allo_fast.config import Config, UserError
from allo_fast.config_file import dump_config, load_config

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
        ("beta=0.5", "beta: unknown key; did you mean learn.beta?"),
        ("model=models/x", r"model: has keys of its own, as model.name_or_path, and no value \(got 'models/x'\)"),
        ("rl=dpo", "rl: unknown key; did you mean method?"),
        ("max_tokens_per_batch=8", "max_tokens_per_batch: unknown key; did you mean learn.max_tokens_per_batch?"),
        ("learn.num_train_epochs=true", "learn.num_train_epochs: expected a number .got True."),
        ("learn.max_tokens_per_batch=true", "learn.max_tokens_per_batch: expected a number .got True."),
        ("learn.learning_rate=true", "learn.learning_rate: expected a number .got True."),
        ("seeds=[true]", "seeds: expected a number .got .True.."),
        ("learn.loss_weights=[true]", "learn.loss_weights: expected a number"),
        ("forget.threshold=yes", "forget.threshold: expected a number .got True."),
        ("locate.windows=on", "locate.windows: expected a number .got True."),
        ("rewards.train.epochs=1", "did you mean rewards.train"),
        ("learn.ratio=1.5", "learn.ratio: .*less than or equal to 1 .got 1.5."),
        ("learn.loss_type=dpo", "learn.loss_type.*: .*'sigmoid', 'robust'.*.got 'dpo'."),
        ("learn.loss_type=[]", "learn.loss_type: "),
        ("learn.loss_type=[ipo, ipo]", "learn.loss_type: each only once"),
        ("learn.loss_weights=[1, 2]", "learn.loss_weights: expected 1, one for each loss, got 2"),
        ("learn={loss_type: simpo, epsilon: 0.5}", "learn.epsilon: .* loss_type: simpo has none"),
        ("learn.loss_type=orpo", "learn.epsilon: .* set it to 1"),
        ("protocol=papr", "protocol: .*'paper' or 'release'"),
        ("learn.ratio", "expected key.subkey=value"),
        ("name.first=1", "name has no keys of its own"),
        ("seeds=[1, 1]", "seeds: each only once"),
        ("rewards.source=file", "rewards.path goes with rewards.source: file"),
        ("rewards={source: file, path: x, model: y}", "rewards.model: with rewards.source: file no model is asked"),
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


@pytest.mark.parametrize(
    "override, message",
    [
        ("seeds=[-1]", "seeds: .*greater than or equal to 0 .got -1."),
        ("seeds=[0, 2147483648]", "seeds: .*less than or equal to 2147483647 .got 2147483648."),
        ("pairs.max_pairs=99999999999999999999", "pairs.max_pairs: expected at most 2147483647 .got 9999"),
        ("learn.learning_rate=.inf", "learn.learning_rate: .*finite number .got inf."),
        ("rewards.train.adam_epsilon=1e999", "rewards.train.adam_epsilon: .*finite number"),
        ("forget.threshold=.nan", "forget.threshold: .*finite number .got nan."),
        ("ddp_timeout=1e300", "ddp_timeout: .*less than or equal to 1000000"),
    ],
)
def test_numbers_are_finite_and_bounded(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, overrides=[override])
    assert load(tmp_path, overrides=["seeds=[0, 2147483647]"]).seeds == [0, 2147483647]


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "two\nlines", "x" * 201, "\u6f22" * 67])
def test_a_name_is_one_folder(tmp_path, name):
    with pytest.raises(UserError, match="name: expected the name of one folder in output_dir"):
        load(tmp_path, overrides=["name=" + json.dumps(name)])


def test_a_name_may_be_any_word(tmp_path):
    for name in ("x" * 200, "\u6f22 \xfc.v2", "...", "-x"):
        assert load(tmp_path, overrides=["name=" + json.dumps(name)]).name == name


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in pairwise("abcdefghijklmnopqrstuvwxyz")
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learn: {ratio: 0.1, beta: 1, ratio: 0.2}", "line 4, column 30: ratio: stands twice"),
        ("name: y", "line 4, column 1: name: stands twice"),
        ('"name": y', "name: stands twice"),
        ("l: &l {ratio: 0.1, ratio: 0.1}\nm: &m {<<: *l}\nlearn: {<<: *m}", "line 4, column 20: ratio: stands twice"),
        (ALIASES, "more than 10000 keys and values, with what its aliases stand for"),
        ("seeds: &s [0, *s]", "line 4, column 15: .s holds itself"),
        ("learn: &l {<<: *l}", "line 4, column 16: .l holds itself"),
        ("seeds: " + "[" * 5000, "line 4, column 57: nested more than 50 deep"),
        ("seeds: " + "[" * 5000 + "]" * 5000, "nested more than 50 deep"),
        ("seeds: [0, [1", "line 4, column 14: while parsing a flow sequence: expected"),
        ("\tname: y", r"line 4, column 1: while scanning for the next token: found character '\\t'"),
        ("name: a\0b", "unacceptable character #x0000"),
        (r'output_dir: "a\0b"', r"line 4, column 13: no text: 'a\\x00b'"),
        (r'output_dir: "\ud800"', r"line 4, column 13: no text: '\\ud800'"),
        ("seeds: [2001-99-99]", "line 4, column 9: month must be in 1..12"),
        ("seeds: [" + "9" * 5000 + "]", "line 4, column 9: Exceeds the limit"),
        ("x: !!python/object/apply:os.system [exit]", "line 4, column 4: could not determine a constructor"),
    ],
    ids=range(17),
)
def test_yaml_that_is_refused_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=f"run.yaml: not YAML: .*{message}") as refusal:
        load(tmp_path, MINIMAL + text)
    assert "\n" not in str(refusal.value)


def test_aliases_and_what_is_merged(tmp_path):
    config = load(tmp_path, MINIMAL + "learn: &l {beta: 0.3, ratio: 0.1}\nforget: {<<: *l, beta: 0.2}\n")
    assert (config.forget.beta, config.forget.ratio, config.learn.beta) == (0.2, 0.1, 0.3)
    config = load(tmp_path, MINIMAL + "learn: &l {beta: 0.3}\nforget: *l\n", ["learn.beta=0.4"])
    assert (config.learn.beta, config.forget.beta) == (0.4, 0.3), "an override is of the key that it names"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_files_in_other_encodings(tmp_path, encoding):
    (tmp_path / "run.yaml").write_bytes((MINIMAL + "# caf\xe9").encode(encoding))
    with pytest.raises(UserError, match=r"run.yaml: not UTF-8, at byte \d+; save it as UTF-8"):
        load_config(tmp_path / "run.yaml")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: is a directory"):
        load_config(tmp_path)
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
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "saved.yaml") == config


def test_what_is_held_out_of_other_data_is_so_in_a_saved_configuration(tmp_path):
    """And a test that both name is refused without the whole section, which nobody wrote."""
    config = load(tmp_path, overrides=["data.test=null", "data.train=a"])
    assert (config.data.test, config.data.test_size) == ("a", 0.1)
    (saved := tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(saved) == config
    assert load_config(saved, ["data.train=other"]).data.test == "other"
    with pytest.raises(UserError, match="beside one set test_size: null$"):
        load_config(saved, ["data.test=c"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    assert isinstance(load_config(path), Config)
    assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_a_key_is_meant_where_the_method_trains(tmp_path):
    for method, section in (("allo", "learn"), ("sparse-dpo", "learn"), ("dpo", "warmup")):
        for typed, ours in (("beta", "beta"), ("epochs", "num_train_epochs")):
            with pytest.raises(UserError, match=f"{typed}: unknown key; did you mean {section}.{ours}?"):
                load(tmp_path, overrides=[f"method={method}", f"{typed}=1"])
