import copy
import logging
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import transformers
from conftest import TINY, pair_corpus, random_selection, tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from allo_fast.config import ModelConfig, UserError
from allo_fast.data.batch import Layout, collate
from allo_fast.method.delta import Delta
from allo_fast.method.loaded import load_delta
from allo_fast.method.optim import SparseAdamW
from allo_fast.method.policy import SparsePolicy
from allo_fast.method.selection import Selection
from allo_fast.model.loading import load_model
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.weights import fingerprint, named_weights

GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
# One of each kind: untied and tied heads, biases, norms of queries and keys, (1 + weight) norms, soft caps with sliding
# windows, Conv1D with learned positions, a biased head, scaled logits, experts, and a recurrent model.
ARCHITECTURES = {
    "llama": ("LlamaConfig", TINY, True),
    "llama-tied": ("LlamaConfig", TINY | {"tie_word_embeddings": True}, True),
    "qwen2": ("Qwen2Config", TINY, True),
    "qwen3": ("Qwen3Config", TINY, True),
    "gemma": ("GemmaConfig", TINY, True),
    "gemma2": ("Gemma2Config", TINY | {"final_logit_softcapping": 2.0, "attn_implementation": "eager"}, False),
    "gpt2": ("GPT2Config", GPT2, True),
    "phi": ("PhiConfig", TINY, True),
    "granite": ("GraniteConfig", TINY | {"logits_scaling": 8.0}, True),
    "mixtral": ("MixtralConfig", TINY | {"num_local_experts": 4}, True),
    "mamba": ("MambaConfig", MAMBA | {"attn_implementation": "eager"}, False),
}


def build(name):
    config, settings, shares = ARCHITECTURES[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings)).eval(), shares


def batch_for(policy, examples=4):
    corpus = pair_corpus()
    return collate(corpus, corpus.examples[:examples], policy.logps.layout)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_the_dense_ones_gathered(name):
    model, shares = build(name)
    dense, policy = copy.deepcopy(model), SparsePolicy(model, random_selection(model, 0.1))
    assert policy.logps.layout.share_prompts == shares
    batch = batch_for(policy)
    upstream = torch.randn(batch.valid.shape)
    (policy.response_logps(batch) * upstream).sum().backward()
    (ResponseLogps(dense)(batch) * upstream).sum().backward()
    for tensor, weight in named_weights(dense).items():
        if tensor in policy.values:
            wanted = weight.grad.view(-1)[policy.positions[tensor].unpack()]
            torch.testing.assert_close(policy.values[tensor].grad, wanted, rtol=1e-4, atol=1e-5)
    assert all(weight.grad is None and not weight.requires_grad for weight in named_weights(model).values())


@pytest.mark.parametrize("write", ["step", "write_back", "reference"])
def test_backward_notices_that_the_weights_changed(write):
    """Each layer's input gradient reads its weight: after an update it would be that of another forward."""
    policy = SparsePolicy(tiny_llama(), random_selection(tiny_llama(), 0.1))
    optimizer, batch = SparseAdamW(policy, lr=1e-2), batch_for(policy)
    loss = policy.response_logps(batch).sum()
    if write == "step":
        optimizer.step()
    elif write == "write_back":
        policy.write_back()
    with policy.reference() if write == "reference" else nullcontext():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_nothing_of_the_reference_has_a_gradient():
    policy = SparsePolicy(tiny_llama(), random_selection(tiny_llama(), 0.1))
    with policy.reference(), torch.enable_grad():
        assert not policy.response_logps(batch_for(policy)).requires_grad


def test_the_reference_may_run_between_forward_and_backward():
    gradients = []
    for between in (False, True):
        policy = SparsePolicy(tiny_llama(), random_selection(tiny_llama(), 0.1))
        train(policy, steps=1)
        batch = batch_for(policy)
        loss = policy.response_logps(batch).sum()
        if between:
            with policy.reference():
                policy.response_logps(batch)
        loss.backward()
        gradients.append(torch.cat([value.grad for value in policy.values.values()]))
    assert torch.equal(*gradients) and gradients[0].any()


