"""One model for each kind of fault that the probe must find, and for each that it must not."""

import inspect
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import DYNAMIC, TINY, pair_corpus, random_selection, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from allo_fast.config import ModelConfig, UserError
from allo_fast.data.batch import Layout, collate
from allo_fast.data.corpus import Corpus
from allo_fast.method.dense import DensePolicy
from allo_fast.method.policy import SparsePolicy
from allo_fast.model import loading
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps

BERT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
MPT = {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [8.0] * 4, "short_factor": [1.0] * 4}
LONGROPE |= {"original_max_position_embeddings": 12}


def build(config: str, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    """Random; queries, keys and head enlarged so that positions and scales matter as they do in a trained model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{config}Config")(**settings), dtype=dtype).eval()
    model.get_output_embeddings().weight.data *= 8
    for name, weight in model.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj", "qkv")):
            weight.data *= 4
    return model


def change_states(model: PreTrainedModel, monkeypatch, change) -> PreTrainedModel:
    """What the decoder gives becomes change(hidden [B, T, D])."""
    forward = model.base_model.forward

    def changed(**given):
        output = forward(**given)
        output.last_hidden_state = change(output.last_hidden_state)
        return output

    changed.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model.base_model, "forward", changed)
    return model


def uneven_corpus() -> Corpus:
    """Rows of 4 to 32 tokens, some below and some beyond the windows and limits of the models here."""
    draw = torch.Generator().manual_seed(3)
    corpus = Corpus()
    for prompt, *responses in ((2, 3, 2), (5, 7, 3), (20, 12, 9)):
        words = [torch.randint(3, 61, (count,), generator=draw).tolist() for count in (prompt, *responses)]
        corpus.examples.append(tuple(corpus.add(words[0], words[1:])))
    return corpus


def assert_as_transformers(model: PreTrainedModel, tolerance: float = 1e-4) -> None:
    """All responses in one batch, twice, against the model alone: one sequence at a time and all logits."""
    logps, corpus = ResponseLogps(model), uneven_corpus()
    batch = collate(corpus, corpus.examples, logps.layout)
    with torch.no_grad():
        first, second = logps(batch), logps(batch)
        assert torch.equal(first, second)
        for line, index in enumerate(batch.responses.tolist()):
            response = corpus.responses[index]
            prompt, tokens = corpus.prompts[response.prompt], response.tokens
            model(torch.tensor([[5]]))  # dynamic NTK forgets longer sequences
            logits = model(torch.tensor([prompt + tokens])).logits[0].float().log_softmax(-1)
            expected = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
            torch.testing.assert_close(first[line, : len(tokens)], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_looks_ahead_is_refused(attention):
    model = build("Bert", **BERT)  # an encoder, which AutoModelForCausalLM loads all the same
    model.set_attn_implementation(attention)
    with pytest.raises(UserError, match="BertLMHeadModel: it is not causal"):
        ResponseLogps(model)
    with pytest.raises(UserError, match="XLNetLMHeadModel: it is not causal"):
        ResponseLogps(build("XLNet", vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48))


@pytest.mark.parametrize("config, settings", [("Llama", {}), ("Mixtral", {"num_local_experts": 4})])
def test_looking_ahead_below_the_rounding_of_bfloat16_is_seen(monkeypatch, config, settings):
    model = build(config, torch.bfloat16, **TINY, **settings)
    assert ResponseLogps(model).layout.share_prompts
    change_states(model, monkeypatch, lambda hidden: hidden + 0.02 * hidden.mean(1, keepdim=True))
    with pytest.raises(UserError, match=f"{config}ForCausalLM: it is not causal"):
        ResponseLogps(model)


def test_looking_ahead_beyond_a_window_is_seen(monkeypatch):
    def leaks(hidden):
        return torch.cat([hidden[:, :10], hidden[:, 10:] + hidden[:, 10:].mean(1, keepdim=True)], 1)

    with pytest.raises(UserError, match="not causal"):
        ResponseLogps(change_states(build("Mistral", **TINY, sliding_window=8), monkeypatch, leaks))


@pytest.mark.parametrize(
    "config, settings", [("Mixtral", {"num_local_experts": 4}), ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2})]
)
def test_experts_that_round_otherwise_with_more_tokens_leak_nothing(config, settings):
    model = build(config, **TINY, **settings)
    assert ResponseLogps(model).layout.share_prompts
    assert_as_transformers(model)


def test_noise_that_is_left_on_is_refused():
    model = tiny_llama(attention_dropout=0.5)
    ResponseLogps(model)
    with pytest.raises(UserError, match="LlamaForCausalLM: the same tokens give other results each time"):
        ResponseLogps(model.train())


@pytest.mark.parametrize(
    "config, settings",
    [
        ("Mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.5, "attention_dropout": 0.5}),
        ("Phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5}),
        ("GPT2", GPT),  # dropout modules of 0.1
    ],
)
def test_recomputation_switches_no_noise_on(tmp_path, config, settings):
    """Layers are recomputed only while they train, and routers add noise, or draw experts, only then."""
    settings = settings if config == "GPT2" else TINY | settings
    build(config, **settings).save_pretrained(tmp_path)
    corpus, logps = pair_corpus(), []
    for recompute in (False, True):
        model = load_model(tmp_path, ModelConfig(dtype="float32", gradient_checkpointing=recompute))
        assert any(module.training for module in model.modules()) == recompute
        compute = ResponseLogps(model)
        logps.append(compute(collate(corpus, corpus.examples, compute.layout).to(model.device)).detach())
    assert torch.equal(*logps)


@pytest.mark.parametrize("change", [lambda hidden: hidden + hidden.shape[1], lambda hidden: hidden[:1] + 0 * hidden])
def test_what_padding_or_other_rows_change_runs_one_row_at_a_time(monkeypatch, caplog, change):
    model = change_states(tiny_llama(), monkeypatch, change)
    assert ResponseLogps(model).findings.together == 0
    assert "LlamaForCausalLM: rows run one at a time: padding or other rows change its results" in caplog.text
    assert_as_transformers(model)


@pytest.mark.parametrize(
    "config, settings",
    [
        ("Llama", {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}),
        ("Phi3", {"original_max_position_embeddings": 12, "rope_parameters": LONGROPE}),
    ],
)
def test_rotary_embeddings_of_the_longest_row_do_not_reach_the_others(config, settings):
    model = build(config, **TINY | settings)
    assert ResponseLogps(model).findings.together == 12
    assert_as_transformers(model)


def test_gradients_of_rows_one_at_a_time():
    gradients = []
    for alone in (False, True):
        model = tiny_llama()
        trained, corpus = SparsePolicy(model, random_selection(model)), pair_corpus()
        if alone:
            trained.logps.findings = replace(trained.logps.findings, together=0)
        batch = collate(corpus, corpus.examples, Layout(share_prompts=False))
        upstream = torch.randn(batch.valid.shape, generator=torch.Generator().manual_seed(0))
        (trained.response_logps(batch) * upstream).sum().backward()
        gradients.append(torch.cat([value.grad for value in trained.values.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def scale(model, monkeypatch, change):
    forward = model.forward

    def scaled(**given):
        output = forward(**given)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(model, "forward", scaled)
    return model


@pytest.mark.parametrize(
    "change, softcap, temperature",
    [
        (lambda logits: logits, None, 1.0),
        (lambda logits: logits * 0.25, None, 4.0),
        (lambda logits: 5 * torch.tanh(logits / 5), 5.0, 1.0),
        (lambda logits: 0.5 * 30 * torch.tanh(logits / 30), 30.0, 2.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_cap_are_what_the_model_computes(monkeypatch, change, softcap, temperature, dtype):
    model = scale(tiny_llama().to(dtype), monkeypatch, change)
    found = ResponseLogps(model).findings
    assert (found.softcap, found.temperature) == (pytest.approx(softcap), pytest.approx(temperature))


@pytest.mark.parametrize("scale", [None, "inv_sqrt_d_model", 0.5])
def test_a_scale_that_only_the_configuration_names(scale):
    assert_as_transformers(build("Mpt", **MPT, logit_scale=scale))


@pytest.mark.parametrize(
    "change", [torch.relu, lambda logits: logits + 1, lambda logits: -logits, lambda x: x[..., 1:]]
)
def test_a_head_that_is_not_linear_is_refused(monkeypatch, change):
    with pytest.raises(UserError, match="LlamaForCausalLM: its head is not linear"):
        ResponseLogps(scale(tiny_llama(), monkeypatch, change))


def test_a_head_of_several_layers_is_refused():
    with pytest.raises(UserError, match="BertLMHeadModel: its head is not linear"):
        ResponseLogps(build("Bert", **BERT, is_decoder=True))


def test_an_error_over_the_mask_of_responses_means_own_rows(caplog):
    model = build("Falcon", **FALCON, alibi=True)
    assert not ResponseLogps(model).layout.share_prompts
    assert "FalconForCausalLM: one response per row, prompts repeated: it takes no mask of responses" in caplog.text
    assert_as_transformers(model)
    assert_as_transformers(build("OpenAIGPT", **GPT))


def test_any_other_error_is_said_with_the_name_of_the_model(monkeypatch):
    def fails(**given):
        return given["not there"].attribute

    model = tiny_llama()
    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(UserError, match="LlamaForCausalLM: it cannot compute a row of tokens: KeyError: 'not there'"):
        ResponseLogps(model)
    monkeypatch.setattr(model.model, "forward", lambda **given: given.attribute)
    with pytest.raises(UserError, match="AttributeError: 'dict' object has no attribute 'attribute'"):
        ResponseLogps(model)
    monkeypatch.setattr(model.model, "forward", lambda **given: [][0:0] or next(iter([])))
    with pytest.raises(UserError, match="it cannot compute a row of tokens: StopIteration$"):
        ResponseLogps(model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_memory_that_runs_out_says_nothing_of_a_model(monkeypatch, error):
    """In whichever of its trials: on one rank alone it would mean another layout than on the others."""
    model, calls, last = tiny_llama(), [], 0
    forward, attention = model.model.forward, model.config._attn_implementation

    def counted(**given):
        calls.append(given)
        if len(calls) == last:
            raise error("full")
        return forward(**given)

    monkeypatch.setattr(model.model, "forward", counted)
    ResponseLogps(model).release()
    last = len(calls)
    while last:
        calls.clear()
        with pytest.raises(error, match="full"):
            ResponseLogps(model)
        last -= 1
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == attention


def test_positions_that_begin_elsewhere_mean_own_rows(caplog):
    model = build("GPT2", **GPT)
    embed = model.transformer.wpe
    given = []  # by whom the model is called
    model.transformer.register_forward_pre_hook(
        lambda module, inputs, names: given.append(names.get("position_ids") is not None), with_kwargs=True
    )
    embed.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 2 * given[-1],))
    assert not ResponseLogps(model).layout.share_prompts
    assert "its position_ids are not the positions of a row of its own" in caplog.text


def test_a_model_that_writes_its_weights_is_refused():
    with pytest.raises(UserError, match="RwkvForCausalLM: it changes its own weights while it computes"):
        ResponseLogps(build("Rwkv", **MAMBA, attention_hidden_size=32, context_length=64, rescale_every=1))


def test_a_model_that_is_its_own_base_model():
    assert_as_transformers(build("Llama4Text", **TINY, **LLAMA4))


@pytest.mark.parametrize("config", ["Mamba", "FalconMamba"])
def test_states_in_float32_meet_a_head_in_bfloat16(config):
    assert_as_transformers(build(config, torch.bfloat16, **MAMBA), tolerance=0.1)


def test_an_auxiliary_loss_that_is_not_trained_is_said_once(caplog):
    loading._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            DensePolicy(build("Mixtral", **TINY, num_local_experts=4))
        DensePolicy(tiny_llama())
    said = [record.message for record in caplog.records if "auxiliary" in record.message]
    assert said == ["MixtralForCausalLM: its router's auxiliary loss is not trained"]
