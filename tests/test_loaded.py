"""Deltas on a live model."""

import gc
import time
import weakref

import pytest
import torch
from conftest import random_selection, tiny_llama

import allo_fast
from allo_fast.config import UserError
from allo_fast.method.delta import Delta
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.weights import named_weights, same_bits


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)


def base(dtype=torch.float32):
    return tiny_llama().to(dtype)


def trained(path, seed: int, dtype=torch.float32, rounding_seed=None, stops=None) -> dict[str, torch.Tensor]:
    """Writes a delta of some of the entries; what the model becomes by it."""
    model = base(dtype)
    if stops:
        model.generation_config.eos_token_id = stops
    policy = SparsePolicy(model, random_selection(model, 0.2, seed), rounding_seed=rounding_seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in policy.values.values():
            value += 0.1 * torch.randn(value.shape, generator=draw)
    policy.write_back()
    policy.save_delta(path)
    return weights_of(model)


@pytest.mark.parametrize("dtype, rounding_seed", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 3)])
def test_one_makes_the_trained_model_and_none_the_base(tmp_path, dtype, rounding_seed):
    wanted = trained(tmp_path / "a", 1, dtype, rounding_seed)
    model = base(dtype)
    before = weights_of(model)
    delta = allo_fast.load_delta(model, tmp_path / "a")
    assert delta.applied and delta.scale == 1 and same(weights_of(model), wanted) and not same(before, wanted)
    delta.remove()
    assert not delta.applied and same(weights_of(model), before)
    delta.apply()
    assert same(weights_of(model), wanted)
    delta.apply()
    assert same(weights_of(model), wanted), "it is, already"
    delta.unload()
    assert not delta.applied and same(weights_of(model), before)


def test_the_model_computes_with_it(tmp_path):
    trained(tmp_path / "a", 1)
    model, ids = base(), torch.tensor([[5, 6, 7]])
    merged = base()
    Delta.load(tmp_path / "a").merge_into(merged)
    before = model(ids).logits
    delta = allo_fast.load_delta(model, tmp_path / "a")
    assert torch.equal(model(ids).logits, merged(ids).logits)
    delta.remove()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0, 2.0])
def test_scales_are_on_the_line_through_both(tmp_path, scale):
    wanted = trained(tmp_path / "a", 1)
    model = base()
    before = weights_of(model)
    delta = allo_fast.load_delta(model, tmp_path / "a", scale)
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, before[name] + scale * (wanted[name] - before[name]))
    delta.scale = 1
    assert same(weights_of(model), wanted)
    delta.scale = scale
    delta.remove()
    assert same(weights_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_add_up_and_come_off_in_any_order(tmp_path, dtype):
    wanted = [trained(tmp_path / name, seed, dtype) for seed, name in enumerate("abc", start=1)]
    model = base(dtype)
    before = weights_of(model)
    loaded = [allo_fast.load_delta(model, tmp_path / name) for name in "abc"]
    for name, weight in weights_of(model).items():
        changes = sum(part[name].float() - before[name].float() for part in wanted)
        rounding = 0.02 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(weight.float(), before[name].float() + changes, rtol=rounding, atol=rounding)
    loaded[1].remove()
    loaded[0].unload()
    assert same(weights_of(model), wanted[2])
    loaded[1].apply()
    loaded[2].remove()
    assert same(weights_of(model), wanted[1])
    loaded[1].swap(loaded[2])
    assert same(weights_of(model), wanted[2])
    for delta in loaded[1:]:
        delta.unload()
    assert same(weights_of(model), before)


def test_it_stops_where_the_trained_model_does(tmp_path):
    trained(tmp_path / "a", 1, stops=[2, 7])
    trained(tmp_path / "b", 2, stops=[9])
    model = base()
    stops = model.generation_config.eos_token_id
    first, second = (allo_fast.load_delta(model, tmp_path / name) for name in "ab")
    assert model.generation_config.eos_token_id == [9]
    second.remove()
    assert model.generation_config.eos_token_id == [2, 7]
    first.scale = 0
    assert model.generation_config.eos_token_id == stops, "the base's"
    first.scale = 0.5
    assert model.generation_config.eos_token_id == [2, 7]
    first.remove()
    assert model.generation_config.eos_token_id == stops


def test_what_does_not_belong_together(tmp_path):
    trained(tmp_path / "a", 1)
    model = base()
    with pytest.raises(UserError, match="made for the model"):
        allo_fast.load_delta(tiny_llama(seed=4), tmp_path / "a")
    delta = allo_fast.load_delta(model, tmp_path / "a")
    with pytest.raises(UserError, match="swap: the other delta is not, or not any more, on this model"):
        delta.swap(allo_fast.load_delta(base(), tmp_path / "a"))
    model.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"was cast from torch.float32 to torch.bfloat16 since; cast it back"):
        delta.remove()
    delta = allo_fast.load_delta(model := base(), tmp_path / "a")
    model.resize_token_embeddings(80)
    with pytest.raises(UserError, match=r"was resized since; the base is to be loaded anew"):
        delta.remove()
    policy_model = base()
    SparsePolicy(policy_model, random_selection(policy_model))
    with pytest.raises(UserError, match="a SparsePolicy trains this model's weights"):
        allo_fast.load_delta(policy_model, tmp_path / "a")
    delta = allo_fast.load_delta(model := base(), tmp_path / "a")
    delta.remove()
    policy = SparsePolicy(model, random_selection(model))
    with pytest.raises(UserError, match="a SparsePolicy trains this model's weights"):
        delta.apply()
    policy.release()
    delta.apply()
    with pytest.raises(UserError, match=r"made in float32, the model is in bfloat16; load it with dtype='float32'"):
        allo_fast.load_delta(base(torch.bfloat16), tmp_path / "a")
    with pytest.raises(UserError, match="nowhere: no such file; stages that train some of the weights leave a delta"):
        allo_fast.load_delta(base(), tmp_path / "nowhere")
    with pytest.raises(UserError, match="a folder, where a file was expected; stages that train some"):
        allo_fast.load_delta(base(), tmp_path)
    (tmp_path / "no").write_bytes(b"no")
    with pytest.raises(UserError, match="no"):
        allo_fast.load_delta(base(), tmp_path / "no")


