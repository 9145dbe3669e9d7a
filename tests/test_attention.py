"""Packed rows: whatever lies beside a problem, its log-probabilities and gradients are those that it has alone."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import pair_corpus, random_selection, tiny_llama
from torch.nn.attention.flex_attention import flex_attention
from transformers import BloomConfig, BloomForCausalLM, Qwen2Config, Qwen2ForCausalLM

from allo_fast.data.batch import Batch, Layout, Span, collate
from allo_fast.data.corpus import Corpus
from allo_fast.method.policy import SparsePolicy
from allo_fast.model import attention
from allo_fast.model.attention import BLOCK, Packing
from allo_fast.model.logps import ResponseLogps

PACKED = Layout(packed=True)


def uneven() -> Corpus:
    """One response and several, of one token and of many, prompts of one and of many."""
    corpus, draw = Corpus(), random.Random(0)
    for prompt, lengths in ((9, (1, 7, 1)), (1, (4,)), (30, (20, 2, 9, 5)), (2, (1,)), (5, (3, 3))):
        prompt, *responses = ([draw.randrange(3, 61) for _ in range(length)] for length in (prompt, *lengths))
        corpus.examples += [(number, number) for number in corpus.add(prompt, responses)]
    return corpus


def spans_of(seed: int) -> list[Span]:
    draw, spans = random.Random(seed), []
    for _ in range(draw.randint(1, 9)):
        responses = tuple(draw.choice((0, 1, 60, 200)) for _ in range(draw.randint(1, 4)))
        spans.append(Span(spans[-1].end if spans else 0, draw.choice((1, 40, 128, 300)), responses))
    return spans


def packing_of(spans: list[Span], multiple: int = 1) -> Packing:
    length = -(-spans[-1].end // multiple) * multiple
    segments = [number for s in spans for number, n in enumerate((s.prompt, *s.responses)) for _ in range(n)]
    ids = torch.tensor([segments + [-1] * (length - len(segments))])
    given = dict.fromkeys(Batch.__annotations__) | {"segment_ids": ids, "spans": tuple(spans), "packed": True}
    return Packing(Batch(**given))


def allowed(spans: list[Span], length: int) -> torch.Tensor:
    """The definition, one pair of tokens at a time; padding sees padding."""
    places = [
        (n, s) for n, span in enumerate(spans) for s, k in enumerate((span.prompt, *span.responses)) for _ in range(k)
    ]
    places += [(-1, 0)] * (length - len(places))
    problems, segments = torch.tensor(places).T
    shared = (segments == 0) | (segments[:, None] == segments)
    return ((problems[:, None] == problems) & shared).tril()


@pytest.mark.parametrize("call", [0, 1_500_000, 10**12], ids=["calls", "mixed", "masked"])
def test_packed_is_one_by_one(monkeypatch, call):
    monkeypatch.setattr(attention, "_CALL", call)
    outcomes = []
    for apart in (False, True):
        model, corpus = tiny_llama(), uneven()
        policy = SparsePolicy(model, random_selection(model, 0.3))
        assert policy.logps.layout == PACKED
        batches = [[example] for example in corpus.examples] if apart else [corpus.examples]
        found = {}
        for examples in batches:
            batch = collate(corpus, examples, Layout() if apart else PACKED)
            logps = policy.response_logps(batch)
            found |= {
                r: line[valid].detach()
                for r, line, valid in zip(batch.responses.tolist(), logps, batch.valid, strict=True)
            }
            (logps * (batch.responses[:, None] + 1)).sum().backward()
        gradient = torch.cat([value.grad for value in policy.values.values()])
        outcomes.append((torch.cat([found[r] for r in sorted(found)]), gradient))
    for packed, alone in zip(*outcomes, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(outcomes[0][0].isfinite(), torch.ones(len(outcomes[0][0]), dtype=torch.bool))


def test_packed_rows_have_no_padding():
    corpus = uneven()
    batch = collate(corpus, corpus.examples, PACKED)
    assert batch.input_ids.shape == (1, batch.tokens) and batch.tokens == sum(
        span.prompt + sum(span.responses) for span in batch.spans
    )
    padded = collate(corpus, corpus.examples, replace(PACKED, multiple=BLOCK))
    assert padded.input_ids.shape == (1, BLOCK) and padded.tokens == batch.tokens
    logps = ResponseLogps(tiny_llama())
    torch.testing.assert_close(logps(padded), logps(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("call", [0, 1_500_000, 10**12], ids=["calls", "mixed", "masked"])
def test_pieces_are_the_definition(monkeypatch, call):
    monkeypatch.setattr(attention, "_CALL", call)
    for seed in range(20):
        spans = spans_of(seed)
        length = spans[-1].end
        seen = torch.zeros(length, length, dtype=torch.bool)
        pieces, order = packing_of(spans).pieces(64)
        positions = torch.cat([attention._numbers(piece, torch.device("cpu")) for piece in pieces])
        assert (positions if order is None else positions[order]).tolist() == list(range(length))
        for piece in pieces:
            if isinstance(piece, attention.Stretch):
                keys = torch.cat([torch.arange(length)[each] for each in piece.keys])
                queries = torch.arange(length)[piece.queries]
                mask = (
                    torch.ones(len(queries), len(keys), dtype=torch.bool).tril() if piece.mask is None else piece.mask
                )
                seen[queries[:, None], keys] = mask
                continue
            filled = torch.ones(piece.positions.numel(), dtype=torch.bool).index_fill(0, piece.places, False)
            for row, mask, extra in zip(
                piece.positions, piece.mask[:, 0], filled.view(piece.positions.shape), strict=True
            ):
                assert mask.any(1).all() and not mask[~extra][:, extra].any(), "nothing sees what fills up"
                seen[row[~extra][:, None], row[~extra]] = mask[~extra][:, ~extra]
        assert torch.equal(seen, allowed(spans, length)), spans


def test_the_block_mask_is_the_definition():
    for seed in range(60):
        packing = packing_of(spans := spans_of(seed), BLOCK)
        length, mask = len(packing.segments), packing.block_mask
        expected = allowed(spans, length)
        places = torch.arange(length)
        assert torch.equal(mask.mask_mod(0, 0, places[:, None], places), expected), spans
        blocks = expected.view(length // BLOCK, BLOCK, -1, BLOCK).transpose(1, 2).flatten(2)
        full = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
        partial = listed(mask.kv_num_blocks, mask.kv_indices)
        assert torch.equal(full, blocks.all(-1)) and torch.equal(partial, blocks.any(-1) & ~full), spans


def listed(counts: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """bool [query blocks, key blocks] of a BlockMask's lists."""
    found = torch.zeros(numbers.shape[2:], dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts[0, 0].tolist(), numbers[0, 0].tolist(), strict=True)):
        found[row, columns[:count]] = True
    return found


