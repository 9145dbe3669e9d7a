import numpy as np
import pytest
import torch
from conftest import pair_corpus, tiny_llama

from allo_fast.data.batch import Layout, attention_mask, collate
from allo_fast.data.corpus import Corpus
from allo_fast.model.logps import ResponseLogps
from allo_fast.training.steps import plan_steps, shuffled


def two_problems() -> Corpus:
    corpus = Corpus()
    a, b = corpus.add([5, 6, 7], [[8, 9, 2], [10, 2]])
    (c,) = corpus.add([11], [[12, 2]])
    corpus.examples = [(a, b), (c,)]
    return corpus


def test_a_row_is_a_problem():
    corpus = two_problems()
    batch = collate(corpus, [(0, 1)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2]]
    # The last prompt token predicts the first token of both responses.
    assert batch.sources.tolist() == [2, 3, 4, 2, 5]
    assert batch.targets.tolist() == [8, 9, 2, 10, 2]
    assert batch.valid.tolist() == [[True] * 3, [True, True, False]]
    assert batch.layout(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 3], [4, 5, 0]]
    assert (batch.tokens, batch.examples.tolist(), batch.prompt_lengths.tolist()) == (6, [[0, 1]], [3, 3])


def test_without_sharing_every_response_has_its_prompt():
    batch = collate(two_problems(), [(0, 1)], Layout(share_prompts=False))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, -1]]
    assert batch.layout(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 3], [4, 5, 0]]


def test_a_response_of_several_examples_is_computed_once():
    corpus = two_problems()
    batch = collate(corpus, [(0, 1), (1, 0)])
    assert batch.responses.tolist() == [0, 1] and batch.examples.tolist() == [[0, 1], [1, 0]]


def test_token_weights_follow_their_responses():
    corpus = two_problems()
    batch = collate(corpus, [(2,), (1,)], token_weights=[[0, 0, 0], [0.5, 1.0], [0.25, 0.0]])
    assert batch.token_weights.tolist() == [[0.25, 0.0], [0.5, 1.0]]


def test_the_mask_is_its_definition():
    batch = collate(two_problems(), [(0,), (1,), (2,)])
    allowed, additive = attention_mask(batch), attention_mask(batch, torch.float32)
    for row, segments in enumerate(batch.segment_ids.tolist()):
        for i, mine in enumerate(segments):
            for j, other in enumerate(segments):
                expected = j <= i and (other == 0 or other == mine)
                assert allowed[row, 0, i, j] == expected
                assert additive[row, 0, i, j] == (0 if expected else torch.finfo(torch.float32).min)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_depends_on_who_shares_a_batch(attention):
    corpus = pair_corpus()
    logps = ResponseLogps(tiny_llama(attn_implementation=attention))
    together = collate(corpus, corpus.examples)
    found = dict(zip(together.responses.tolist(), logps(together).sum(1), strict=True))
    for index, total in found.items():
        alone = logps(collate(corpus, [(index,)])).sum()
        torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_the_models_own():
    corpus, model = pair_corpus(), tiny_llama()
    logps = ResponseLogps(model)(collate(corpus, corpus.examples[:1]))
    for line, index in enumerate(corpus.examples[0]):
        prompt, tokens = corpus.prompts[0], corpus.responses[index].tokens
        logits = model(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0]
        expected = torch.stack([logits[len(prompt) - 1 + i, token] for i, token in enumerate(tokens)])
        torch.testing.assert_close(logps[line, : len(tokens)], expected, rtol=1e-5, atol=1e-5)


def test_examples_of_one_problem_are_neighbours():
    corpus = pair_corpus(problems=7)
    order = shuffled(corpus, seed=0)
    assert sorted(map(tuple, order.tolist())) == sorted(corpus.examples)
    prompts = [corpus.responses[example[0]].prompt for example in order.tolist()]
    assert prompts == sorted(prompts, key=prompts.index)
    assert np.array_equal(shuffled(corpus, seed=0), order) and not np.array_equal(shuffled(corpus, seed=1), order)


def test_every_epoch_visits_every_problem_in_another_order():
    epochs = plan_steps(np.array([4, 4, 9, 2, 2, 2]), size=4, epochs=3, seed=0)
    assert epochs[0] == [[0, 1, 2, 3], [4, 5]]
    for epoch in epochs:
        flat = sum(epoch, [])
        assert [len(step) for step in epoch] == [4, 2] and sorted(flat) == list(range(6))
        assert flat.index(1) == flat.index(0) + 1 and flat.index(5) == flat.index(4) + 1 == flat.index(3) + 2
    assert len({str(sum(epoch, [])) for epoch in epochs}) == 3


def test_no_epoch_of_a_seed_is_another_epoch_of_another():
    orders = [str(sum(epoch, [])) for seed in range(4) for epoch in plan_steps(np.arange(20), 4, 5, seed)[1:]]
    assert len(set(orders)) == len(orders)
