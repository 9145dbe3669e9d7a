"""PEFT's adapters of single weights, made and read: what PEFT makes of a base is what is here, to the bit."""

import json
import re

import peft
import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from allo_fast import load_delta
from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.method.adapters import _Change, _share_of
from allo_fast.method.delta import Delta
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights, same_bits

DTYPES = torch.float32, torch.bfloat16
KINDS = "supertuning", "shira"


def base_in(tmp_path, dtype=torch.float32):
    model = tiny_llama().to(dtype)
    model.save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    return model


def again(tmp_path, dtype):
    return type(tiny_llama()).from_pretrained(tmp_path / "base", dtype=dtype)


def write_delta(model, path, only: str = "_proj", ratio: float = 0.1, by: float = 0.01, moved=slice(None)):
    """Of entries of tensors whose names hold `only`; model becomes the trained one."""
    scores = {name: torch.rand(weight.shape) for name, weight in named_weights(model).items() if only in name}
    policy = SparsePolicy(model, Selection.from_scores(scores, ratio, base=fingerprint(model)))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in policy.values.values():
            value[moved] += by * torch.randn(value.shape, generator=draw)[moved]
    policy.write_back()
    policy.save_delta(path)
    policy.release()


def convert(tmp_path, source: str, out: str, *words: str) -> int:
    return main(["convert", str(tmp_path / source), str(tmp_path / out), "--base", str(tmp_path / "base"), *words])