def test_flex_attention_is_piece_by_piece():
    packing = packing_of(spans_of(3), BLOCK)
    draw = torch.Generator().manual_seed(0)
    shape = (1, 2, len(packing.segments), 16)
    query, key, value = (torch.randn(shape, generator=draw) for _ in range(3))
    module = torch.nn.Module()
    ours, _ = attention.packed_attention_forward(module, query, key, value, None, packing)
    flex = flex_attention(query, key, value, block_mask=packing.block_mask).transpose(1, 2)
    torch.testing.assert_close(ours, flex, rtol=1e-4, atol=1e-5)


def test_models_whose_layers_do_not_look_their_attention_up_run_as_before():
    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert not ResponseLogps(model).layout.packed
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **windows)).eval()
    logps = ResponseLogps(model)
    assert logps.layout == Layout(share_prompts=False) and len(logps.findings.notes) == 1


def test_a_model_that_loses_what_comes_with_a_packed_row_is_found_out(caplog):
    model = tiny_llama()
    plain = model.model.forward

    def forward(input_ids, attention_mask=None, position_ids=None, packing=None, **given):
        return plain(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **given)

    model.model.forward = forward
    corpus = pair_corpus()
    logps = ResponseLogps(model)
    assert logps.layout == Layout() and "LlamaForCausalLM: rows are padded: " in caplog.text
    expected = ResponseLogps(tiny_llama())
    batches = [collate(corpus, corpus.examples, each.layout) for each in (logps, expected)]
    torch.testing.assert_close(logps(batches[0]), expected(batches[1]), rtol=0, atol=1e-5)


def test_the_model_works_as_before_for_others():
    """Packed attention without packed rows is sdpa: for generation, for other trainers."""
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    before = tiny_llama()(input_ids=ids, attention_mask=mask).logits
    model = tiny_llama()
    ResponseLogps(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("head", [16, 32, 64])
def test_on_a_gpu_log_probabilities_and_gradients_are_those_of_a_cpu(head):
    """Of FlexAttention's kernels, over rows of several blocks, in which one problem ends and another begins."""
    corpus, draw = Corpus(), random.Random(0)
    for prompt, lengths in ((90, (60, 30, 100)), (1, (4,)), (200, (128, 1, 70)), (5, (3, 3)), (128, (128,))):
        prompt, *responses = ([draw.randrange(3, 61) for _ in range(length)] for length in (prompt, *lengths))
        corpus.examples += [(number, number) for number in corpus.add(prompt, responses)]
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_llama(head_dim=head, max_position_embeddings=512).to(device)
        logps = ResponseLogps(model)
        batch = collate(corpus, corpus.examples, logps.layout).to(torch.device(device))
        assert batch.packed
        values = logps(batch)
        weights = torch.linspace(-1, 1, values.numel(), device=device).view_as(values)
        found.append((values, torch.autograd.grad((values * weights).sum(), [*model.parameters()])))
    torch.testing.assert_close(found[1][0].cpu(), found[0][0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