def train(policy, steps=3):
    optimizer, batch = SparseAdamW(policy, lr=1e-2), batch_for(policy)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.response_logps(batch).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_training_touches_the_selected_entries_only_and_the_base_survives(dtype, tied):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    before = copy.deepcopy(named_weights(model))
    policy = SparsePolicy(model, random_selection(model))
    train(policy)
    for name, weight in named_weights(model).items():
        untouched = torch.ones(weight.numel(), dtype=torch.bool)
        if name in policy.positions:
            untouched[policy.positions[name].unpack()] = False
            touched = weight.view(-1)[~untouched]
            assert torch.equal(touched, policy.values[name].to(dtype))
            assert not torch.equal(touched, before[name].view(-1)[~untouched])
        assert torch.equal(weight.view(-1)[untouched], before[name].view(-1)[untouched])
    with policy.reference():
        assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_policy_equals_reference_at_step_0_bit_for_bit():
    policy = SparsePolicy(model := tiny_llama().bfloat16(), random_selection(model))
    batch = batch_for(policy)
    with policy.reference():
        reference = policy.response_logps(batch)
    assert torch.equal(policy.response_logps(batch), reference)
    train(policy)
    after = policy.response_logps(batch).detach()
    assert not torch.equal(after, reference)
    with policy.reference():
        again = policy.response_logps(batch)
    assert torch.equal(again, reference) and not again.requires_grad
    assert torch.equal(policy.response_logps(batch), after)


def test_the_reference_ends_with_an_error_inside():
    policy = SparsePolicy(model := tiny_llama(), random_selection(model))
    train(policy)
    before = policy.response_logps(batch_for(policy))
    with pytest.raises(RuntimeError), policy.reference():
        raise RuntimeError
    assert torch.equal(policy.response_logps(batch_for(policy)), before)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        tiny_llama().save_pretrained(tmp_path)
        model = load_model(tmp_path, ModelConfig(dtype="float32", gradient_checkpointing=checkpointing))
        assert any(module.training for module in model.modules()) == checkpointing
        policy = SparsePolicy(model, random_selection(model))
        policy.response_logps(batch_for(policy).to(model.device)).sum().backward()
        gradients.append(torch.cat([value.grad for value in policy.values.values()]))
    assert torch.equal(*gradients) and gradients[0].any()


def test_a_second_policy_replaces_the_first():
    model = tiny_llama()
    first, second = (SparsePolicy(model, random_selection(model, seed=seed)) for seed in (1, 2))
    second.response_logps(batch_for(second)).sum().backward()
    assert all(value.grad is None for value in first.values.values())
    assert all(value.grad is not None for value in second.values.values())


