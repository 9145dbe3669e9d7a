import pytest
import torch
from conftest import random_selection, shared, tiny_llama
from safetensors.torch import load_file
from torch import nn

from allo_fast.config import UserError
from allo_fast.durable import load_tensors, save_tensors
from allo_fast.method.selection import Selection
from allo_fast.model.weights import named_weights


def from_scores(scores, ratio, **settings):
    return Selection.from_scores(scores, ratio, base="", **settings)


def masks(selection, shapes):
    found = {}
    for name, shape in shapes.items():
        mask = torch.zeros(shape, dtype=torch.uint8)
        mask.view(-1)[selection.positions(name).unpack()] = 1
        found[name] = mask
    return found


@pytest.mark.parametrize("low, high", [(0, 5), (0, 10), (0, 50), (5, 10)])
def test_release_rule_reproduces_the_release(low, high):
    golden = load_file(shared("golden/neuron_mask.safetensors"))
    names = [key.removeprefix("before.") for key in golden if key.startswith("before.")]
    delta = {name: golden[f"after.{name}"] - golden[f"before.{name}"] for name in names}
    selection = from_scores(delta, (high - low) / 100, skip=low / 100, protocol="release")
    for name, mask in masks(selection, {name: score.shape for name, score in delta.items()}).items():
        assert torch.equal(mask, golden[f"mask.{low}_{high}.{name}"]), name


@pytest.mark.parametrize("ratio", [0.05, 0.29, 1.0, 1 / 3])
def test_exactly_floor_of_ratio_times_n(ratio):
    scores = {"b": torch.randn(10, 10), "a": torch.randn(100)}
    selection = from_scores(scores, ratio)
    # 0.29 * 200 is 57.99999999999999 in binary: the decimal that was written decides.
    assert selection.selected == {0.05: 10, 0.29: 58, 1.0: 200, 1 / 3: 66}[ratio]
    ranked = torch.cat([scores["a"].abs(), scores["b"].abs().flatten()]).sort(descending=True).values
    kept = [scores[name].flatten()[selection.positions(name).unpack()].abs() for name in scores]
    assert torch.equal(torch.cat(kept).sort(descending=True).values, ranked[: selection.selected])


def test_ties_go_to_the_lower_name_and_index_in_any_order():
    scores = {"b": torch.ones(4), "a": torch.tensor([1.0, 2.0, 1.0, 0.0])}
    for order in (["a", "b"], ["b", "a"]):
        selection = from_scores({name: scores[name] for name in order}, 0.5)
        assert {name: selection.positions(name).unpack().tolist() for name in scores} == {"a": [0, 1, 2], "b": [0]}


def test_skip_takes_a_band_and_complements_the_top():
    scores = {"a": torch.randperm(100).float()}
    band = from_scores(scores, 0.1, skip=0.05)
    assert sorted(scores["a"][band.positions("a").unpack()].tolist()) == list(range(85, 95))
    last = from_scores(scores, 0.1, skip=0.9)
    assert sorted(scores["a"][last.positions("a").unpack()].tolist()) == list(range(10))


def test_excluded_tensors_do_not_compete():
    scores = {"embed": torch.full((50,), 9.0), "head": torch.arange(50.0)}
    selection = from_scores(scores, 0.1, exclude=("emb*",))
    assert (selection.names, selection.selected, selection.parameters) == (["head"], 5, 50)
    with pytest.raises(UserError, match="'nothing' matches no tensor"):
        from_scores(scores, 0.1, exclude=("nothing",))


def test_from_delta_counts_tied_weights_once_and_reads_in_fp32():
    before = tiny_llama(tie_word_embeddings=True).bfloat16()
    after = tiny_llama(tie_word_embeddings=True).bfloat16().float()
    weight = named_weights(after)["model.embed_tokens.weight"]
    with torch.no_grad():
        weight.view(-1)[7] += 1e-6  # far below the rounding of bfloat16
    total = sum(w.numel() for w in before.parameters())
    selection = Selection.from_delta(before, after, 1.5 / total)
    assert selection.parameters == total
    assert selection.positions("model.embed_tokens.weight").unpack().tolist() == [7]


