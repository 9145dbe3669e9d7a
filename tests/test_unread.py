from pathlib import Path

import pytest

from allo_fast.config_file import load_config
from allo_fast.stages.unread import unread

GIVEN, SAMPLED = "data.format=multiple_choice", "data.format=gsm8k"
DENSE = [GIVEN, "method=dpo"]
STEPS = "learning_rate=1 lr_scheduler_type=linear warmup_steps=0 adam_beta1=0 adam_epsilon=1 weight_decay=1".split()
ALL = "learn.epsilon=1"
KEPT = ["warmup.save_steps=1", "warmup.save_minutes=1", "warmup.skip_nonfinite_steps=1"]


@pytest.fixture
def read(tmp_path):
    (path := tmp_path / "c.yaml").write_text(
        "name: x\nmodel: {name_or_path: m, dtype: bfloat16}\ndata: {train: a, test: b}\n"
    )
    return lambda *overrides: unread(load_config(path, [*overrides]))


@pytest.mark.parametrize(
    "where, idle, elsewhere",
    [
        ([SAMPLED], ["pretrain.problems=5", "pretrain.learning_rate=1"], None),
        (
            [GIVEN],
            ["sample.num_return_sequences=2", "sample.temperature=1", "sample.top_p=1", "sample.stop=[]"],
            [SAMPLED],
        ),
        (
            [GIVEN, "method=sparse-dpo"],
            ["sample.max_new_tokens=3", "sample.batch_size=3", "pairs.gold=missing", "data.scorer=release"],
            [SAMPLED],
        ),
        ([GIVEN], ["evaluate.max_new_tokens=3", "evaluate.num_return_sequences=2"], [SAMPLED]),
        ([SAMPLED], ["evaluate.temperature=1", "evaluate.top_p=1"], [SAMPLED, "evaluate.num_return_sequences=2"]),
        ([GIVEN], ["evaluate.temperature=1", "evaluate.top_p=1"], [SAMPLED, "evaluate.num_return_sequences=2"]),
        ([GIVEN], ["warmup.lora.r=2"], [GIVEN, "rivals=[dpo]"]),
        ([GIVEN], ["warmup.lora={}"], [GIVEN, "rivals=[dpo]"]),
        ([SAMPLED], ["sample.server.url=http://a", "sample.server.retries=1"], [SAMPLED, "sample.engine=server"]),
        ([SAMPLED, "sample.engine=server", "sample.server.url=http://a"], ["sample.batch_size=3"], [SAMPLED]),
        (["data.chat_template=false"], ["data.chat_template_kwargs={a: 1}"], []),
        (["model.dtype=float32"], ["model.rounding=stochastic"], []),
        (
            DENSE,
            ["locate.score=snr", "locate.skip=.1", "locate.last=true", "locate.rows=true", "rewards.source=implicit"],
            [GIVEN],
        ),
        (
            DENSE,
            ["locate.scope=per_tensor", "forget.ratio=.1", "learn.beta=1", "reference=online", "save_models=all"],
            [GIVEN],
        ),
        (DENSE, ["locate.after=m", "rivals=[dpo]"], [GIVEN]),
        (DENSE, ["locate.exclude=[a]"], [*DENSE, "sft.ratio=.1"]),
        (DENSE, ["locate.pairs=512", "locate.clip=false", "locate.windows=2", "locate.accumulators=host"], [GIVEN]),
        ([GIVEN, "method=sparse-dpo"], ["rewards.ratio=.1", "forget.beta=1"], [GIVEN]),
        ([GIVEN], KEPT, [GIVEN, "rivals=[dpo]"]),
        (
            [GIVEN, "locate.score=random"],
            [f"warmup.{key}" for key in ("beta=1", *STEPS, "num_train_epochs=2")],
            [GIVEN],
        ),
        ([GIVEN, "locate.score=snr", "rewards.source=confidence"], ["locate.clip=false"], [GIVEN, "locate.score=snr"]),
        ([GIVEN, "locate.score=snr"], [f"warmup.{key}" for key in (*STEPS, "max_grad_norm=2")], [GIVEN]),
        (["rewards.source=confidence"], ["rewards.ratio=.1"], ["rewards.source=implicit"]),
        (["rewards.source=implicit"], ["rewards.train.max_grad_norm=2", "rewards.max_examples=3"], []),
        (["rewards.source=implicit"], ["rewards.template='{}{}{}'"], ["rewards.source=prompted"]),
        (["rewards.source=prompted"], ["rewards.dpo.beta=1"], ["rewards.source=implicit"]),
        (["rewards.source=file", "rewards.path=f"], ["rewards.batch_size=3"], ["rewards.source=implicit"]),
        (["rewards.source=confidence"], ["rewards.batch_size=3"], ["rewards.source=prompted"]),
        ([], ["ddp_timeout=5"], ["deepspeed=auto"]),
        (DENSE, ["model.rounding=stochastic"], [*DENSE, "sft.ratio=.1"]),
        ([*DENSE, "sft.ratio=1"], ["model.rounding=stochastic"], [GIVEN]),
        ([GIVEN, "locate.clip=false"], ["warmup.max_grad_norm=2"], [GIVEN, "locate.clip=false", "rivals=[dpo]"]),
        (["protocol=release"], ["forget.threshold=mean", "forget.guard.steps=3"], []),
        ([], ["learn.simpo_gamma=1"], [ALL, "learn.loss_type=[ipo, simpo]"]),
        (["warmup.loss_type=ipo"], ["warmup.simpo_gamma=1"], ["warmup.loss_type=simpo"]),
        (["learn.loss_type=ipo"], ["learn.label_smoothing=.1", "learn.length_alpha=1"], []),
        ([ALL, "learn.loss_type=simpo"], ["learn.reference=m"], [ALL, "learn.loss_type=[simpo, sigmoid]"]),
        ([ALL, "learn.loss_type=sft"], ["learn.beta=3"], [ALL, "learn.loss_type=[sft, npo]"]),
        (
            ["rewards.source=implicit", "rewards.dpo.lr_scheduler_type=constant"],
            ["rewards.dpo.warmup_steps=3"],
            ["rewards.source=implicit"],
        ),
        (["sft.lr_scheduler_type=constant"], ["sft.warmup_steps=3"], ["sft.lr_scheduler_type=constant_with_warmup"]),
    ],
)
def test_what_is_set_and_not_read_is_said(read, where, idle, elsewhere):
    """Once with the reason, and not where it is read."""
    before, keys = read(*where), {override.partition("=")[0] for override in idle}
    (line,) = (line for line in read(*where, *idle) if line not in before)
    listed, _, why = line.removeprefix("not read: ").partition(" (")
    assert set(listed.split(", ")) == keys and why.endswith(")")
    if elsewhere is not None:
        assert not keys & {key for line in read(*elsewhere, *idle) for key in line[10:].partition(" (")[0].split(", ")}


