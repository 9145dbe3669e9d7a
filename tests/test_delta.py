"""Deltas: what a stage passes on, from which the next one starts and every model is rebuilt."""

import copy
import json

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama
from safetensors.torch import save_file

from allo_fast.config import UserError
from allo_fast.data.batch import collate
from allo_fast.durable import load_tensors, save_tensors, seal
from allo_fast.method.delta import Delta, set_entries
from allo_fast.method.optim import SparseAdamW
from allo_fast.method.policy import SparsePolicy
from allo_fast.model.weights import named_weights, same_bits
from allo_kernels import Positions


def train(policy, lr=1e-2, steps=3):
    optimizer, corpus = SparseAdamW(policy, lr=lr), pair_corpus()
    batch = collate(corpus, corpus.examples[:4])
    for _ in range(steps):
        optimizer.zero_grad()
        policy.response_logps(batch).sum().backward()
        optimizer.step()
    return policy


def forgotten(base, path, lr=1e-2):
    """A policy that trained 30 % of a copy of `base`, and its delta in the file."""
    policy = train(SparsePolicy(copy.deepcopy(base), random_selection(base, 0.3, seed=1)), lr)
    policy.save_delta(path)
    return policy


def started(base, path, seed=2):
    """A policy on another 30 %, some of which forgetting trained too, that starts from the delta in the file."""
    return SparsePolicy(copy.deepcopy(base), random_selection(base, 0.3, seed), Delta.load(path))


def assert_same_bits(first, second):
    first, second = dict(first), dict(second)
    assert first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_stages_are_rebuilt_bit_for_bit(tmp_path, dtype, tied):
    base, paths = tiny_llama(tie_word_embeddings=tied).to(dtype), [tmp_path / name for name in ("first", "both")]
    first = forgotten(base, paths[0])
    second = train(started(base, paths[0]))
    second.save_delta(paths[1], before=paths[0])
    for path, policy in zip(paths, (first, second), strict=True):
        delta, rebuilt = Delta.load(path), copy.deepcopy(base)
        assert (delta.base, delta.dtype) == (first.base, str(dtype).removeprefix("torch."))
        delta.merge_into(rebuilt)
        assert_same_bits(named_weights(rebuilt).items(), policy.full_weights())
    chosen = [sum(map(len, policy.positions.values())) for policy in (first, second)]
    assert max(chosen) < sum(map(len, Delta.load(paths[1]).positions.values())) < sum(chosen), "the union of both"


def test_updates_below_the_rounding_go_on_in_the_next_stage(tmp_path):
    base = tiny_llama().bfloat16()
    first = forgotten(base, tmp_path / "delta", lr=1e-7)
    second, carried = started(base, tmp_path / "delta"), 0
    for name, weight in named_weights(base).items():
        expected = weight.detach().float().flatten()
        expected[first.positions[name].unpack()] = first.values[name].detach()
        found = second.values[name].detach()
        assert torch.equal(found, expected[second.positions[name].unpack()])
        carried += int((found != found.bfloat16()).sum())
    assert carried > 0.25 * second.selected, "what bfloat16 would have lost"
    assert first.changed() < 0.01 * first.selected, "and it would have been nearly all of it"


def test_policy_and_reference_start_from_the_rounded_delta(tmp_path):
    base = tiny_llama().bfloat16()
    first = forgotten(base, tmp_path / "delta")
    second = started(base, tmp_path / "delta")
    assert_same_bits(second.full_weights(), first.full_weights())
    train(second)
    with second.reference():
        assert_same_bits(second.full_weights(), first.full_weights())
    assert second.changed()


