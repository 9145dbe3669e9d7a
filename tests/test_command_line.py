"""The command line before and after its work: help at once, names that others use, ends that programs understand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from allo_fast import __version__, arguments
from allo_fast.__main__ import main
from allo_fast.compare.judging import STYLES
from allo_fast.config import Config, UserError
from allo_fast.config_file import NAMES_ELSEWHERE, NOT_KEYS, known_keys, load_config
from allo_fast.method.adapters import KINDS
from allo_fast.plan.phase import DEVICES
from allo_fast.stages import STAGES
from allo_fast.stages.export import STAGES_WITH_MODELS

ROOT = Path(__file__).parent.parent


def run(code: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": ""}  # what waits until the end counts, too
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_its_words_are_those_of_the_modules():
    assert tuple(STAGES) == arguments.STAGES and STAGES_WITH_MODELS == arguments.STAGES_WITH_MODELS
    assert KINDS == arguments.ADAPTERS and tuple(STYLES) == arguments.STYLES and tuple(DEVICES) == arguments.DEVICES


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["run"]])
def test_what_needs_no_model_imports_none(words):
    code = f"""
import sys
from allo_fast.__main__ import main
try:
    main({words!r})
finally:
    print([name for name in ("torch", "transformers", "pydantic", "numpy") if name in sys.modules], file=sys.stderr)
"""
    done = run(code)
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.returncode == (2 if words == ["run"] else 0)
    if words == ["--version"]:
        assert done.stdout == f"allo-fast {__version__}\n"


def test_the_package_itself_imports_nothing_heavy():
    assert run("import sys, allo_fast; print('torch' in sys.modules)").stdout == "False\n"


@pytest.mark.parametrize("words", [["env"], ["keys", "margin"]])
def test_who_has_read_enough_is_told_nothing(words):
    read, write = os.pipe()
    os.close(read)
    done = run(f"import sys; from allo_fast.__main__ import main; sys.exit(main({words!r}))", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, "")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("lr=1e-5", "learn.learning_rate"),
        ("warmup.lr=1e-5", "warmup.learning_rate"),
        ("epochs=2", "learn.num_train_epochs"),
        ("learn.batch_size=2", "learn.per_device_train_batch_size"),
        ("base_model=x", "model.name_or_path"),
        ("model.torch_dtype=x", "model.dtype"),
        ("dataset=x", "data.train"),
        ("val_set_size=0.1", "data.test_size"),
        ("seed=1", "seeds"),
        ("peft=true", "warmup.lora"),
        ("warmup.lora_r=8", "warmup.lora.r"),
        ("ref_model=x", "learn.reference"),
        ("rpo_alpha=1", "learn.loss_weights"),
        ("forget.pref_beta=1", "forget.beta"),
        ("learn.learning_rat=1", "learn.learning_rate"),
    ],
)
def test_a_key_by_the_name_that_others_give_it(words, meant):
    with pytest.raises(UserError, match=rf"{words.partition('=')[0]}: unknown key; did you mean {meant}\?"):
        load_config("configs/quickstart.yaml", [words])


def test_what_nothing_is_near_to_is_not_guessed():
    with pytest.raises(UserError, match="zzzz: unknown key; `allo-fast keys WORD` finds those there are"):
        load_config("configs/quickstart.yaml", ["zzzz=1"])


def test_the_names_of_others_are_for_keys_that_there_are():
    known = known_keys(Config)
    for theirs, ours in NAMES_ELSEWHERE.items():
        assert any(f".{key}".endswith(f".{ours}") for key in known), ours
        assert theirs not in known, "then nobody asks"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("save_steps", "did you mean learn.save_steps?"),
        ("eval_steps", "did you mean learn.eval_steps?"),
        ("learn.eval_strategy", "did you mean learn.eval_steps?"),
        ("learn.gradient_checkpointing", "did you mean model.gradient_checkpointing?"),
        ("learn.max_steps", "training is counted in epochs: num_train_epochs"),
        ("learn.seeds", "did you mean seeds?"),
        ("learn.max_length", "data.max_prompt_tokens, data.max_response_tokens"),
        ("sample_packing", "rows are packed without padding"),
        ("truncation_mode", "nothing is cut"),
        ("resume_from_checkpoint", "the same command goes on"),
        ("push_to_hub", "`allo-fast export --push-to-hub USER/NAME`"),
    ],
)
def test_what_others_names_lead_to(key, said):
    with pytest.raises(UserError, match=re.escape(f"{key}: unknown key; ") + ".*" + re.escape(said)):
        load_config(ROOT / "configs/quickstart.yaml", [f"{key}=5"])
    assert not {*NOT_KEYS} & {*NAMES_ELSEWHERE, *(name.rpartition(".")[2] for name in known_keys(Config))}


def test_settings_with_dashes(capsys):
    with pytest.raises(SystemExit):
        main(["check", "my.yaml", "--learn.ratio=0.1"])
    assert "--learn.ratio=0.1; settings are written key.subkey=value" in capsys.readouterr().err


def test_progress_may_be_switched_off():
    code = """
from allo_fast.console import show
from allo_fast.runs.unit import Progress
print(show("a", (Progress(n, 2, "step") for n in range(3))))
"""
    done = run("import os; os.environ['TQDM_DISABLE'] = '1'" + code)
    assert done.stdout == "None\n" and done.returncode == 0, done.stderr


def test_a_mistake_ends_with_2(capsys):
    assert main(["run", "nowhere.yaml"]) == 2 and "nowhere.yaml" in capsys.readouterr().err