PAIRS = "data.format=preference"


@pytest.mark.parametrize(
    "words",
    [
        [GIVEN, "sample.max_new_tokens=3"],  # of the guard's answers
        [PAIRS, "evaluate.max_new_tokens=3"],  # of those that a report shows
        [GIVEN, "evaluate.choices=generation", "sample.stop=[x]", "evaluate.max_new_tokens=3", "method=dpo"],
        [PAIRS, ALL, "learn.loss_type=sft", "learn.beta=3"],  # of margins, as of pairs that are held out
        [GIVEN, ALL, "learn.loss_type=sft", "learn.beta=3", "pairs.eval_size=0.1"],
    ],
)
def test_what_is_read_in_one_place_alone_is_not_said(read, words):
    assert not read(*words)


@pytest.mark.parametrize(
    "words, key",
    [
        ([GIVEN, "sample.max_new_tokens=3", "forget.guard=null"], "sample.max_new_tokens"),
        ([GIVEN, "sample.max_new_tokens=3", "forget.guard.max_repeated=null"], "sample.max_new_tokens"),
        ([GIVEN, "sample.max_new_tokens=3", "protocol=release"], "sample.max_new_tokens"),
        ([PAIRS, "evaluate.max_new_tokens=3", "evaluate.samples=0"], "evaluate.max_new_tokens"),
        ([SAMPLED, "evaluate.samples=2"], "evaluate.samples"),
    ],
)
def test_what_is_read_in_no_place_is_said(read, words, key):
    assert [line for line in read(*words) if key in line]


def test_the_shipped_configurations_are_read():
    """All but what a comment in the quickstart's says is for the sources of rewards that it is compared with."""
    found = {path.stem: unread(load_config(path, auto="bfloat16")) for path in Path("configs").glob("*.yaml")}
    (line,) = found.pop("quickstart")
    assert len(found) > 3 and not any(found.values()) and line.endswith("(rewards.source: confidence)")
