"""`allo-fast convert`: what others wrote, as a model folder or a delta, and a delta as PEFT's adapter."""

import argparse

from transformers import AutoConfig

from allo_fast.config import ModelConfig
from allo_fast.errors import UserError, no_such
from allo_fast.method.adapters import ADAPTER, Adapter, delta_of, save_adapter
from allo_fast.method.delta import Delta
from allo_fast.model.checkpoint import check_model
from allo_fast.model.generation import stop_tokens
from allo_fast.model.loading import convert_gguf, folder_of, load_model
from allo_fast.model.saving import check_new


def convert(options: argparse.Namespace) -> None:
    """options: source, out, base (a model's folder or hub id, or None), to (a kind of adapter, or None)."""
    source, out, base = options.source, options.out, options.base
    adapter, delta = (source / ADAPTER).is_file(), source.suffix == ".safetensors"
    if source.name.startswith("adapter_model") and (source.parent / ADAPTER).is_file():
        raise UserError(f"{source}: of an adapter; name its folder, {source.parent}")
    if not source.exists():
        raise UserError(no_such(source, "file or folder"))
    if source.is_dir() and not adapter:
        raise UserError(f"{source}: no adapter (it has no {ADAPTER}); of a run, name a stage's delta.safetensors")
    if base is None and (adapter or delta):
        raise UserError(f"{source}: add --base MODEL, which it was trained on")
    if options.to and not delta:
        raise UserError(f"--to: what a delta becomes; {source} is {'an adapter' if adapter else 'none'}")
    cpu = ModelConfig(device="cpu")
    if adapter:
        if out.exists() or out.suffix != ".safetensors":
            raise UserError(f"{out}: name a file that does not exist, as delta.safetensors")
        found = Adapter.load(source)
        check_model(base)
        dtype = str(AutoConfig.from_pretrained(folder_of(base)).dtype or "float32").removeprefix("torch.")
        delta_of(found, load_model(base, cpu, dtype=dtype)).save(out)
        print(f"made for {base} in {dtype}; the adapter says that it was trained on {found.base or 'none'}")
    elif delta:
        check_new(out)
        trained = Delta.load(source)
        model = load_model(base, cpu, dtype=trained.dtype)
        stops = stop_tokens(model)
        changed, missed, apart = save_adapter(trained, model, base, options.to or "supertuning", out)
        print(f"{changed} weights are changed; PEFT makes {missed} of them another number, by at most {apart:.1e}")
        if trained.stops and {*trained.stops} != stops:
            print(f"the trained model stops at the tokens {[*trained.stops]}, which an adapter does not say")
    elif base is not None:
        raise UserError("--base: of an adapter or a delta")
    else:
        convert_gguf(source, out)
    print(out)
