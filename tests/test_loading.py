"""What is loaded is whole, dense, finite and of the right kind, and what is saved reads back as it was."""

import json
import pickle
import re
import weakref
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import transformers
from conftest import TINY, tiny_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allo_fast.__main__ import main
from allo_fast.config import Config, ModelConfig, UserError
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.model import saving
from allo_fast.model.loading import load_model, load_tokenizer, model_files
from allo_fast.model.saving import save_model
from allo_fast.model.weights import fingerprint
from allo_fast.stages.check import check

FLOAT32 = ModelConfig(dtype="float32", device="cpu")
WEIGHTS = "model.safetensors"
NORM = "model.layers.1.input_layernorm.weight"
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
CONVERTED = {
    "qwen3-moe": ("Qwen3MoeConfig", MOE | {"num_hidden_layers": 12}),  # layers and experts sort otherwise as texts
    "mixtral": ("MixtralConfig", {"num_local_experts": 12}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    "phi": ("PhiConfig", {}),
    "falcon": ("FalconConfig", {"tie_word_embeddings": True}),
    "mamba": ("MambaConfig", {"state_size": 4}),
    "gemma-3": ("Gemma3TextConfig", {}),
}


def folder_of(path, model=None, tokenizer=True):
    """A folder that holds `model`, by default a Llama."""
    (model or tiny_llama()).save_pretrained(path)
    if tokenizer:
        character_tokenizer().save_pretrained(path)
    return path


def rewrite(path, change) -> None:
    """Passes the tensors of a folder through `change`."""
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS, {"format": "pt"})


def configure(path, **changes) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def refused(path, *words) -> str:
    """What is said of a folder that is not loaded; every word is in it, and its path."""
    with pytest.raises(UserError) as error:
        load_model(path, FLOAT32)
    said = str(error.value)
    assert str(path) in said and "\n" not in said
    assert not [word for word in words if word not in said], said
    return said


def test_missing_weights_are_named_and_counted(tmp_path):
    rewrite(folder_of(tmp_path), lambda tensors: {name: tensors[name] for name in tensors if ".mlp." not in name})
    assert "missing: model.layers.0.mlp.down_proj.weight, " in refused(tmp_path, "LlamaForCausalLM", "and 3 more")


def test_weights_that_the_model_has_no_place_for(tmp_path):
    configure(folder_of(tmp_path), num_hidden_layers=1)
    refused(tmp_path, "unknown to it: model.layers.1.", "and 6 more")


@pytest.mark.parametrize("vocabulary", [60, 70])
def test_a_vocabulary_that_config_does_not_know_of(tmp_path, vocabulary):
    configure(folder_of(tmp_path), vocab_size=vocabulary)
    refused(tmp_path, f"of another shape: lm_head.weight (61, 32) for ({vocabulary}, 32)")


def test_a_file_without_any_weight(tmp_path):
    rewrite(folder_of(tmp_path), lambda tensors: {"unrelated": torch.zeros(1)})
    refused(tmp_path, "missing", "unknown to it: unrelated")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers(tmp_path, value, dtype):
    rewrite(folder_of(tmp_path), lambda t: t | {NORM: torch.where(torch.arange(32) == 3, value, t[NORM])})
    with pytest.raises(UserError, match=f"{NORM} holds NaN or infinity"):
        load_model(tmp_path, ModelConfig(dtype=dtype, device="cpu"))


