"""Model folders that are damaged or hostile, and the tools that read deltas, GGUF files and folders to be written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from tests.drills.damage import Damage, constant, flipped, truncated
from tests.drills.drill import drill, table
from tests.drills.jobs import write_model
from tests.drills.lab import Lab, Verdict, copy_to
from tests.drills.numbers import with_base
from tests.drills.run import CONFIG, FORGET, LEARN, LOCATE
from tests.tiny import byte_level

TOOLS = "Model folders and tools"
BASE = Path("base")


def files(lab: Lab, pattern: str, how: Damage | None) -> Verdict:
    """Files of the base damaged, or without `how` removed; then a run of it."""
    for path in (lab.folder / BASE).glob(pattern):
        path.unlink() if how is None else path.write_bytes(how(path.read_bytes()))
    return lab.refused("run", CONFIG)


for title, pattern, how in (
    ("tokenizer missing", "token*", None),
    ("config missing", "config.json", None),
    ("weights missing", "model.safetensors", None),
    ("weights truncated", "model.safetensors", truncated()),
    ("weights: header flipped", "model.safetensors", flipped(0.01)),
    ("weights empty", "model.safetensors", constant(b"")),
    ("config.json not JSON", "config.json", truncated()),
    ("tokenizer.json not JSON", "tokenizer.json", truncated()),
    ("config.json = []", "config.json", constant(b"[]")),
    ("config.json = null", "config.json", constant(b"null")),
    ("tokenizer.json = {}", "tokenizer.json", constant(b"{}")),
):
    table(TOOLS, "fresh", lambda lab, work: files(lab, *work), {title: (pattern, how)})


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def configured(lab: Lab, changes: dict) -> Verdict:
    edit_json(lab.folder / BASE / "config.json", lambda content: content.update(changes))
    return lab.refused("run", CONFIG)


table(
    TOOLS,
    "fresh",
    configured,
    {
        "config says another size": {"hidden": {"hidden_size": 32}, "layers": {"num_hidden_layers": 3}},
        "config: text for a number": {"": {"hidden_size": "sixteen"}},
        "config: an unknown architecture": {"": {"model_type": "nothing", "architectures": ["Nothing"]}},
    },
)


@drill(TOOLS, "no eos token", "fresh")
def no_eos(lab: Lab) -> Verdict:
    edit_json(lab.folder / BASE / "tokenizer_config.json", lambda content: content.pop("eos_token"))
    return lab.refused("run", CONFIG)


def other_model(lab: Lab, settings: tuple[str, ...]) -> Verdict:
    return lab.refused("run", CONFIG, *settings)


table(
    TOOLS,
    "fresh",
    other_model,
    {
        "hub name that is not there": ("model.name_or_path=nobody/nothing",),
        "reference model missing": ("learn.reference=nowhere/at/all",),
        "rewards.model missing": ("rewards.model=./nowhere",),
    },
)


@drill(TOOLS, "selection for another model", "finished")
def selection(lab: Lab) -> Verdict:
    """The same shapes, other weights: the base is not the one that was located in."""
    with_base(lab, lambda tensors: next(iter(tensors.values())).add_(1))
    shutil.rmtree(lab.run / FORGET)
    return lab.refused("forget", CONFIG)


def delta(lab: Lab, how: tuple[Damage, str]) -> Verdict:
    """Merge a damaged delta: refused, and nothing is left under OUT."""
    path = lab.folder / "delta.safetensors"
    path.write_bytes(how[0]((lab.run / LEARN / "delta.safetensors").read_bytes()))
    verdict = lab.refused("merge", how[1], path, "out")
    left = (lab.folder / "out").exists()
    return Verdict("unclear", "OUT is left there") if left and verdict.grade == "good" else verdict


def a_model(data: bytes) -> bytes:
    return save({"weight": torch.ones(3)})


table(
    TOOLS,
    "finished",
    delta,
    {
        "delta over another base": (lambda data: data, "runs/drill/04-warmup/seed-0/model"),
        "delta truncated": {"middle": (truncated(), "base"), "empty": (constant(b""), "base")},
        "delta is a model": (a_model, "base"),
        "flipped position in a delta": {f"at {place}": (flipped(place), "base") for place in (0.3, 0.32, 0.36)},
        "flipped value in a delta, merge": {f"at -{place}": (flipped(-place), "base") for place in (1, 2, 3, 400)},
    },
)


def out(lab: Lab, prepare: Callable[[Path], object]) -> Verdict:
    """Merge onto what is there: refused, and it stays as it is."""
    folder = lab.folder / "out"
    prepare(lab.folder)
    target = BASE if not folder.exists() else folder
    before = {path: path.read_bytes() for path in sorted((lab.folder / target).rglob("*"))} or target.read_bytes()
    verdict = lab.refused("merge", "base", lab.run / LEARN / "delta.safetensors", target)
    path = lab.folder / target
    after = {path: path.read_bytes() for path in sorted(path.rglob("*"))} or path.read_bytes()
    return verdict if before == after else Verdict("silent", f"overwritten; {verdict.said}")


table(
    TOOLS,
    "finished",
    out,
    {
        "merge OUT = BASE": lambda folder: None,
        "merge OUT holds another model": lambda folder: copy_to(folder / "base", folder / "out"),
        "merge OUT is a file": lambda folder: (folder / "out").write_text("precious"),
    },
)


@drill(TOOLS, "export OUT = the run's own model", "finished")
def export_over(lab: Lab) -> Verdict:
    return lab.refused("export", lab.run, "learn", lab.run / LEARN / "model")


@drill(TOOLS, "export of a run whose delta is damaged", "finished")
def export_damaged(lab: Lab) -> Verdict:
    path = lab.run / FORGET / "delta.safetensors"
    lab.damage(path, flipped(-2)(path.read_bytes()))
    return lab.refused("export", lab.run, "forget", "out")


def script(lab: Lab, work: str) -> Verdict:
    """What a stranger wrote, in every text that the report shows, is text there."""
    hostile = "<script>alert(1)</script>"
    (lab.folder / "base").rename(lab.folder / "<script>base")
    row = {"problem": f"1+1{hostile}", "solution": f"The answer is {hostile}", "answer": hostile}
    data = json.dumps(row) + "\n"
    (lab.folder / "train.jsonl").write_text(data * 4)
    (lab.folder / "test.jsonl").write_text(data * 2)
    write_model(lab.folder / "<script>base", byte_level(eos="<eos>"))

    def wrong(done) -> str:
        page = (lab.run / "report.html").read_text()
        return "a script is in the report" if "<script>" in page else ""

    return lab.judged(wrong, "run", CONFIG, "model.name_or_path='<script>base'", "method=dpo", "rivals=[]")


table(TOOLS, "fresh", script, {"<script> in responses, names and model path: report.html": ""})


class Hostile:
    """Pickled, it makes whoever loads it write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@drill(TOOLS, "pytorch_model.bin, honest", "fresh")
