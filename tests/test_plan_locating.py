"""What `allo-fast plan` says of locating, held against the passes themselves."""

import json
import weakref
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pair_corpus, tiny_llama
from transformers import LlamaConfig

from allo_fast.__main__ import main
from allo_fast.config import GRADIENT_SCORES, Config, LocateConfig, UserError, WarmupConfig
from allo_fast.config_file import load_config
from allo_fast.data.arithmetic import character_tokenizer
from allo_fast.locating import captured
from allo_fast.locating import sweep as sweeping
from allo_fast.locating.files import stored_scores
from allo_fast.locating.sweep import Sweep
from allo_fast.locating.windows import filled, pieces_of, square_windows, windows_of
from allo_fast.method.objectives import Preference
from allo_fast.model.logps import ResponseLogps
from allo_fast.model.saving import save_model
from allo_fast.model.weights import named_weights
from allo_fast.plan.advice import advised
from allo_fast.plan.costs import USABLE
from allo_fast.plan.job import phases_of
from allo_fast.plan.locating import _cut_bytes, _Sweep, locate_phase
from allo_fast.plan.phase import DEVICES, Job
from allo_fast.plan.rows import Rows, unknown_rows
from allo_fast.plan.shapes import Shape, shape_of
from allo_fast.plan.windows import LEAN, divide, pieces_on_paper, room_beside, sums_per_weight, windows
from allo_fast.stages import gradients
from allo_fast.training.examples import Examples
from allo_fast.training.zero import Zero

CONFIGS = Path(__file__).parents[1] / "configs"
STEP = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
EIGHT = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
)


def settings(**locate) -> Config:
    data = {"train": "a", "test": "b", "max_prompt_tokens": 64, "max_response_tokens": 64}
    model = {"name_or_path": "m", "dtype": "float32"}
    return Config(name="x", model=model, data=data, locate=locate, warmup=STEP, sample={"max_new_tokens": 64})


def job_on(config: Config, shape: Shape, gpu_bytes: float, gpus: int = 1) -> Job:
    return Job(config, shape, gpus, gpu_bytes, DEVICES["h100"], unknown_rows(config))


def tiny():
    return tiny_llama(num_hidden_layers=4)


def swept(folder: Path, model, **options) -> Sweep:
    train, score = WarmupConfig(**STEP), options.pop("score", "linear")
    sweep = Sweep(
        ResponseLogps(model), Examples(pair_corpus(), train), Preference(0.1), train, score, folder, **options
    )
    assert list(sweep.run())
    return sweep