def test_a_number_too_large_for_the_dtype(tmp_path):
    rewrite(folder_of(tmp_path), lambda t: t | {NORM: t[NORM].double() * 1e300})
    refused(tmp_path, f"{NORM} holds NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_loaded_whatever_config_says(tmp_path, dtype):
    rewrite(folder_of(tmp_path), lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    configure(tmp_path, dtype="float16")
    model = load_model(tmp_path, FLOAT32)
    for name, weight in tiny_llama().named_parameters():
        assert torch.equal(model.get_parameter(name), weight.to(dtype).float())


KINDS = {
    "T5ForConditionalGeneration": ("T5Config", {"num_layers": 1}, "an encoder-decoder"),
    "BartForConditionalGeneration": ("BartConfig", {"encoder_layers": 1, "decoder_layers": 1}, "an encoder-decoder"),
    "WhisperForConditionalGeneration": ("WhisperConfig", {"d_model": 32, "vocab_size": 52000}, "an encoder-decoder"),
    "MarianMTModel": ("MarianConfig", {}, "an encoder-decoder"),
    "BertForMaskedLM": ("BertConfig", {}, "a masked language model"),
    "BertLMHeadModel": ("BertConfig", {}, "a masked language model"),
    "RobertaForMaskedLM": ("RobertaConfig", {}, "a masked language model"),
    "ModernBertForMaskedLM": ("ModernBertConfig", {}, "a masked language model"),
    "XLMWithLMHeadModel": ("XLMConfig", {}, "a masked language model"),
    "LlamaForSequenceClassification": ("LlamaConfig", {"tie_word_embeddings": True}, "not a causal language model"),
    "Qwen2ForTokenClassification": ("Qwen2Config", {}, "not a causal language model"),
    "CLIPModel": ("CLIPConfig", {}, "not a causal language model"),
}


@pytest.mark.parametrize("name", KINDS)
def test_models_of_another_kind_are_refused_by_name_before_weights_are_looked_for(tmp_path, name):
    config, settings, kind = KINDS[name]
    config = getattr(transformers, config)(**settings, architectures=[name])
    config.save_pretrained(tmp_path)
    refused(tmp_path, f"{name}: {kind}")
    saved = json.loads((tmp_path / "config.json").read_text())
    shortened = {key: saved[key] for key in ("model_type", "architectures")}  # as older versions wrote: no defaults
    (tmp_path / "config.json").write_text(json.dumps(shortened))
    refused(tmp_path, f"{name}: {kind}")


@pytest.mark.parametrize("name", ["BartForCausalLM", "BertLMHeadModel"])
def test_their_decoders_alone_are_causal_language_models(tmp_path, name):
    sizes = {"vocab_size": 61, "d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 1, "decoder_attention_heads": 2}
    if name == "BertLMHeadModel":
        sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    cls = getattr(transformers, name)
    cls(cls.config_class(**sizes, is_decoder=True, is_encoder_decoder=False)).save_pretrained(tmp_path)
    assert type(load_model(tmp_path, FLOAT32)) is cls


def test_a_base_model_without_its_prefix_is_whole_where_its_head_is_tied(tmp_path):
    for name, tied in (("tied", True), ("not", False)):
        tiny_llama(tie_word_embeddings=tied).model.save_pretrained(tmp_path / name)
    expected = tiny_llama(tie_word_embeddings=True)
    assert fingerprint(load_model(tmp_path / "tied", FLOAT32)) == fingerprint(expected)
    refused(tmp_path / "not", "missing: lm_head.weight")


def test_a_head_beside_the_embeddings_it_is_tied_to(tmp_path):
    for name, scale in (("equal", 1.0), ("other", 2.0)):
        folder_of(tmp_path / name, tiny_llama(tie_word_embeddings=True))
        rewrite(tmp_path / name, lambda t, scale=scale: t | {"lm_head.weight": t["model.embed_tokens.weight"] * scale})
    model = load_model(tmp_path / "equal", FLOAT32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    refused(tmp_path / "other", "lm_head.weight and model.embed_tokens.weight differ", "tie_word_embeddings")


def test_buffers_of_older_versions_do_no_harm(tmp_path):
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.save_pretrained(tmp_path)  # as the published gpt2: names without prefix, and masks
    buffers = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    rewrite(tmp_path, lambda tensors: tensors | buffers)
    assert fingerprint(load_model(tmp_path, FLOAT32)) == fingerprint(model)
    old = ("layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
    rewrite(folder_of(tmp_path / "llama"), lambda t: t | {f"model.{name}": torch.ones(4) for name in old})
    assert fingerprint(load_model(tmp_path / "llama", FLOAT32)) == fingerprint(tiny_llama())


@pytest.mark.parametrize("config", ["GPTJConfig", "GPTNeoConfig", "CodeGenConfig"])
def test_masks_of_older_versions_do_no_harm(tmp_path, config):
    sizes = {"GPTNeoConfig": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}}
    sizes = sizes.get(config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4})
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(vocab_size=61, **sizes))
    attention = "attn.attention" if config == "GPTNeoConfig" else "attn"
    masks = {"bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8), "masked_bias": torch.tensor(-1e9)}
    masks["causal_mask"] = masks["bias"]
    old = {f"transformer.h.1.{attention}.{name}": mask.clone() for name, mask in masks.items()}
    rewrite(folder_of(tmp_path, model), lambda tensors: tensors | old)
    assert fingerprint(load_model(tmp_path, FLOAT32)) == fingerprint(model)


def test_adapters_are_to_be_merged_first(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    refused(tmp_path, "an adapter", "merge it into its base")
    folder_of(tmp_path)  # beside a whole model: which of both would be meant?
    refused(tmp_path, "an adapter")


@pytest.mark.parametrize("known", [True, False], ids=["of-a-known-type", "of-an-unknown-type"])
def test_code_of_its_own_is_not_run(tmp_path, known):
    folder_of(tmp_path)
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('this code ran')")
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    kind = {} if known else {"model_type": "mine"}
    configure(tmp_path, auto_map=code, architectures=["MineForCausalLM"], **kind)
    refused(tmp_path, "MineForCausalLM: needs code of its own")


def test_a_model_that_transformers_knows_today_does_without_its_old_code(tmp_path):
    configure(folder_of(tmp_path), auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert fingerprint(load_model(tmp_path, FLOAT32)) == fingerprint(tiny_llama())


def quantize_fp8(path, size=16) -> None:
    """Block-wise float8 codes with a scale for each block, as published FP8 checkpoints have them."""
    tensors = load_file(path / WEIGHTS)
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors[name]
        blocks = weight.unfold(0, size, size).unfold(1, size, size)
        scale = blocks.abs().amax((2, 3)) / 448
        codes = (blocks / scale[..., None, None]).to(torch.float8_e4m3fn)
        tensors[name] = codes.permute(0, 2, 1, 3).reshape(weight.shape).contiguous()
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def test_a_quantized_model_is_refused_by_name(tmp_path):
    quantize_fp8(folder_of(tmp_path))
    refused(tmp_path, ".mlp.down_proj.weight is quantized (torch.float8_e4m3fn), and config.json does not say how")
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    configure(tmp_path, quantization_config=fp8)
    refused(tmp_path, "quantized (fp8)", "dequantized")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_codes_without_their_scales_are_not_taken_for_values(tmp_path, dtype):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder_of(tmp_path), lambda tensors: tensors | {name: (tensors[name] * 100).to(dtype)})
    refused(tmp_path, f"{name} is quantized ({dtype})")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "made-up-tomorrow"},
        {"group_size": 64, "bits": 4},
        {},
        "fp8",
    ],
    ids=str,
)
def test_whatever_it_was_quantized_with(tmp_path, settings):
    configure(folder_of(tmp_path), quantization_config=settings)
    named = isinstance(settings, dict) and settings.get("quant_method")
    refused(tmp_path, f"quantized ({named or 'quantization_config in config.json'})")
    assert main(["eval", str(tmp_path), "configs/quickstart.yaml"]) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', "\x00\xff", '{"model_type": "llama", "vocab_size": "x"}']
)
def test_a_config_that_cannot_be_read(tmp_path, content):
    folder_of(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    refused(tmp_path, "")


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_act": "none"}, {"model_type": 3}, {"architectures": 3}]
)
def test_a_config_that_no_model_can_have(tmp_path, changes):
    configure(folder_of(tmp_path), **changes)
    refused(tmp_path, "")