def honest_pickle(lab: Lab) -> Verdict:
    """Read with weights_only, or refused."""
    path = lab.folder / BASE / "model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    return lab.judged(lambda done: "", "sample", CONFIG, refusal=True)


@drill(TOOLS, "pytorch_model.bin, malicious", "fresh")
def hostile_pickle(lab: Lab) -> Verdict:
    path = lab.folder / BASE / "model.safetensors"
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({"weight": Hostile(lab.folder / "it-ran")}))
    verdict = lab.refused("run", CONFIG)
    if "weights_only=False" in verdict.said:
        return Verdict("unclear", verdict.said)
    return Verdict("silent", "it ran") if (lab.folder / "it-ran").exists() else verdict


@drill(TOOLS, "auto_map code in the model", "fresh")
def remote_code(lab: Lab) -> Verdict:
    folder = lab.folder / BASE
    (folder / "modeling_x.py").write_text(f"open({str(lab.folder / 'it-ran')!r}, 'w')\nclass Config: pass\n")
    auto = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    edit_json(folder / "config.json", lambda content: content.update(auto_map=auto, model_type="x"))
    verdict = lab.refused("run", CONFIG, stdin="y\n" * 20)
    return Verdict("silent", "it ran") if (lab.folder / "it-ran").exists() else verdict


@drill(TOOLS, "tokenizer larger than the model", "fresh")
def large_tokenizer(lab: Lab) -> Verdict:
    byte_level(eos="<eos>").save_pretrained(lab.folder / BASE)
    return lab.refused("run", CONFIG)


@drill(TOOLS, "tokenizer of the same size, permuted", "finished")
def permuted(lab: Lab) -> Verdict:
    """Noticed at the latest by what was rendered with the one before: a run does not go on with another."""

    def permute(content: dict) -> None:
        vocabulary = content["model"]["vocab"]
        names = list(vocabulary)
        content["model"]["vocab"] = dict(zip(names[1:5] + names[:1] + names[5:], vocabulary.values(), strict=True))

    edit_json(lab.folder / BASE / "tokenizer.json", permute)
    return lab.refused("run", CONFIG)


def tensors(lab: Lab, how: tuple) -> Verdict:
    """The base without a tensor, or with other names; then a command."""
    change, *words = how
    path = lab.folder / BASE / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return lab.refused(*words)


def without_one(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}


def misnamed(tensors: dict) -> dict:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


table(
    TOOLS,
    "fresh",
    tensors,
    {
        "one tensor missing from the base, dpo": (without_one, "run", CONFIG, "method=dpo"),
        "every tensor misnamed (module.*), warm-up": (misnamed, "run", CONFIG, "method=dpo"),
        "one tensor missing, allo": (without_one, "run", CONFIG),
    },
)


def gguf(lab: Lab, data: bytes) -> Verdict:
    (lab.folder / "model.gguf").write_bytes(data)
    return lab.refused("convert", "model.gguf", "out")


table(
    TOOLS,
    "fresh",
    gguf,
    {
        "convert: garbage or empty GGUF": {
            "garbage": b"GGUF" + bytes(range(256)) * 4,
            "empty": b"",
            "not GGUF": b"hello",
            "header alone": b"GGUF\x03\0\0\0" + bytes(16),
        }
    },
)


def cut_selection(lab: Lab, how: Damage) -> Verdict:
    path = lab.run / LOCATE / "forget.safetensors"
    shutil.rmtree(lab.run / FORGET)
    lab.damage(path, how(path.read_bytes()))
    return lab.judged(lambda done: lab.changed(), "forget", CONFIG, mend=lambda: lab.allo("locate", CONFIG, "--rerun"))


table(TOOLS, "finished", cut_selection, {"selection truncated": truncated(), "selection flipped": flipped(-2)})