def weights_of(model) -> dict:
    return dict(named_weights(model))


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def as_peft_does(folder, model):
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_makes_the_trained_model_of_it(tmp_path, capsys, kind, dtype):
    model = base_in(tmp_path, dtype)
    write_delta(model, tmp_path / "delta.safetensors")
    assert convert(tmp_path, "delta.safetensors", kind, "--to", kind) == 0
    said = capsys.readouterr().out
    found = re.search(r"(\d+) weights are changed; PEFT makes (\d+) of them another number, by at most (\S+)", said)
    changed, missed, apart = int(found[1]), int(found[2]), float(found[3])
    merged = as_peft_does(tmp_path / kind, again(tmp_path, dtype))
    trained, untrained = weights_of(model), weights_of(again(tmp_path, dtype))
    differ = {name: int((weight != trained[name]).sum()) for name, weight in weights_of(merged).items()}
    errors = [(weight.float() - trained[name].float()).abs().max() for name, weight in weights_of(merged).items()]
    assert apart == pytest.approx(max(errors).item(), rel=0.05)
    moved = sum(int((weight != trained[name]).sum()) for name, weight in untrained.items())
    assert said.splitlines()[-1] == str(tmp_path / kind) and "stops at" not in said
    assert sum(differ.values()) == missed < moved / 4 and changed == moved > 300
    assert missed == 0 or kind == "supertuning" or dtype == torch.float32
    ids = torch.arange(12)[None]
    unmerged = peft.PeftModel.from_pretrained(again(tmp_path, dtype), tmp_path / kind).eval()
    torch.testing.assert_close(unmerged(ids).logits, merged.eval()(ids).logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_becomes_a_delta(tmp_path, capsys, kind, dtype):
    base_in(tmp_path, dtype)
    named = {"target_modules": ["q_proj", "down_proj"], "init_weights": False}
    config = peft.ShiraConfig(r=2, **named) if kind == "shira" else peft.SupertuningConfig(sparsity=0.8, **named)
    adapted = peft.get_peft_model(again(tmp_path, dtype), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert convert(tmp_path, "adapter", "delta.safetensors") == 0
    assert f"says that it was trained on {tmp_path / 'base'}" in capsys.readouterr().out
    delta, model = Delta.load(tmp_path / "delta.safetensors"), again(tmp_path, dtype)
    assert delta.dtype == str(dtype).removeprefix("torch.") and len(delta.positions) == 4
    delta.merge_into(model)
    assert same(weights_of(model), weights_of(adapted.merge_and_unload()))
    assert fingerprint(model) != delta.base


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path, kind):
    model = base_in(tmp_path, torch.bfloat16)
    write_delta(model, tmp_path / "delta.safetensors", ratio=0.05)
    assert convert(tmp_path, "delta.safetensors", "adapter", "--to", kind) == 0
    assert convert(tmp_path, "adapter", "back.safetensors") == 0
    delta = Delta.load(tmp_path / "back.safetensors")
    before = again(tmp_path, torch.bfloat16).parameters()
    changed = sum(int((a != b).sum()) for a, b in zip(model.parameters(), before, strict=True))
    entries = sum(map(len, delta.positions.values()))
    assert entries == changed  # what only fills up a layer is left out again


def test_trained_on_in_peft_an_entry_is_one(tmp_path):
    """What fills up a layer lies at positions of its own, in order."""
    model = base_in(tmp_path)
    write_delta(model, tmp_path / "delta.safetensors")
    assert convert(tmp_path, "delta.safetensors", "adapter") == 0
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    indices = [tensor for name, tensor in tensors.items() if name.endswith("supertuning_indices")]
    assert len(indices) == 14 and all((index.diff() > 0).all() for index in indices)
    zeros = [int((tensor == 0).sum()) for name, tensor in tensors.items() if name.endswith("supertuning_values")]
    assert min(zeros) == 0 < max(zeros)


def test_a_share_holds_as_many_as_the_densest_needs():
    """However 1 - sparsity is rounded."""
    for count in range(1, 49):
        changes = [_Change("layer", (7, size // 7), torch.arange(count), torch.ones(count)) for size in (49, 700)]
        settings, lengths = _share_of(changes)
        assert lengths == [int(change.size * (1 - settings["sparsity"])) for change in changes]
        assert lengths[0] == count <= lengths[1] < 14.3 * (count + 1)


def test_all_of_a_layer(tmp_path):
    model = base_in(tmp_path)
    write_delta(model, tmp_path / "delta.safetensors", only="layers.0.mlp.up_proj", ratio=1, by=1)
    words = [
        "convert",
        str(tmp_path / "delta.safetensors"),
        str(tmp_path / "adapter"),
        "--base",
        str(tmp_path / "base"),
    ]
    assert main(words) == 0
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["sparsity"] == 0
    torch.testing.assert_close(
        weights_of(as_peft_does(tmp_path / "adapter", again(tmp_path, torch.float32))), weights_of(model)
    )


def test_the_tokens_it_stops_at_are_said(tmp_path, capsys):
    model = base_in(tmp_path)
    model.generation_config.eos_token_id = [5, 7]
    write_delta(model, tmp_path / "delta.safetensors")
    assert convert(tmp_path, "delta.safetensors", "adapter") == 0
    assert "stops at the tokens [5, 7], which an adapter does not say" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "words", "said"),
    [
        ({}, [], "add --base MODEL, which it was trained on"),
        (
            {"only": "embed"},
            ["--base", "BASE"],
            "model.embed_tokens (of 1) is no linear layer",
        ),
        ({"moved": slice(0, 0)}, ["--base", "BASE"], "it changes nothing of this model"),
        (
            {"ratio": 0.95},
            ["--base", "BASE", "--to", "shira"],
            "r would be 19, more than model.layers.0",
        ),
        ({}, ["--base", "NONE"], "NONE"),
    ],
)
def test_what_is_no_adapter_of_linear_layers(tmp_path, capsys, how, words, said):
    model = base_in(tmp_path)
    write_delta(model, tmp_path / "delta.safetensors", **how)
    words = [word.replace("BASE", str(tmp_path / "base")) for word in words]
    assert main(["convert", str(tmp_path / "delta.safetensors"), str(tmp_path / "adapter"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "adapter").exists()


def test_of_another_base(tmp_path, capsys):
    write_delta(base_in(tmp_path), tmp_path / "delta.safetensors")
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    assert convert(tmp_path, "delta.safetensors", "adapter") == 2
    assert "made for the model" in capsys.readouterr().err and not (tmp_path / "adapter").exists()
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "base")
    assert convert(tmp_path, "delta.safetensors", "adapter") == 2
    assert "made for the model" in capsys.readouterr().err


def adapter(tmp_path, kind: str = "supertuning", **settings):
    """Of PEFT's, and its tensors."""
    named = {"target_modules": ["q_proj"], "init_weights": False}
    configs = {"shira": peft.ShiraConfig, "supertuning": peft.SupertuningConfig, "lora": peft.LoraConfig}
    if kind == "lora":
        named["init_lora_weights"] = named.pop("init_weights")
    peft.get_peft_model(again(tmp_path, torch.float32), configs[kind](**named, **settings)).save_pretrained(
        tmp_path / "adapter"
    )
    return load_file(tmp_path / "adapter/adapter_model.safetensors")


def changed(**tensors):
    """A first layer with other positions or values."""

    def change(found):
        layer = min(found).rsplit(".", 1)[0]
        return found | {f"{layer}.{name}": change(found[f"{layer}.{name}"]) for name, change in tensors.items()}

    return change


@pytest.mark.parametrize(
    ("kind", "settings", "change", "said"),
    [
        ("lora", {}, None, "lora is none of supertuning, shira; merge it"),
        ("supertuning", {"r": 2}, None, "supertuning_lora_A.weight is more than supertuning adds to single weights"),
        ("supertuning", {"save_precomputed_indices": False}, None, "save it with save_precomputed_indices=True"),
        ("supertuning", {"modules_to_save": ["lm_head"]}, None, "is more than supertuning adds"),
        ("supertuning", {}, changed(supertuning_indices=lambda index: index + 10**6), "expected 0.."),
        ("supertuning", {}, changed(supertuning_indices=lambda index: index * 0), "without duplicates"),
        ("supertuning", {}, changed(supertuning_indices=lambda index: index[1:].clone()), "as many finite values"),
        ("supertuning", {}, changed(supertuning_values=lambda value: value * torch.nan), "as many finite values"),
        (
            "supertuning",
            {},
            changed(supertuning_indices=lambda index: index.bfloat16()),
            "of torch.bfloat16, values of",
        ),
        ("supertuning", {}, changed(supertuning_values=lambda value: value.cfloat()), "values of torch.complex64"),
        ("shira", {"r": 2}, changed(shira_indices=lambda index: index + 16), "as many finite values"),
        ("shira", {"r": 2}, changed(shira_indices=lambda index: index[0].clone()), "without duplicates"),
        (
            "shira",
            {"r": 2},
            lambda found: {k.replace("s.1", "s.7"): v for k, v in found.items()},
            "no layer",
        ),
    ],
)
def test_adapters_that_are_none_of_these(tmp_path, capsys, kind, settings, change, said):
    base_in(tmp_path)
    tensors = adapter(tmp_path, kind, **settings)
    if change:
        save_file(change(tensors), tmp_path / "adapter/adapter_model.safetensors")
    assert convert(tmp_path, "adapter", "delta.safetensors") == 2
    found = capsys.readouterr().err
    assert said in found and found.count(str(tmp_path / "adapter:")) == 1 and "in safetensors" not in found
    assert not (tmp_path / "delta.safetensors").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapters(tmp_path, capsys, name):
    base_in(tmp_path)
    adapter(tmp_path)
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[:-9])
    assert (
        convert(tmp_path, "adapter", "new.safetensors") == 2
        and "not an adapter of PEFT's in safetensors" in capsys.readouterr().err
    )
    for content in (b"[]" if name.endswith("json") else b"", b"[" * 200_000 + b"]" * 200_000):
        path.write_bytes(content)
        assert (
            convert(tmp_path, "adapter", "new.safetensors") == 2
            and "not an adapter of PEFT's in safetensors" in capsys.readouterr().err
        )


def test_settings_that_do_not_belong(tmp_path, capsys):
    base_in(tmp_path)
    adapter(tmp_path, "shira", r=2)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true'))
    assert convert(tmp_path, "adapter", "new.safetensors") == 2 and "fan_in_fan_out" in capsys.readouterr().err
    assert convert(tmp_path, "adapter", "new.safetensors", "--to", "shira") == 2
    assert "adapter is an adapter" in capsys.readouterr().err
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for source, said in {
        "a.gguf": "--base: of an adapter or a delta",
        "nothing": "nothing: no such file or folder",
        "base": "base: no adapter (it has no adapter_config.json); of a run, name a stage's delta.safetensors",
        "adapter/none.safetensors": "no such file",
        "adapter/adapter_model.safetensors": f"name its folder, {tmp_path / 'adapter'}",
    }.items():
        assert convert(tmp_path, source, "new") == 2 and said in capsys.readouterr().err
    with pytest.raises(UserError, match="an adapter of PEFT's; `allo-fast convert` makes a delta of it"):
        load_delta(tiny_llama(), tmp_path / "adapter")
    assert convert(tmp_path, "a.gguf", "new", "--to", "shira") == 2 and "a.gguf is none" in capsys.readouterr().err
    for out in ("base", "delta", "a.gguf"):
        assert convert(tmp_path, "adapter", out) == 2
        assert "name a file that does not exist, as delta.safetensors" in capsys.readouterr().err


def test_an_adapter_beside_another(tmp_path):
    """As Trainer leaves them: each checkpoint's within the last one's folder."""
    base_in(tmp_path)
    adapter(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "checkpoint-1")
    adapter(tmp_path)
    (tmp_path / "checkpoint-1").rename(tmp_path / "adapter/checkpoint-1")
    assert convert(tmp_path, "adapter/checkpoint-1", "adapter/delta.safetensors") == 0
    assert convert(tmp_path, "adapter/delta.safetensors", "again") == 0


def test_an_adapter_that_changes_nothing(tmp_path, capsys):
    base_in(tmp_path)
    tensors = adapter(tmp_path)
    for found in ({}, {name: tensor * 0 for name, tensor in tensors.items() if name.endswith("values")}):
        kept = {name: tensor for name, tensor in tensors.items() if name.endswith("indices")} if found else {}
        save_file(found | kept, tmp_path / "adapter/adapter_model.safetensors")
        assert convert(tmp_path, "adapter", "new.safetensors") == 2
        assert "adapter: it changes nothing" in capsys.readouterr().err