def test_files_that_are_not_there(tmp_path):
    folder_of(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "elsewhere")
    refused(tmp_path, "no weights", WEIGHTS)
    refused_file = tmp_path / "model.gguf"
    refused_file.write_bytes(b"GGUF")
    refused(refused_file, "a file", "allo-fast convert")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json")


def sharded(path):
    tiny_llama().save_pretrained(path, max_shard_size="10KB")
    return sorted(path.glob("model-*.safetensors"))


def test_a_shard_that_is_not_there(tmp_path):
    shards = sharded(tmp_path)
    assert fingerprint(load_model(tmp_path, FLOAT32)) == fingerprint(tiny_llama())
    shards[1].unlink()
    refused(tmp_path, shards[1].name)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_cannot_be_read(tmp_path, content):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b[:4],
        lambda b: b"",
        lambda b: b"version https://git-lfs\n",
    ],
    ids=["a-byte-short", "half", "no-header", "empty", "a-pointer-of-git-lfs"],
)
def test_a_damaged_safetensors_file(tmp_path, damage):
    file = folder_of(tmp_path) / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refused(tmp_path, WEIGHTS, "cannot be read")


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('this code ran')",)


@pytest.mark.parametrize("data", [None, pickle.dumps(Code())], ids=["honest", "a-program"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth"])
def test_pickles_are_never_opened(tmp_path, name, data):
    model = tiny_llama()
    (folder_of(tmp_path, model) / WEIGHTS).unlink()
    torch.save(model.state_dict(), tmp_path / name)
    if data:
        (tmp_path / name).write_bytes(data)
    refused(tmp_path, f"{name}: not safetensors", "pickles, which may run code, are not opened", "save_pretrained(NEW)")
    model.save_pretrained(tmp_path)
    assert fingerprint(load_model(tmp_path, FLOAT32)) == fingerprint(model), "beside safetensors it does no harm"


def test_a_file_that_changes_is_not_the_model_any_more(tmp_path):
    model = load_model(folder_of(tmp_path), FLOAT32)
    before, size = fingerprint(model), (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.write(b"\1" * size)
    assert fingerprint(model) == before


def test_what_a_model_is_made_of(tmp_path, monkeypatch):
    folder_of(tmp_path / "model")
    (tmp_path / "model/additional_chat_templates").mkdir()
    for name in ("tekken.json", "additional_chat_templates/tool_use.jinja", "README.md", "trainer_state.json"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    names = {"additional_chat_templates/tool_use.jinja", "config.json", "generation_config.json", "tekken.json"}
    names |= {"tokenizer.json", "tokenizer_config.json"}
    assert model_files("model").keys() == names | {WEIGHTS}
    (tmp_path / "model/adapter_config.json").write_text("{}")
    assert WEIGHTS in model_files("model"), "it will be refused, for what it is"
    (tmp_path / "model/adapter_config.json").unlink()
    (tmp_path / "model/inside.safetensors").write_bytes((tmp_path / "model" / WEIGHTS).read_bytes())
    index(Path("model"), str(tmp_path / "model/inside.safetensors"))
    files = model_files("model")
    assert files.keys() == names | {"inside.safetensors", "model.safetensors.index.json"}
    assert files["inside.safetensors"] == Path("model/inside.safetensors")
    assert model_files("./none") == {}


def index(path, file) -> None:
    """Of one file that holds all weights of the folder."""
    names = dict.fromkeys(load_file(path / WEIGHTS), file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (path / WEIGHTS).unlink()


def test_an_index_leads_to_safetensors_in_its_folder_alone(tmp_path):
    path = folder_of(tmp_path / "model")
    (tmp_path / "elsewhere.safetensors").write_bytes((path / WEIGHTS).read_bytes())
    torch.save(tiny_llama().state_dict(), path / "weights.bin")
    for file, said in {
        "weights.bin": "weights.bin: not safetensors",
        "../elsewhere.safetensors": "elsewhere.safetensors, which is not in the folder",
        str(tmp_path / "elsewhere.safetensors"): "elsewhere.safetensors, which is not in the folder",
    }.items():
        index(folder_of(path), file)
        refused(path, said)
    index(folder_of(path), "inside.safetensors")
    (tmp_path / "elsewhere.safetensors").rename(path / "inside.safetensors")
    assert fingerprint(load_model(path, FLOAT32)) == fingerprint(tiny_llama())


@pytest.mark.parametrize("content", ["[]", "null", "5", "{", "[" * 100_000, "\xff"])
def test_a_generation_config_that_cannot_be_read(tmp_path, content):
    (folder_of(tmp_path) / "generation_config.json").write_bytes(content.encode("latin-1"))
    refused(tmp_path, "generation_config.json that cannot be read: ")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path, dtype):
    rewrite(folder_of(tmp_path), lambda tensors: tensors | {NORM: torch.ones(32, dtype=dtype)})
    refused(tmp_path, f"{NORM} is quantized ({dtype}), and config.json does not say how")


def header(change):
    """What changes the header of a safetensors file, and leaves its data."""

    def changed(data):
        end = 8 + int.from_bytes(data[:8], "little")
        text = json.dumps(change(json.loads(data[8:end]))).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return changed


def entry(**values):
    return header(lambda entries: entries | {NORM: entries[NORM] | values})


@pytest.mark.parametrize(
    "change",
    [
        entry(data_offsets=[0, 128]),  # another's
        entry(data_offsets=[0, 1 << 60]),
        entry(data_offsets=[128, 0]),
        entry(dtype="I64"),
        entry(dtype="X8"),
        entry(shape=[-32]),
        entry(shape=[1 << 62, 1 << 62]),
        header(lambda entries: [entries]),
        header(lambda entries: entries | {"__metadata__": {"format": 5}}),
        header(lambda entries: entries | {NORM: "x" * 10_000}),
        lambda data: (1 << 62).to_bytes(8, "little") + data[8:],
        lambda data: data + b"more",
    ],
    ids=range(12),
)
def test_a_header_that_lies(tmp_path, change):
    file = folder_of(tmp_path) / WEIGHTS
    file.write_bytes(change(file.read_bytes()))
    assert len(refused(tmp_path, f"{WEIGHTS}: weights that cannot be read: ")) < 500


def test_every_model_of_a_run_is_looked_at_before_it_starts(tmp_path):
    folder_of(tmp_path / "base")
    quantize_fp8(folder_of(tmp_path / "bad"))
    base, bad = ({"name_or_path": str(tmp_path / name)} for name in ("base", "bad"))
    reference = {"reference": bad["name_or_path"]}
    for key, settings in {
        "model.name_or_path": {"model": bad},
        "rewards.model": {"model": base, "rewards": {"model": bad["name_or_path"]}},
        "warmup.reference": {"model": base, "warmup": reference, "rivals": ["dpo"]},
        "locate.after": {"model": base, "locate": {"after": bad["name_or_path"]}},
        "learn.reference": {"model": base, "learn": reference},
    }.items():
        problems = check(Config(name="x", data={"train": "a", "test": "b"}, **settings)).problems
        assert [problem for problem in problems if re.search(f"^{key}: .*bad: model.layers.0.* is quantized", problem)]


def read_whole(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def save(model, folder, **how):
    save_model(model, character_tokenizer(), folder, **how)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_what_is_read(tmp_path, tied, dtype):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    save(model, tmp_path / "new" / "model")
    assert fingerprint(read_whole(tmp_path / "new" / "model")) == fingerprint(model)
    assert load_tokenizer(tmp_path / "new" / "model")("1").input_ids
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("name", CONVERTED)
def test_names_and_layouts_that_files_have_otherwise(tmp_path, name):
    config, settings = CONVERTED[name]
    torch.manual_seed(0)
    sizes = {key: size for key, size in TINY.items() if not (name == "falcon" and key == "head_dim")}
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes | settings))
    save(model, tmp_path / "first")
    loaded = load_model(tmp_path / "first", FLOAT32)
    assert fingerprint(loaded) == fingerprint(model)
    save(loaded, tmp_path / "again")
    assert fingerprint(read_whole(tmp_path / "again")) == fingerprint(model)


def test_the_weights_that_are_given_are_saved_not_the_models(tmp_path):
    model, other = tiny_llama(tie_word_embeddings=True), tiny_llama(seed=1, tie_word_embeddings=True)
    save_model(model, character_tokenizer(), tmp_path / "model", other.named_parameters())
    assert fingerprint(read_whole(tmp_path / "model")) == fingerprint(other)


def in_shards(monkeypatch):
    """From now on models are written in files of 10 kB."""
    write = partialmethod(transformers.PreTrainedModel.save_pretrained, max_shard_size=10_000)
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", write)


def test_saving_in_several_files_in_place_of_one(tmp_path, monkeypatch):
    save(tiny_llama(seed=1), tmp_path / "model")
    in_shards(monkeypatch)
    with pytest.raises(UserError, match="model: cannot be written: Directory not empty"):
        save(tiny_llama(), tmp_path / "model")
    save(tiny_llama(), tmp_path / "model", replace=True)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert fingerprint(read_whole(tmp_path / "model")) == fingerprint(tiny_llama())


OTHER = f"{NORM} reads back with other values"
DAMAGES = {
    "a-bit": (lambda t: t | {NORM: (t[NORM].view(torch.int32) ^ 1).view(torch.float32)}, OTHER),
    "a-sign-of-zero": (lambda t: t | {NORM: torch.where(t[NORM] == 0, -0.0, t[NORM])}, OTHER),
    "dtype": (lambda t: t | {NORM: t[NORM].bfloat16()}, OTHER),
    "codes": (lambda t: t | {NORM: t[NORM].to(torch.float8_e4m3fn)}, OTHER),
    "a-tensor-lost": (lambda t: {name: tensor for name, tensor in t.items() if name != NORM}, f"missing: {NORM}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_written_otherwise_than_it_was_is_not_kept(tmp_path, monkeypatch, damage):
    change, message = DAMAGES[damage]
    model = tiny_llama()
    model.get_parameter(NORM).data[5] = 0
    save(tiny_llama(seed=1), tmp_path / "model")
    write = transformers.PreTrainedModel.save_pretrained

    def damaged(self, folder, **named):
        write(self, folder, **named)
        rewrite(folder, change)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(UserError, match=message):
        save(model, tmp_path / "model", replace=True)
    monkeypatch.undo()
    assert fingerprint(read_whole(tmp_path / "model")) == fingerprint(tiny_llama(seed=1)), "the older one stays"
    save(model, tmp_path / "model", replace=True)
    assert fingerprint(read_whole(tmp_path / "model")) == fingerprint(model)


def test_a_full_disk_is_an_error_and_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(UserError, match="model: cannot be written: no space left on the disk"):
        save(tiny_llama(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_reading_back_takes_one_tensor_at_a_time(tmp_path, monkeypatch):
    tensors, most = weakref.WeakSet(), 0

    def watched(file, name, read=saving.read):
        nonlocal most
        tensors.add(tensor := read(file, name))
        most = max(most, len(tensors))
        return tensor

    monkeypatch.setattr(saving, "read", watched)
    save(tiny_llama(), tmp_path / "model")
    assert 1 <= most <= 2, "the one that was compared last, until the next is read"


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 1e-6},
        {"temperature": 0.9, "top_p": 0.6},
        {"do_sample": False, "temperature": 0.9, "top_k": 3, "num_beams": 1, "length_penalty": 2.0},
    ],
)
def test_a_generation_config_that_cannot_be_saved_loses_nothing(tmp_path, settings, modified):
    folder_of(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 5}))
    model = load_model(tmp_path / "base", FLOAT32)
    if modified:
        model.generation_config.eos_token_id = [5, 7]
    save(model, tmp_path / "model")
    assert fingerprint(read_whole(tmp_path / "model")) == fingerprint(tiny_llama())
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == ([5, 7] if modified else 5)


def test_merge_and_convert_write_no_folder_that_holds_something(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "delta"), str(tmp_path)]) == 2
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("exists already") == 2 and (tmp_path / "mine.txt").exists()
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "new")]) == 2
    assert "model.gguf: not a GGUF file that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["model/new", "model/a/new", "linked/new", "nothing", "x" * 300])