def test_a_base_that_changed_after_the_last_was_unloaded_is_noticed(tmp_path):
    trained(tmp_path / "a", 1)
    model = base()
    allo_fast.load_delta(model, tmp_path / "a").unload()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(UserError, match="made for the model"):
        allo_fast.load_delta(model, tmp_path / "a")


def test_a_refused_one_changes_nothing(tmp_path):
    wanted = trained(tmp_path / "a", 1)
    other = tiny_llama(seed=4)
    SparsePolicy(other, random_selection(other)).save_delta(tmp_path / "other")
    model = base()
    allo_fast.load_delta(model, tmp_path / "a")
    with pytest.raises(UserError, match="made for the model"):
        allo_fast.load_delta(model, tmp_path / "other")
    assert same(weights_of(model), wanted)


def test_what_was_unloaded_does_nothing_any_more(tmp_path):
    wanted = trained(tmp_path / "a", 1)
    trained(tmp_path / "b", 2)
    model = base()
    first, second = (allo_fast.load_delta(model, tmp_path / name) for name in "ab")
    second.unload()
    for use in (second.apply, second.remove, second.unload, lambda: setattr(second, "scale", 2)):
        with pytest.raises(UserError, match="this delta was unloaded"):
            use()
    with pytest.raises(UserError, match="not any more, on this model"):
        first.swap(second)
    for scale, error in (("x", TypeError), (float("nan"), UserError), (1e3, UserError)):
        with pytest.raises(error):
            first.scale = scale
    with pytest.raises(UserError, match="scale: expected a number from -100 to 100, got nan"):
        allo_fast.load_delta(model, tmp_path / "b", float("nan"))
    assert first.applied and first.scale == 1 and not second.applied and same(weights_of(model), wanted)


def test_a_model_is_let_go(tmp_path):
    trained(tmp_path / "a", 1)
    model = base()
    delta, gone = allo_fast.load_delta(model, tmp_path / "a"), weakref.ref(model)
    del model, delta
    gc.collect()
    assert gone() is None


def test_the_base_is_read_once(tmp_path, monkeypatch):
    trained(tmp_path / "a", 1)
    trained(tmp_path / "b", 2)
    model = base()
    first = allo_fast.load_delta(model, tmp_path / "a")
    monkeypatch.setattr("allo_fast.method.loaded.fingerprint", lambda _: time.sleep(1) or "another")
    second = allo_fast.load_delta(model, tmp_path / "b")
    first.swap(second)
    assert second.applied