def test_states_are_3_1_bytes_per_parameter_at_5_percent():
    model = tiny_llama(hidden_size=64, intermediate_size=192).bfloat16()
    policy = SparsePolicy(model, random_selection(model, 0.05))
    optimizer = SparseAdamW(policy)
    policy.response_logps(batch_for(policy)).sum().backward()
    held = policy.state_bytes()
    moments = sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    n, k = policy.parameters, sum(map(len, policy.positions.values()))
    blocks = sum(-(-weight.numel() // 65536) for weight in policy.weights.values())
    positions = 2 * k + 8 * (blocks + 1)
    assert held == {"base": 2 * n, "positions": positions, "originals": 2 * k, "values": 4 * k, "gradients": 4 * k}
    assert moments == 8 * k
    assert (sum(held.values()) + moments) / n <= 3.1


def test_dense_gradients_are_kept_for_clip_all():
    model = tiny_llama(tie_word_embeddings=True)
    dense = copy.deepcopy(model)
    selection = random_selection(model, 0.001)
    assert len(selection.names) < len(named_weights(model)), "some tensors have nothing selected"
    policy = SparsePolicy(model, selection, keep_dense_gradients=True)
    batch = batch_for(policy)
    for _ in range(2):  # accumulated over micro-batches
        policy.response_logps(batch).sum().backward()
        ResponseLogps(dense)(batch).sum().backward()
    for name, weight in named_weights(dense).items():
        torch.testing.assert_close(policy.dense_gradients[name], weight.grad, rtol=1e-4, atol=1e-5)


def test_dense_gradients_of_a_bfloat16_base_add_up_in_float32():
    model = tiny_llama().bfloat16()
    policy = SparsePolicy(model, random_selection(model, 0.1), keep_dense_gradients=True)
    assert {gradient.dtype for gradient in policy.dense_gradients.values()} == {torch.float32}


def test_a_mask_for_another_model_is_refused():
    with pytest.raises(UserError, match="made for the model"):
        SparsePolicy(tiny_llama(seed=1), random_selection(tiny_llama(seed=0)))


def test_why_prompts_are_repeated_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        model = build("gemma2")[0]
        ResponseLogps(model)
    assert (
        "Gemma2ForCausalLM: one response per row, prompts repeated: it has layers that do not attend to" in caplog.text
    )


def test_a_model_whose_attention_leaks_falls_back(monkeypatch):
    model = tiny_llama()
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda attention_mask, position_ids=None, **given: forward(**given))
    assert not ResponseLogps(model).layout.share_prompts


def backward_flops(layers: int, chosen: str) -> int:
    """Of one backward pass where some entries of one weight train."""
    model = tiny_llama(num_hidden_layers=layers, tie_word_embeddings=False)
    scores = {name: torch.full(weight.shape, float(name == chosen)) for name, weight in named_weights(model).items()}
    few = 50 / sum(weight.numel() for weight in model.parameters())
    policy = SparsePolicy(model, Selection.from_scores(scores, few, base=fingerprint(model)))
    batch = batch_for(policy)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        policy.response_logps(batch)
    with FlopCounterMode(display=False) as both:
        policy.response_logps(batch).sum().backward()
    assert policy.values[chosen].grad.any()
    return both.get_total_flops() - forward.get_total_flops()


def test_nothing_is_computed_below_the_lowest_selected_layer():
    assert backward_flops(2, "model.layers.1.mlp.down_proj.weight") == backward_flops(
        5, "model.layers.4.mlp.down_proj.weight"
    )
    assert backward_flops(5, "model.layers.0.mlp.down_proj.weight") > backward_flops(
        5, "model.layers.4.mlp.down_proj.weight"
    )


def test_nothing_is_computed_for_weights_of_which_nothing_is_selected(monkeypatch):
    """Of four more layers above it, only what comes back through them."""
    monkeypatch.setattr("allo_fast.method.sampled.pays", lambda *_: False)
    one, five = (backward_flops(layers, "model.layers.0.mlp.down_proj.weight") for layers in (1, 5))
    model = tiny_llama()
    weights = sum(w.numel() for name, w in named_weights(model).items() if "layers.0." in name and w.ndim == 2)
    batch = collate(pair_corpus(), pair_corpus().examples[:4], Layout(packed=True))
    linear = 2 * batch.tokens * weights  # a product for each layer's inputs, none for its weights
    assert five - one < 1.5 * 4 * linear < 2 * 4 * linear


def test_the_reference_is_not_updated():
    policy = SparsePolicy(tiny_llama(), random_selection(tiny_llama(), 0.1))
    optimizer, state = SparseAdamW(policy), SparseAdamW(policy).state_dict()
    with policy.reference():
        for work in (optimizer.step, policy.write_back, lambda: optimizer.load_state_dict(state)):
            with pytest.raises(UserError, match="inside reference"):
                work()
        with pytest.raises(UserError, match="inside reference"), policy.reference():
            pass
    optimizer.step()


def test_a_policy_that_another_one_replaced_is_refused():
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model, 0.1))
    optimizer = SparseAdamW(policy)
    SparsePolicy(model, random_selection(model, 0.1, seed=1))
    for work in (optimizer.step, policy.write_back, lambda: policy.reference().__enter__()):
        with pytest.raises(UserError, match="its model has another policy since"):
            work()


def test_another_policy_of_the_same_model_adds_no_hooks():
    counts = []
    model = tiny_llama()
    for seed in range(2):
        SparsePolicy(model, random_selection(model, 0.1, seed=seed))
        counts.append(sum(len(module._forward_pre_hooks) for module in model.modules()))
    assert counts[0] == counts[1] > 0


def test_its_fingerprint_is_that_of_its_weights(monkeypatch):
    model = tiny_llama()
    policy = SparsePolicy(model, random_selection(model, 0.1))
    with monkeypatch.context() as patch:
        patch.setattr("allo_fast.method.policy.fingerprint", None)
        assert policy.fingerprint() == fingerprint(model), "of weights that nothing changed it is known"
    with torch.no_grad():
        next(iter(policy.values.values())).add_(1)
    policy.write_back()
    assert policy.fingerprint() == fingerprint(model) != policy.base