@pytest.mark.parametrize("score", GRADIENT_SCORES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_live_tensors_are_as_planned(tmp_path, score, count):
    """Base and sums within 5 %, passes exactly."""
    model = tiny()
    sweep = swept(tmp_path, model, score=score, windows=count)
    config = settings(score=score, windows=count)
    planned = locate_phase(job_on(config, shape_of(model.config, "float32"), 80e9), None)
    assert (planned.windows, planned.passes) == (len(sweep.windows), sweep.passes)
    assert planned.memory["base"] == sweep.state_bytes["base"]
    assert planned.state_bytes == pytest.approx(sum(sweep.state_bytes.values()), rel=0.05)


def test_sums_in_host_memory_are_the_host_s(tmp_path):
    model = tiny()
    sweep = swept(tmp_path, model, host=True)
    config = settings(accumulators="host")
    planned = locate_phase(job_on(config, shape_of(model.config, "float32"), 80e9), None)
    assert planned.memory["accumulators"] == 0 and planned.windows == 1
    assert planned.host["accumulators"] == sweep.state_bytes["accumulators"] == 16 * planned.memory["base"] // 4


@pytest.mark.parametrize("shares", [1, 2, 8, 64])
@pytest.mark.parametrize("score", ["linear", "snr"])
def test_windows_are_the_fewest_that_fit(score, shares):
    """With sums of score passes and of squares' passes below the room; one window fewer is above it."""
    sizes, locate = (3_000_000, 70_000_000, 5, 90_000_000, 999) * 3, LocateConfig(score=score)
    states = sums_per_weight(score) // 4 - 1

    def needed(count: int) -> int:
        division = divide(score, True, sizes, count, shares)
        part, square_part = (4 * ceil(size / shares) for size in (division.largest, division.largest_squares))
        reduced = (part, square_part) if shares > 1 else (0, 0)
        scoring = 4 * division.largest + states * part + reduced[0]
        return max(scoring, 4 * division.largest_squares + reduced[1])

    for room in (9e9, 3e9, 1e9, 2e8, 9e7):
        count = windows(locate, score, pieces_on_paper(sizes), room, 1, shares)
        assert needed(count) <= room * 1.0001
        assert count == 1 or needed(count - 1) > room


def test_ranks_with_the_whole_base_divide_windows_evenly():
    pieces, locate = pieces_on_paper((100_000_000,) * 40), LocateConfig()
    assert windows(locate, "linear", pieces, 9e9) == 8 and windows(locate, "linear", pieces, 9e9, 3) == 9
    assert windows(locate, "linear", pieces, 1e12, 8) == 8, "else seven ranks had nothing to do"
    assert windows(locate, "linear", pieces, None) == sums_per_weight("linear") / LEAN == 32
    assert windows(LocateConfig(windows=5), "linear", pieces, 9e9, 3) == 5, "as it was asked for"
    assert windows(LocateConfig(accumulators="host"), "linear", pieces, 1.0) == 1
    assert windows(locate, "linear", pieces, 1.0) == len(pieces), "however small the room"


@pytest.mark.parametrize("shares, passes", [(1, 4), (8, 13), (1000, 16)])
def test_squares_take_as_much_as_scores(shares, passes):
    """Under ZeRO-3 a step's gradient is whole on every rank, and so are sums of squares; others are shared."""
    scored = windows_of(pieces_on_paper((1_000_000,) * 256), 16)
    assert len(square_windows(scored, 3, shares)) == passes


def _unknown(*_):
    raise UserError("no config.json")


def test_a_run_has_the_windows_of_its_plan(tmp_path, monkeypatch):
    """On a device with memory of its own: the plan's count, of the rows that there are; never more."""
    model, tokenizer = tiny(), character_tokenizer()
    save_model(model, tokenizer, tmp_path / "base")
    config = settings()
    config.model.name_or_path = str(tmp_path / "base")
    config.model.gradient_checkpointing = True
    examples = Examples(pair_corpus(), config.warmup)
    shape = shape_of(model.config, "float32")
    unit = SimpleNamespace(config=config)
    base = SimpleNamespace(path=tmp_path / "base", logps=ResponseLogps(model))
    tokens = max(
        examples.tokens(micro) for step in range(len(examples.steps)) for micro in examples.micro_batches(step)
    )
    device = (403e6 + 10 * 4 * shape.parameters) / USABLE  # the head's workspace, and some
    base_of_it = 4 * shape.parameters  # is there already; of what is free a CPU's job takes half
    monkeypatch.setattr(gradients.memory, "available_bytes", lambda: 2 * (device - base_of_it))
    room = gradients._room(unit, base, examples, 1)
    assert room == room_beside(shape, config.model, tokens, device) > 1
    planned = locate_phase(job_on(config, shape, device), None)
    assert 1 <= windows(config.locate, "linear", pieces_of(model), room) <= planned.windows
    few = gradients._windows(unit, base, examples, "linear")
    assert few == windows(config.locate, "linear", pieces_of(model), room)
    for free, fewest, most in ((1 << 40, 1, 1), (0, 32, 40)):  # of nothing about as lean as where nobody knows
        monkeypatch.setattr(gradients.memory, "available_bytes", lambda free=free: free)
        assert fewest <= gradients._windows(unit, base, examples, "linear") <= most
    monkeypatch.setattr(gradients, "model_config", _unknown)
    assert gradients._windows(unit, base, examples, "linear") == 32, "half a byte a weight where nothing says more"


def test_zero_3_divides_all_but_a_step_s_gradient():
    shape = shape_of(EIGHT, "bfloat16")
    config = settings()
    config.model.dtype, config.model.gradient_checkpointing = "bfloat16", True
    whole, shared = (locate_phase(job_on(config, shape, 24e9, 8), zero) for zero in (Zero(0), Zero(3)))
    assert shared.memory["base"] == pytest.approx(whole.memory["base"] / 8, rel=1e-3)
    assert whole.windows % 8 == 0 and shared.windows < whole.windows
    assert all(phase.device_bytes <= USABLE * 24e9 for phase in (whole, shared))
    assert shared.memory["gathered weights"] == 2e9 and not shared.memory["cut states"]
    assert whole.scratch_bytes > shared.scratch_bytes == 4 * shape.parameters


def test_cuts_on_the_disk_are_as_planned(tmp_path):
    """At most, and not twice: of the passes that run layers by themselves."""
    sweep = swept(tmp_path, tiny(), windows=6)
    written = sum(path.stat().st_size for path in tmp_path.glob("cuts-*"))
    config = settings(windows=6)
    shape = shape_of(tiny().config, "float32")
    lengths = [sweep.losses.examples.tokens(micro) for micro, _ in sweep.losses.parts()]
    config.data.max_prompt_tokens, config.data.max_response_tokens = max(lengths), 1
    config.sample.max_new_tokens = 1
    rows = Rows(1, 1, len(lengths), 1, 1)
    paper = _Sweep(
        replace(job_on(config, shape, 80e9), rows=rows), "locate", "warmup", config.warmup, "linear", None, 1
    )
    planned = _cut_bytes(paper, divide("linear", True, shape.sizes, 6))
    assert 0.5 * planned < written < 1.3 * planned


def test_where_the_disk_is_too_small_passes_run_the_whole_model(tmp_path, monkeypatch, caplog):
    found = {}
    monkeypatch.setattr("allo_fast.durable.check_room", lambda *_: None)  # for what passes leave there is some
    for name, free in (("large", 1e12), ("small", 100)):
        monkeypatch.setattr(captured.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        sweep = swept(tmp_path / name, tiny(), windows=6)
        assert (sweep.captured is None) == (name == "small") == (not list((tmp_path / name).glob("cuts-*")))
        sizes = {key: weight.numel() for key, weight in named_weights(sweep.model).items()}
        scores = stored_scores(tmp_path / name, sizes)
        found[name] = torch.cat([scores[key].part(0, size) for key, size in sizes.items()])
    assert "locate.pairs limits them" in caplog.text
    torch.testing.assert_close(found["small"], found["large"], rtol=1e-3, atol=1e-9)


def test_scores_take_the_place_of_the_sums(tmp_path, monkeypatch):
    """When a window is scored, its sums are gone."""
    opened = []
    plain = Sweep._scored
    taps = sweeping.Taps.open

    @contextmanager
    def watched(self, pieces, device, **options):
        with taps(self, pieces, device, **options) as sums:
            opened.append(weakref.ref(sums[0].untyped_storage()))
            yield sums

    def scored(self, *words):
        assert opened[-1]() is None
        return plain(self, *words)

    monkeypatch.setattr(sweeping.Taps, "open", watched)
    monkeypatch.setattr(Sweep, "_scored", scored)
    swept(tmp_path, tiny(), windows=3, clip=False)
    assert len(opened) == 3 + 1  # with the trial of segments


@pytest.mark.parametrize("command", ["plan", "check"])
def test_more_windows_than_pieces_are_refused_before_a_run(tmp_path, command, capsys):
    save_model(tiny_llama(vocab_size=len(character_tokenizer())), character_tokenizer(), tmp_path / "base")
    row = {"prompt": "1", "chosen": "2", "rejected": "3"}
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) * 1 + "\n")
    data = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "test.jsonl"), "format": "preference"}
    config = {"name": "x", "output_dir": str(tmp_path / "runs"), "model": {"name_or_path": str(tmp_path / "base")}}
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({**config, "data": data}))
    assert main([command, str(path), "locate.windows=100000"]) == 2
    pieces = len(pieces_of(tiny_llama(vocab_size=len(character_tokenizer()))))
    said = "".join(capsys.readouterr())
    assert f"locate.windows: expected 1..{pieces}, the pieces that this model is cut into; got 100000" in said
    assert main([command, str(path), "locate.windows=3"]) == 0
    assert main([command, str(path), "locate.windows=100000", "locate.score=random"]) == 0, "which needs none"


