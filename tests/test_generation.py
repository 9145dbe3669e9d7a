"""Responses do not depend on what is computed beside them, nor on how."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from tiny import byte_level
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.generation.logits_process import TopPLogitsWarper

from allo_fast.config import UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model import generation
from allo_fast.model.decoding import BLOCK, Decoder, why_padded
from allo_fast.model.drawing import Response, Sampler, drawn, draws_of
from allo_fast.model.generation import generate

TOKENIZER = character_tokenizer()
PROMPTS = [[5, 6], [7] * 9, [8, 9, 10, 11], [12, 5], [6] * 9]
SIZES = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512}


def sampled(model, prompts=PROMPTS, **settings):
    settings = {"max_new_tokens": 20, "num_return_sequences": 3, "temperature": 1.0, "top_p": 0.9} | settings
    return generate(model, TOKENIZER, prompts, {1}, **settings)


def model_of(dtype=torch.float64):
    """A model whose responses end by themselves, some early."""
    model = tiny_llama(vocab_size=len(TOKENIZER), num_hidden_layers=2).to(dtype)
    model.lm_head.weight.data[1] *= 3
    return model


def test_a_growing_rotary_embedding_remembers_no_longer_row():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model = tiny_llama(vocab_size=len(TOKENIZER), rope_parameters=scaling, max_position_embeddings=32)
    for weight in model.parameters():
        weight.data *= 6 if weight.dim() == 2 else 1  # so that positions count
    row, longer = (torch.randint(3, 28, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 60))
    first = sampled(model, [row])
    assert first != sampled(model, [longer]) and sampled(model, [row]) == first


@pytest.mark.parametrize("rows", [1, 2, 7, 15, None])
def test_texts_do_not_depend_on_how_many_are_computed_at_once(rows):
    assert why_padded(model_of()) is None
    texts = sampled(model_of())
    lengths = [len(text) for same in texts for text in same]
    assert len(set(lengths)) > 4 and min(lengths) < 5 < 20 <= max(lengths), "some end early, some are cut"
    assert sampled(model_of(), rows=rows) == texts


def test_texts_depend_on_run_seed_problem_and_sample_alone():
    texts = sampled(model_of(), seed=3, first=100)
    assert sampled(model_of(), PROMPTS[2:], seed=3, first=102) == texts[2:]
    assert [same[:1] for same in texts] == sampled(model_of(), seed=3, first=100, num_return_sequences=1)
    others = [sampled(model_of(), seed=4, first=100), sampled(model_of(), seed=3, first=101)]
    assert texts not in others and others[0] != others[1]
    assert len(set(texts[0])) == 3, "a sample draws for itself"
    numbers = {tuple(draws_of(*key, 5)) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(numbers) == 4


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0, "num_return_sequences": 1}])
def test_padded_batches_give_the_same_texts(monkeypatch, settings):
    texts = sampled(model_of(), **settings)
    monkeypatch.setattr(generation, "why_padded", lambda model: "it is tried")
    assert sampled(model_of(), rows=4, **settings) == texts


def test_greedy_in_slots_is_transformers_own():
    model = model_of()
    config = GenerationConfig(max_new_tokens=20, eos_token_id=1, pad_token_id=0)
    texts = sampled(model, temperature=0.0, num_return_sequences=1, rows=2)
    for prompt, (text,) in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        assert text == TOKENIZER.decode(made[made != 1])


def test_each_prompt_is_computed_once_and_who_ends_makes_room():
    model, widths = model_of(), []
    model.register_forward_pre_hook(
        lambda module, args, given: widths.append(given["input_ids"].shape), with_kwargs=True
    )
    rooms = [1, 9, 2, 2, 30, 3, 1, 4]
    prompts = [[5, 6], [5, 6], [7, 8], [7, 8], [9] * 4, [9] * 4, [9] * 4, [5]]
    responses = [Response(prompt, room) for prompt, room in zip(prompts, rooms, strict=True)]
    Decoder(model, Sampler("tiny", 0.0, 1.0, set()), 3).run(responses)
    assert [len(response.tokens) for response in responses] == rooms
    assert sorted(shape[1] for shape in widths if shape[1] > 1) == [2, 2, 4], "three prompts of more than one token"
    steps = [len_ for len_, width in widths if width == 1]
    assert max(steps) == 3 and len(steps) < 40 and sum(steps) <= sum(rooms), "no row runs beyond its end"


def test_slots_grow():
    """Beyond the positions that they have at first, also where a neighbour is far ahead."""
    model = tiny_llama(vocab_size=len(TOKENIZER), num_hidden_layers=1, max_position_embeddings=512).double()
    alone, beside = ([Response([5] * 100, 40)], [Response([5] * 100, 40), Response([6] * 120, 30), Response([7], 2)])
    for responses in (alone, beside):
        decoder = Decoder(model, Sampler("tiny", 0.0, 1.0, set()), 2)
        decoder.run(responses)
        assert decoder.layers[0].keys.shape[2] == 2 * BLOCK
    row = torch.tensor([alone[0].prompt + alone[0].tokens])
    assert model(row).logits[0, 99:-1].argmax(-1).tolist() == alone[0].tokens == beside[0].tokens


def test_drawing_is_transformers_own_distribution():
    logits = 3 * torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    for top_p in (0.5, 0.9, 0.999, 1.0):
        kept = TopPLogitsWarper(top_p)(None, logits / 0.7) if top_p < 1 else logits / 0.7
        count = 5000
        uniforms = torch.from_numpy((np.arange(count) + 0.5) / count)
        tokens = drawn(logits.expand(count, -1), uniforms, 0.7, top_p)
        shares = torch.bincount(tokens, minlength=300) / count
        torch.testing.assert_close(shares, kept.softmax(-1)[0], atol=1.1 / count, rtol=0)


def test_a_flat_distribution_is_drawn_from_as_a_whole():
    """More tokens than are looked at first hold top_p."""
    tokens = drawn(torch.zeros(5, 4000), torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 1e-12]), 1.0, 1.0)
    assert tokens.tolist() == [0, 1000, 2000, 3000, 3999]
    steep, flat = torch.zeros(1, 4000), torch.zeros(1, 4000)
    steep[0, 77] = 50
    tokens = drawn(torch.cat([steep, flat]), torch.tensor([0.999, 0.5]), 1.0, 0.9)
    assert tokens[0] == 77 and len(set(drawn(flat.expand(999, -1), torch.rand(999), 1.0, 0.9).tolist())) > 700


def test_draws_among_equals_do_not_depend_on_other_rows():
    """The edge of top_p lies among tokens of one probability; a flat row asks for more candidates."""
    edge, flat = torch.full((1, 2000), -100.0), torch.zeros(1, 2000)
    edge[0, 1000:1100], edge[0, 1500] = 0, math.log(900)
    uniforms = torch.linspace(0, 0.9999, 999)
    alone = drawn(edge.expand(999, -1), uniforms, 1.0, 0.95)
    beside = drawn(torch.cat([edge.expand(999, -1), flat]), torch.cat([uniforms, uniforms[:1]]), 1.0, 0.95)[:-1]
    assert torch.equal(alone, beside)
    assert {*alone.tolist()} == {1500, *range(1000, 1050)}, "the lower ids"


def test_a_rounding_moves_a_draw_no_further_than_itself():
    """Two tokens of equal probability, whose order by probability rounding decides."""
    logits = torch.full((1, 100), -30.0)
    logits[0, 80] = logits[0, 20] = 1.0
    uniforms, nudged = torch.linspace(0, 0.999, 50), [logits.clone(), logits.clone()]
    nudged[0][0, 20] += 1e-6
    nudged[1][0, 80] += 1e-6
    first, second = (drawn(other.expand(50, -1), uniforms, 1.0, 0.95) for other in nudged)
    assert (first != second).sum() <= 1 and set(first.tolist()) == {20, 80}


@pytest.mark.parametrize(
    "config, why",
    [
        (Qwen3Config(**SIZES, head_dim=8), None),
        (GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=256), None),
        (MistralConfig(**SIZES, sliding_window=4), "it caches other things than the keys and values of all tokens"),
        (
            MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=4),
            "it cannot compute",
        ),
        (  # whose window is longer than any prompt of a trial
            GPTNeoConfig(
                vocab_size=len(TOKENIZER),
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                window_size=64,
            ),
            "it has layers that do not attend to everything",
        ),
    ],
    ids=["qwen3", "gpt2", "sliding", "recurrent", "local"],
)
def test_models_that_cannot_are_padded_and_say_so_once(config, why, caplog):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = [sampled(model, max_new_tokens=12, rows=rows) for rows in (None, 5)]
    said = [record.message for record in caplog.records if "padded" in record.message]
    assert len(said) == (why is not None) and (why or "") in "".join(said)
    if why is None:
        assert texts[0] == texts[1]


def test_in_the_trial_a_row_enters_beside_another(monkeypatch):
    beside, enter = [], Decoder._enter
    monkeypatch.setattr(Decoder, "_enter", lambda self: beside.append(len(self.live)) or enter(self))
    assert why_padded(model_of()) is None and beside == [0, 1, 1]


def test_rows_that_reach_each_other_are_found():
    model = tiny_llama(vocab_size=len(TOKENIZER))
    assert why_padded(model) is None
    forward = model.model.forward

    def deaf(*args, position_ids=None, **given):
        return forward(*args, **given)

    model.model.forward = deaf
    assert why_padded(model) == "its rows depend on each other"


@pytest.mark.parametrize(
    "config, how",
    [
        (
            RecurrentGemmaConfig(
                **SIZES, lru_width=32, attention_window_size=8, block_types=["recurrent", "attention"]
            ),
            "responses to prompts of one length in a batch: padding changes its results",
        ),
        (
            RwkvConfig(
                vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, rescale_every=0, context_length=64
            ),
            "one response after the other: other rows change its results",
        ),
    ],
    ids=["recurrent_gemma", "rwkv"],
)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0, "num_return_sequences": 1}])
def test_models_whose_rows_change_each_other(config, how, settings, caplog):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    texts = sampled(model, rows=1, **settings)
    assert sampled(model, **settings) == texts == sampled(model, rows=4, **settings)
    assert [record.message.endswith(how) for record in caplog.records if how in record.message] == [True]


def test_models_that_take_padding_are_padded():
    config = MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=4)
    model, every = AutoModelForCausalLM.from_config(config).eval(), [Response(prompt, 1) for prompt in PROMPTS]
    assert [len(batch) for batch in generation._batches(model, every, 3, 0, False)] == [3, 2]


def test_ranks_that_share_a_model_compute_as_many_batches(monkeypatch):
    monkeypatch.setattr(generation, "_together", lambda *_: "one length")
    monkeypatch.setattr(generation.ranks, "gather", lambda count: [count, 5])
    every = [Response(prompt, 1, tokens=[3]) for prompt in PROMPTS]
    batches = generation._batches(None, every, 3, 0, True)
    assert [[len(row.prompt) for row in batch] for batch in batches] == [[2, 2], [4], [9, 9], [2], [2]]
    assert [row.tokens for batch in batches for row in batch] == [[3]] * 5 + [[]] * 2, "the others' rows are copies"
    assert len(generation._batches(None, every, 3, 0, False)) == 3


def test_rows_beyond_a_growing_rotary_embedding_have_no_longer_ones_beside_them(monkeypatch):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_llama(vocab_size=len(TOKENIZER), rope_parameters=scaling, max_position_embeddings=32).double()
    short, long = [[5, 6], [7] * 9], [[8] * 40, [9] * 40]
    texts = sampled(copy.deepcopy(model), short + long)
    assert [sampled(copy.deepcopy(model), [prompt], first=n)[0] for n, prompt in enumerate(short + long)] == texts
    used, decode = [], generation._decode_batch
    monkeypatch.setattr(generation, "_decode_batch", lambda m, rows, *more: used.append(rows) or decode(m, rows, *more))
    sampled(model, short + long)
    assert [[len(row.prompt) for row in batch] for batch in used] == [[40] * 6], "others have slots"


def test_a_response_is_cut_before_the_character_that_it_would_end_in():
    tokenizer = byte_level(eos="<eos>")
    tokens = tokenizer("a\u00e9").input_ids
    response = Response(tokenizer("b").input_ids, 9, tokens=tokens[:2])
    assert tokenizer.decode(tokens[:2]) == "a\ufffd" and generation._text(tokenizer, response, {0}) == "a"
    response.tokens = [*tokens[:2], 0]
    assert generation._text(tokenizer, response, {0}) == "a\ufffd", "which it ended with"


def test_a_model_that_cannot_generate_is_refused():
    """One that raises on padded rows runs without them."""
    config = RwkvConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, context_length=64)
    model = AutoModelForCausalLM.from_config(config).eval()
    forward = model.generate

    def raising(ids, attention_mask, **given):
        if len(ids) > most or not attention_mask.all():
            raise IndexError("no such rows")
        return forward(ids, attention_mask=attention_mask, **given)

    model.generate, most = raising, 1
    assert len(sampled(model)) == 5 and generation._tried[model] == "alone"
    del generation._tried[model]
    most = 0
    with pytest.raises(UserError, match="RwkvForCausalLM: it cannot generate: IndexError: no such rows"):
        sampled(model)


def test_memory_that_runs_out_says_nothing_of_how_rows_are_batched(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("full")

    model = tiny_llama()
    monkeypatch.setattr(Decoder, "run", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        why_padded(model)
    monkeypatch.setattr(generation, "_decode_batch", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        generation._together(model, 0, False)