def test_a_released_model_is_as_any_other():
    model = tiny_llama()
    frozen = model.model.norm.weight.requires_grad_(False)
    plain = copy.deepcopy(model)
    before = {name: type(module) for name, module in model.named_modules()}
    policy = SparsePolicy(model, random_selection(model, 0.3))
    train(policy)
    trained = {name: weight.clone() for name, weight in named_weights(model).items()}
    assert policy.release() is model
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(weight, trained[name]) for name, weight in named_weights(model).items())
    assert {name: (p.requires_grad, p.is_leaf) for name, p in model.named_parameters()} == {
        name: (p is not plain.model.norm.weight, True) for name, p in plain.named_parameters()
    }
    assert not frozen.requires_grad and not any(module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == plain.config.to_dict() and model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.arange(3, 20)[None]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(input_ids=ids).logits, model(input_ids=ids).logits)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None and frozen.grad is None
    logps = partial(policy.response_logps, None)
    for use in (
        logps,
        policy.write_back,
        policy.release,
        policy.reference().__enter__,
        SparseAdamW(policy, lr=1e-3).step,
    ):
        with pytest.raises(UserError, match="it was released, or its model has another policy since"):
            use()


def test_a_released_model_takes_another_policy_and_a_delta(tmp_path):
    model = tiny_llama()
    first = SparsePolicy(model, random_selection(model, 0.3))
    train(first)
    first.save_delta(tmp_path / "delta.safetensors")
    logps = first.response_logps(batch_for(first)).detach()
    second = SparsePolicy(first.release(), random_selection(model, 0.2))
    assert torch.equal(second.response_logps(batch_for(second)).detach(), logps)
    third = SparsePolicy(model, random_selection(model, 0.1))  # over one that was not released
    assert all(weight.requires_grad for weight in third.release().parameters()), "as before the first of them"
    base = tiny_llama()
    load_delta(base, tmp_path / "delta.safetensors")
    assert all(torch.equal(w, named_weights(model)[name]) for name, w in named_weights(base).items())


@pytest.mark.parametrize("again", [False, True], ids=["from its base", "from a delta"])
def test_a_model_that_is_refused_is_as_before(again, tmp_path):
    model = tiny_llama(attention_dropout=0.5)
    plain, start = copy.deepcopy(model.train()), None
    if again:
        policy = SparsePolicy(copy.deepcopy(model).eval(), random_selection(model, 0.2))
        train(policy)
        policy.save_delta(tmp_path / "delta")
        start = Delta.load(tmp_path / "delta")
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match="the same tokens give other results each time"):
        SparsePolicy(model, random_selection(model, 0.3), start)
    assert fingerprint(model) == fingerprint(plain)
    assert {name: type(module) for name, module in copy.deepcopy(model).named_modules()} == kinds
    assert (
        all(weight.requires_grad for weight in model.parameters()) and model.config.to_dict() == plain.config.to_dict()
    )
    assert not any(module._forward_pre_hooks for module in model.modules())
    SparsePolicy(model.eval(), random_selection(model, 0.3))


def test_a_model_that_a_delta_does_not_fit_is_as_before(tmp_path):
    other = tiny_llama(seed=4)
    SparsePolicy(other, random_selection(other)).save_delta(tmp_path / "delta")
    model = tiny_llama()
    with pytest.raises(UserError, match="made for the model"):
        SparsePolicy(model, random_selection(model), Delta.load(tmp_path / "delta"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_of_which_nothing_trained_is_released_so():
    model = tiny_llama().requires_grad_(False)
    SparsePolicy(model, random_selection(model))
    second = SparsePolicy(model, random_selection(model, 0.2))
    assert not any(weight.requires_grad for weight in second.release().parameters())
    assert not any(value.requires_grad for value in second._trained_before)


def test_values_that_are_not_in_the_model_are_not_released():
    policy = SparsePolicy(model := tiny_llama(), random_selection(model))
    torch.optim.SGD(policy.values.values(), lr=0.0).step()
    with pytest.raises(UserError, match="were changed or replaced, but not in the model"):
        policy.release()
    policy.write_back()
    policy.release()