def test_the_search_for_windows_finds_the_smallest_capacity():
    pieces = pieces_on_paper((7, 100, 3, 55, 900))
    for count in (1, 2, 5, 50, len(pieces)):
        largest = max(sum(piece.size for piece in window) for window in windows_of(pieces, count))
        smaller = range(max(piece.size for piece in pieces), largest)
        assert all(len(filled(pieces, capacity)) > count for capacity in smaller)
    with pytest.raises(UserError, match="locate.windows"):
        windows_of(pieces, len(pieces) + 1)


def test_locating_by_another_model_holds_two(tmp_path):
    config = settings(after="other")
    phase = locate_phase(job_on(config, shape_of(tiny().config, "float32"), 80e9), None)
    assert phase.memory["after"] == phase.memory["base"] and not phase.windows


def test_the_whole_job_fits_one_device_of_40_gb():
    """Llama-3-8B, every stage of ALLO with the shipped settings; one of 24 GB needs others, which are named."""
    config = load_config(CONFIGS / "llama3_8b.yaml", ["deepspeed=null"], auto="bfloat16")
    shape, none = shape_of(EIGHT, "bfloat16"), dict.fromkeys(("dense", "sparse"))
    assert advised(job_on(config, shape, 40e9), none).fits
    small = advised(job_on(config, shape, 24e9), none)
    located = [phase for phase in phases_of(job_on(config, shape, 24e9), none) if phase.windows]
    assert len(located) == 2 and all(small.holds(phase) for phase in located), "locating fits wherever the base does"
    assert {line.partition(":")[0] for line in small.advice} == {phase.stage for phase in small.lacking}