def test_where_no_model_is_written(tmp_path, capsys, out):
    folder_of(tmp_path / "model")
    (tmp_path / "config.json").write_text("{}")  # an editor's
    (tmp_path / "linked").symlink_to(tmp_path / "model")
    (tmp_path / "nothing").symlink_to(tmp_path / "none")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    capsys.readouterr()
    for words in (["merge", tmp_path / "model", tmp_path / "delta"], ["convert", tmp_path / "model.gguf"]):
        assert main([*map(str, words), str(tmp_path / out)]) == 2
    said = capsys.readouterr().err.splitlines()
    expected = {"nothing": "nothing: exists already", "x" * 300: "File name too long"}
    assert len(said) == 2 and all(
        expected.get(out, f"new: inside the model {tmp_path}/model; ") in line for line in said
    ), said


def gguf(token: str, merge: str) -> bytes:
    """A file without any weight, of one token."""

    def text(value):
        return len(value).to_bytes(8, "little") + value.encode()

    def word(value):
        return value.to_bytes(4, "little")

    texts = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    lists = {"tokenizer.ggml.tokens": token, "tokenizer.ggml.merges": merge}
    numbers = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
    entries = [text(name) + word(8) + text(value) for name, value in texts.items()]
    entries += [text(name) + word(9) + word(8) + (1).to_bytes(8, "little") + text(v) for name, v in lists.items()]
    entries += [text(f"llama.{name}") + word(4) + word(8) for name in numbers]
    return b"GGUF" + word(3) + bytes(8) + len(entries).to_bytes(8, "little") + b"".join(entries)


def test_a_tokenizer_without_files(tmp_path):
    path = folder_of(tmp_path / "model")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer that can be loaded: its files are missing or say too little$"):
        load_tokenizer(path)


def test_a_tokenizer_with_code_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = folder_of(tmp_path / "model")
    (path / "tokenization_mine.py").write_text("raise SystemExit('this code ran')")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no tokenizer that can be loaded: it needs code of its own, which is not run"):
        load_tokenizer(path)
    (path / "model.gguf").write_bytes(gguf("token", "other"))
    assert main(["convert", str(path / "model.gguf"), str(tmp_path / "new")]) == 2
    assert "model.gguf: not a GGUF file that can be read: The repository" in capsys.readouterr().err


def test_tokens_that_no_tokenizer_can_have(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(gguf("token", "oth er"))  # a merge of what are no tokens
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "new")]) == 2
    assert "model.gguf: not a GGUF file that can be read: " in capsys.readouterr().err