@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("size, world", [(200_001, 3), (65_536, 2), (3, 4)])
def test_each_rank_sets_what_lies_in_its_share(monkeypatch, size, world, seed):
    """Shares begin and end anywhere within the blocks that positions are stored in; the last may have nothing."""
    draw = torch.Generator().manual_seed(0)
    at = Positions.pack((torch.rand(size, generator=draw) < 0.1).nonzero().squeeze(1), size)
    values, expected = torch.randn(len(at), generator=draw), torch.zeros(size, dtype=torch.bfloat16)
    set_entries(expected, at, values, seed)
    assert torch.equal(expected[at.unpack()], values.bfloat16()) == (seed is None) or size == 3
    part, shares = -(-size // world), []
    for rank in range(world):
        monkeypatch.setattr("allo_fast.ranks.world_size", lambda: world)
        monkeypatch.setattr("allo_fast.ranks.rank", lambda rank=rank: rank)
        weight = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        weight.ds_numel, weight.ds_tensor = size, torch.zeros(part, dtype=torch.bfloat16)
        set_entries(weight, at, values, seed)
        shares.append(weight.ds_tensor)
    assert torch.equal(torch.cat(shares)[:size], expected)


def test_a_delta_goes_with_its_base_alone(tmp_path):
    base, path = tiny_llama(), tmp_path / "delta.safetensors"
    forgotten(base, path)
    for model in (tiny_llama(seed=5), tiny_llama().bfloat16()):
        with pytest.raises(UserError, match="delta.safetensors: made for the model"):
            Delta.load(path).merge_into(model)
    other = tiny_llama(seed=5)
    with pytest.raises(UserError, match="delta.safetensors: made for the model"):
        SparsePolicy(other, random_selection(other), Delta.load(path))


def test_damaged_deltas_are_refused(tmp_path):
    path, name = tmp_path / "delta.safetensors", "model.norm.weight"
    forgotten(tiny_llama(), path)
    with pytest.raises(UserError, match=f"delto.safetensors: no such file; nearest: {path}$"):
        Delta.load(tmp_path / "delto.safetensors")
    tensors, about = load_tensors(path)
    values = tensors[f"{name}.values"]
    cases = (
        ("it has no 'dtype'", {key: about[key] for key in about if key != "dtype"}, {}),
        ("dtype: expected one of", about | {"dtype": "int8"}, {}),
        ("stops: expected token ids", about | {"stops": ["</s>"]}, {}),
        ("rounding_seed: expected None or an integer", about | {"rounding_seed": -1}, {}),
        ("rounding_seed: expected weights in", about | {"rounding_seed": 1, "dtype": "float16"}, {}),
        ("not a delta: ", about | {"stops": None}, {}),
        ("stops: expected token ids", about | {"stops": [-1]}, {}),
        ("metadata: it names no tensor", about | {"sizes": {}}, {}),
        ("metadata: expected sizes of tensors and a base", about | {"base": 5}, {}),
        (f"{name}: expected {len(values)} values in float32", about, {f"{name}.values": values[:-1].clone()}),
        (f"{name}: expected {len(values)} values in float32", about, {f"{name}.values": values[:, None]}),
        (f"{name}: expected {len(values)} values in float32", about, {f"{name}.values": values.bfloat16()}),
        (f"{name}: a value is NaN or infinite", about, {f"{name}.values": torch.full_like(values, torch.inf)}),
        ("not a delta: starts", about, {f"{name}.starts": torch.tensor([0, 1])}),
    )
    for message, metadata, changed in cases:
        save_file(tensors | changed, path, {"about": json.dumps({"sha256": "0" * 64} | metadata)})
        seal(path)
        with pytest.raises(UserError, match=f"delta.safetensors: .*{message}"):
            Delta.load(path)
    for metadata in ("[]", "null", "5", "[" * 100_000 + "]" * 100_000):
        text = f'{{"sha256": "{"0" * 64}"}}'
        save_file(tensors, path, {"about": f"[{text}, {metadata}]"})
        seal(path)
        with pytest.raises(UserError, match="delta.safetensors: not a delta: metadata: expected an object"):
            Delta.load(path)
    save_file(tensors, path, {"about": "[" * 100_000})
    for other in (path, __file__):
        with pytest.raises(UserError, match="not a delta"):
            Delta.load(other)
    save_tensors(path, tensors, about | {"sizes": about["sizes"] | {name: 33}})
    with pytest.raises(UserError, match="model.norm.weight is not a tensor of the model, or has another size"):
        Delta.load(path).merge_into(tiny_llama())


def test_a_delta_brings_the_stops_of_the_model_that_it_was_trained_for(tmp_path):
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model))
    model.generation_config.eos_token_id = [2, 5]
    policy.save_delta(tmp_path / "delta.safetensors")
    merged = tiny_llama()
    Delta.load(tmp_path / "delta.safetensors").merge_into(merged)
    assert merged.generation_config.eos_token_id == [2, 5]
    merged.generation_config.eos_token_id = (same := [5, 2])
    Delta.load(tmp_path / "delta.safetensors").set_into(merged)
    assert merged.generation_config.eos_token_id is same, "the same stops stay as they are written"


def test_the_seed_of_a_rounding_stays_with_the_delta(tmp_path):
    base = tiny_llama()
    forgotten(base, tmp_path / "delta")
    delta = Delta.load(tmp_path / "delta")
    assert delta.rounding_seed is None
    seeded = Delta(delta.base, delta.dtype, delta.positions, delta.values, rounding_seed=7)
    seeded.save(str(tmp_path / "seeded"))
    assert Delta.load(tmp_path / "seeded").rounding_seed == 7
