"""A model run in segments scores as one run whole, or is run whole: never something else."""

import types

import pytest
import torch
from conftest import DYNAMIC, TINY, tiny_llama
from sweeps import few, same, scores_of
from test_probe import GPT, MAMBA, MPT, build
from torch import nn

from allo_fast.config import UserError
from allo_fast.data.corpus import Corpus
from allo_fast.locating import captured, segments

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LAYERS = {**TINY, "num_hidden_layers": 3}
PER_LAYER = {"vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 8}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# Layers whose states come alone or in a tuple; a window, a cap, experts, a state, biases, tied and other heads.
SEPARABLE = {
    "GPT2": {**GPT, "n_layer": 3},
    "Mistral": {**LAYERS, "sliding_window": 4},
    "Qwen3": LAYERS,
    "Gemma2": LAYERS,
    "Gemma3Text": {**LAYERS, "sliding_window": 4},
    "Mixtral": {**LAYERS, "num_local_experts": 4},
    "GptOss": {**LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Phi3": LAYERS,
    "FalconH1": {**LAYERS, **FALCON_H1, "mamba_chunk_size": 8},
    "OPT": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "Bloom": {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "Mpt": {**MPT, "n_layers": 3},
    "GPTNeoX": {**SMALL, "intermediate_size": 48},
}


@pytest.mark.parametrize("config", SEPARABLE)
def test_segments_give_the_scores_of_the_whole_bit_for_bit(tmp_path, config):
    whole, parts = (few(build(config, **SEPARABLE[config]), tmp_path / str(n), windows=n) for n in (1, 5))
    assert same(scores_of(parts), scores_of(whole)) and parts.captured


def test_operations_that_round_otherwise_without_a_gradient(tmp_path):
    """torch.matmul folds an operand that has one."""
    whole, parts = (few(build("Mamba", **MAMBA), tmp_path / str(n), windows=n) for n in (1, 5))
    expected = scores_of(whole)
    for name, score in scores_of(parts).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-3, atol=1e-8)
    assert parts.captured


def assert_run_whole(build_model, tmp_path, caplog, **given):
    whole, parts = (few(build_model(), tmp_path / str(n), windows=n, **given) for n in (1, 5))
    expected = scores_of(whole)
    assert "every pass runs the whole model" not in caplog.text
    assert same(scores_of(parts), expected) and not parts.captured
    assert "every pass runs the whole model" in caplog.text


# A second embedding that enters every layer; also keys and values that layers share; layers of another kind.
@pytest.mark.parametrize(
    "config, settings",
    [
        ("Gemma4Text", {**LAYERS, **PER_LAYER, "sliding_window": 4}),
        ("Gemma3nText", {**LAYERS, **PER_LAYER, "num_kv_shared_layers": 1, "laurel_rank": 4, "altup_num_inputs": 2}),
        ("OpenAIGPT", GPT),
    ],
)
def test_architectures_whose_layers_are_not_separable(tmp_path, caplog, config, settings):
    assert_run_whole(lambda: build(config, **settings), tmp_path, caplog)


def passes_on(model, kept):
    """The second layer adds what the first was given."""
    first, *_, last = model.model.layers
    plain = first.forward, last.forward

    def keep(hidden, **names):
        model.memory = kept(hidden)
        return plain[0](hidden, **names)

    first.forward = keep
    last.forward = lambda hidden, **names: plain[1](hidden + model.memory, **names)


def adds_embedding(model):
    """The last layer adds the embedding, as it left its module."""
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: setattr(model, "memory", output))
    last = model.model.layers[-1]
    plain = last.forward
    last.forward = lambda hidden, **names: plain(hidden + model.memory, **names)


def runs_twice(model):
    first, second, _ = model.model.layers
    model.model.layers = nn.ModuleList([first, second, first])


CHANGES = {
    "passes on": lambda model: passes_on(model, lambda hidden: hidden),
    "passes on without a graph": lambda model: passes_on(model, lambda hidden: hidden.detach()),
    "passes on little": lambda model: passes_on(model, lambda hidden: 0.003 * hidden.detach()),
    "adds the embedding": adds_embedding,
    "runs twice": runs_twice,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_layers_that_know_more_than_their_input(tmp_path, caplog, change):
    def build_model():
        model = tiny_llama(num_hidden_layers=3)
        change(model)
        return model

    assert_run_whole(build_model, tmp_path, caplog)


def test_a_trial_that_is_not_a_number_is_a_fault(monkeypatch):
    monkeypatch.setattr(segments, "_goes_round", lambda *given: False)
    monkeypatch.setattr(segments, "_worst_difference", lambda *given: float("nan"))
    logps, ids = types.SimpleNamespace(findings=types.SimpleNamespace(together=None)), torch.zeros(1)
    found = types.SimpleNamespace(logps=logps)
    assert "differ by nan" in segments._fault(found, None, types.SimpleNamespace(input_ids=ids), None)


def corpus_of(*lengths: int, tokens=((3, 61),)) -> Corpus:
    """A pair a prompt length; its tokens are drawn from a range, in turn."""
    draw, corpus = torch.Generator().manual_seed(0), Corpus()
    for number, length in enumerate(lengths):
        low, high = tokens[number % len(tokens)]
        prompt, *pair = (torch.randint(low, high, (n,), generator=draw).tolist() for n in (length, 3, 4))
        corpus.examples.append(tuple(corpus.add(prompt, pair)))
    return corpus


def test_rows_that_run_one_at_a_time_once_they_are_long(tmp_path, caplog):
    """The trial's batch is short."""
    settings = LAYERS | {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}
    corpus = corpus_of(*(3, 20, 20, 3))
    assert_run_whole(lambda: build("Llama", **settings), tmp_path, caplog, corpus=corpus)


class Routed(nn.Module):
    """Tokens from 30 on go to another expert than those below."""

    def __init__(self, model, expert):
        super().__init__()
        self.experts = nn.ModuleList([expert, type(expert)(model.config)])
        model.model.embed_tokens.register_forward_pre_hook(self.route)

    def route(self, module, inputs):
        self.goes_to = inputs[0] // 30

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            if (here := self.goes_to == number).any():
                out[here] = expert(hidden[here])
        return out


def test_an_expert_that_no_token_of_the_trial_went_to(tmp_path):
    def build_model():
        model = tiny_llama(num_hidden_layers=3)
        model.model.layers[1].mlp = Routed(model, model.model.layers[1].mlp)
        return model

    corpus = corpus_of(4, 4, 4, 4, tokens=((3, 30), (30, 60)))
    whole, parts = (few(build_model(), tmp_path / str(n), windows=n, corpus=corpus) for n in (1, 7))
    expected = scores_of(whole)
    assert same(scores_of(parts), expected) and parts.captured
    assert all(expected[f"model.layers.1.mlp.experts.{number}.up_proj.weight"].any() for number in range(2))


@pytest.mark.parametrize("error", [UserError("why"), torch.OutOfMemoryError("why")])
def test_what_is_no_fault_of_the_layers_is_not_taken_for_one(tmp_path, monkeypatch, error):
    def raises(*given):
        raise error

    monkeypatch.setattr(segments, "_fault", raises)
    with pytest.raises(type(error), match="why"):
        scores_of(few(tiny_llama(), tmp_path, windows=5))


def test_a_disk_without_room(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(captured.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1000))
    monkeypatch.setattr("allo_fast.durable.check_room", lambda *_: None)  # for scores there is some
    whole, parts = (few(tiny_llama(), tmp_path / str(n), windows=n) for n in (1, 5))
    assert same(scores_of(parts), scores_of(whole)) and not parts.captured
    assert "states of its layers take 0.0 GB" in caplog.text