def test_from_delta_selects_for_a_base_in_another_dtype():
    """Of a copy that was rounded the changes would be mostly the rounding."""
    before, after, model = tiny_llama(), tiny_llama(), tiny_llama().bfloat16()
    with torch.no_grad():
        named_weights(after)["lm_head.weight"].view(-1)[7] += 1e-6
    selection = Selection.from_delta(before, after, 1.5 / sum(w.numel() for w in before.parameters()), of=model)
    selection.check(model)
    assert selection.positions("lm_head.weight").unpack().tolist() == [7]


def test_a_different_model_is_refused():
    with pytest.raises(ValueError, match="not the same model"):
        Selection.from_delta(tiny_llama(), nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize("ratio, skip", [(0.0, 0.0), (-0.1, 0.0), (0.8, 0.3)])
def test_bad_fractions(ratio, skip):
    with pytest.raises(ValueError, match="ratio, skip"):
        from_scores({"a": torch.ones(4)}, ratio, skip=skip)


def test_saved_and_loaded(tmp_path):
    model = tiny_llama()
    selection = random_selection(model)
    selection.save(str(tmp_path / "mask.safetensors"))
    assert repr(selection).startswith(f"Selection({selection.selected:,} of {selection.parameters:,} weights, in ")
    loaded = Selection.load(tmp_path / "mask.safetensors")
    loaded.check(model)
    assert loaded.sha256() == selection.sha256()
    assert (loaded.parameters, loaded.ratio) == (selection.parameters, selection.ratio)
    assert random_selection(model, seed=2).sha256() != selection.sha256()
    with pytest.raises(UserError, match="mask.safetensors: made for the model"):
        loaded.check(tiny_llama(seed=5))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "mask.safetensors").read_bytes()[:100])
    with pytest.raises(UserError, match="torn.safetensors: not a selection"):
        Selection.load(tmp_path / "torn.safetensors")


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(UserError, match="nothing is selected: ratio 0.1 of 4 weights"):
        from_scores({"a": torch.ones(4)}, 0.1)
    with pytest.raises(UserError, match="nothing is selected: ratio 0.5 of 0 weights"):
        from_scores({"a": torch.ones(4)}, 0.5, exclude=("*",))
    with pytest.raises(UserError, match="no weight changed"):
        Selection.from_delta(tiny_llama(), tiny_llama(), 0.5)


def test_unchanged_weights_fill_up_and_it_is_said(caplog):
    selection = from_scores({"a": torch.tensor([0.0, 1.0, 0.0, 0.0])}, 0.75)
    assert selection.positions("a").unpack().tolist() == [0, 1, 2] and "only 1 weights have a score" in caplog.text


@pytest.mark.parametrize("protocol", ["paper", "release"])
def test_nan_scores_are_refused(protocol):
    with pytest.raises(ValueError, match="NaN"):
        from_scores({"a": torch.tensor([1.0, float("nan")])}, 0.5, protocol=protocol)


@pytest.mark.parametrize("wrong", [{"protocol": "relase"}, {"last": True}, {"rows": {"a": 2}}])
def test_what_the_release_does_not_have_is_refused(wrong):
    with pytest.raises(ValueError, match="protocol: expected 'paper', or 'release' without last and rows"):
        from_scores({"a": torch.ones(4)}, 0.5, **{"protocol": "release", **wrong})


def test_tampered_files_are_refused(tmp_path):
    model = tiny_llama()
    path = tmp_path / "mask.safetensors"
    random_selection(model).save(path)
    tensors, good = load_tensors(path)
    name = next(iter(good["sizes"]))
    renamed = {key.replace(name, "other"): tensor for key, tensor in tensors.items()}
    for message, about, held in (
        ("not a selection: metadata: expected sizes", good | {"sizes": [name]}, tensors),
        ("not a selection: low, starts, size: expected", good | {"sizes": {name: "9"}}, tensors),
        ("not a selection: .* of 0 parameters", good | {"parameters": 0}, tensors),
        ("not a selection: ", good | {"parameters": [1]}, tensors),
        ("not a selection: metadata: expected sizes", good | {"base": None}, tensors),
        ("not a selection: starts", good, tensors | {f"{name}.starts": torch.tensor([0, 1, 2, 3])}),
        ("other is not a tensor of the model", good | {"sizes": {"other": good["sizes"][name]}}, renamed),
        (f"{name} is not a tensor of the model, or has", good | {"sizes": {name: good["sizes"][name] + 1}}, tensors),
    ):
        save_tensors(path, held, about)
        with pytest.raises(UserError, match=message):
            Selection.load(path).check(model)
