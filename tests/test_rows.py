"""Whole output rows: selected together, and trained by a product of their own."""

import pytest
import torch
from conftest import pair_corpus, tiny_llama

from allo_fast.data.batch import collate
from allo_fast.method.dense import DensePolicy
from allo_fast.method.objectives import Preference
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.rows import RowLinear, row_lengths, whole_rows
from allo_fast.method.selection import Selection
from allo_fast.model.weights import fingerprint, named_weights
from allo_kernels import Positions


def by_rows(scores, count, **settings):
    lengths = {name: score[0].numel() for name, score in scores.items()}
    ratio = (count + 0.1) / sum(score.numel() for score in scores.values())
    selection = Selection.from_scores(scores, ratio, base="", rows=lengths, **settings)
    return {name: selection.positions(name).unpack().tolist() for name in scores}


def test_rows_by_their_mean_score_as_long_as_the_next_fits():
    # Means: b 3, 1; a 2, 5; v 4, 0. The highest single entry, 6, lies in the row of mean 3.
    scores = {
        "b": torch.tensor([[6.0, 0.0, 3.0], [1.0, 1.0, 1.0]]),
        "a": torch.tensor([[2.0, 2.0], [-5.0, 5.0]]),
        "v": torch.tensor([4.0, 0.0]),
    }
    assert by_rows(scores, 6) == {"a": [2, 3], "v": [0], "b": [0, 1, 2]}
    assert by_rows(scores, 5) == {"a": [2, 3], "v": [0], "b": []}
    assert by_rows(scores, 3, skip=0.26) == {"a": [], "v": [], "b": [0, 1, 2]}
    assert by_rows(scores, 4, last=True) == {"a": [], "v": [1], "b": [3, 4, 5]}


def test_ties_go_to_the_lower_name_and_row():
    assert by_rows({"b": torch.ones(2, 2), "a": torch.ones(2, 2)}, 6) == {"a": [0, 1, 2, 3], "b": [0, 1]}


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        by_rows({"a": torch.tensor([[1.0, float("nan")], [1.0, 1.0]])}, 2)


def test_whole_rows_are_known_by_their_positions():
    def rows_of(*positions):
        found = whole_rows(Positions.pack(torch.tensor(positions, dtype=torch.int64), 12), 3)
        return None if found is None else found.tolist()

    assert rows_of(0, 1, 2, 9, 10, 11) == [0, 3]
    assert rows_of(1, 2, 3) is None and rows_of(0, 1, 3) is None and rows_of(0, 1) is None and rows_of() is None


def test_gradients_are_the_dense_ones_and_no_other_row_is_computed(monkeypatch):
    model, batch = tiny_llama(attention_bias=True), collate(pair_corpus(), pair_corpus().examples[:4])
    scores = {name: torch.rand(weight.shape) for name, weight in named_weights(model).items()}
    selection = Selection.from_scores(scores, 0.2, base=fingerprint(model), rows=row_lengths(model))
    products = []
    backward = RowLinear.backward

    def counted(ctx, upstream):
        products.append(len(ctx.saved_tensors[2]))
        return backward(ctx, upstream)

    monkeypatch.setattr(RowLinear, "backward", staticmethod(counted))

    policy, dense = SparsePolicy(tiny_llama(attention_bias=True), selection), DensePolicy(model)
    for either in (policy, dense):
        logps = either.response_logps(batch)
        Preference(0.5)(logps, logps.detach(), batch)[0].backward()
    layers = [name for name in selection.names if "_proj" in name and name.endswith("weight")]
    assert sorted(products) == sorted(len(selection.positions(name)) // row_lengths(model)[name] for name in layers)
    for name, value in policy.values.items():
        expected = named_weights(model)[name].grad.view(-1)[selection.positions(name).unpack()]
        torch.testing.assert_close(value.grad, expected, rtol=1e-4, atol=1e-6)
    with policy.reference():
        reference = policy.response_logps(batch)
    assert torch.equal(reference, dense.response_logps(batch))
