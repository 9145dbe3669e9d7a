"""Configurations that nobody should write: refused in one line, and nothing is written where it does not belong."""

from pathlib import Path

from tests.drills.drill import drill, table
from tests.drills.injector import fault, library, reason
from tests.drills.lab import Lab, Verdict
from tests.drills.run import CONFIG, JOB, SAMPLE, SAVED_CONFIG

CONFIGURATION = "Configuration"
SETTINGS = (
    *("learn.learning_rate=fast", "learn.learning_rate=-1", "learn.learning_rate=0", "learn.learning_rate=.nan"),
    *("learn.learning_rate=null", "learn.learning_rate=[1]", "learn.ratio=1.5", "learn.ratio=0", "learn.ratios=0.1"),
    *("lern.ratio=0.1", "learn=7", "learn=null", "seeds=0", "seeds=[]", "seeds=[1, 1]", "seeds=[x]", "seeds=[1.5]"),
    *("sample.num_return_sequences=1.5", "sample.top_p=2", "sample.stop=Problem", "data.format=text", "data=null"),
    *("protocol=papers", "method=ppo", "rivals=dpo", "save_models=some", "model.dtype=int8", "model.device=tpu"),
    *("name.first=1", "evaluate.batch_size=0", "locate.windows=none", "seeds=[", "learn.ratio", "=1", "warmup.=1"),
    *("forget.threshold=2", "pairs.gold=always", "locate.skip=0.99", "model.name_or_path=[base]", "deepspeed=7"),
)


def refused_setting(lab: Lab, setting: str) -> Verdict:
    return lab.refused("run", CONFIG, setting)


wrong = {"wrong types, ranges, keys": {setting: setting for setting in SETTINGS}}
table(CONFIGURATION, "fresh", refused_setting, wrong)


def refused_file(lab: Lab, data: bytes) -> Verdict:
    (lab.folder / CONFIG).write_bytes(data)
    return lab.refused("check", CONFIG, timeout=60)


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
DUPLICATE = JOB.replace("learn: {", "learn: {learning_rate: 1e-4, ")
table(
    CONFIGURATION,
    "fresh",
    refused_file,
    {
        "empty, list, scalar, tabs, NUL": {
            "empty": b"",
            "list": b"[1]",
            "scalar": b"7",
            "tabs": JOB.replace("  template", "\ttemplate").encode(),
            "NUL": JOB.encode() + b"\0",
        },
        "YAML alias bomb": (JOB + ALIASES).encode(),
        "a cycle of aliases": (JOB + "more: &more [*more]\n").encode(),
        "latin-1 or UTF-16 file": {
            "latin-1": JOB.replace("user's", "us\xe9r").encode("latin-1"),
            "half UTF-16": JOB.encode("utf-16")[:-1],
        },
        "5000 brackets": JOB.encode() + b"more: " + b"[" * 5000,
        "duplicate YAML keys (1e-4, then 1e-3)": DUPLICATE.encode(),
    },
)


@drill(CONFIGURATION, "!!python/object", "fresh")
def python_object(lab: Lab) -> Verdict:
    run = lab.folder / "it-ran"
    lines = f"{JOB}more: !!python/object/apply:os.system ['touch {run}']\n"
    (lab.folder / CONFIG).write_text(lines)
    verdict = lab.refused("check", CONFIG)
    return Verdict("silent", "it ran") if run.exists() else verdict


@drill(CONFIGURATION, "missing", "fresh")
def missing(lab: Lab) -> Verdict:
    return lab.refused("check", "nowhere.yaml")


@drill(CONFIGURATION, "unicode name", "fresh")
def unicode_name(lab: Lab) -> Verdict:
    folder = lab.folder / "runs/\u00fcn\u00ef-\u6f22"
    return lab.judged(
        lambda done: "" if (folder / SAMPLE).exists() else f"{folder} is not there",
        *("sample", CONFIG, f"name={folder.name}"),
    )


def name(lab: Lab, given: str) -> Verdict:
    """Refused, and nothing is written anywhere."""
    around = lab.folder.parent

    def files() -> set[Path]:
        return {path for path in (*around.glob("*"), *around.glob("*/*"), *around.glob("*/runs/*"))}

    before = files()
    given = given.replace("HERE", str(lab.folder))
    (lab.folder / CONFIG).write_text(JOB.replace("name: drill", f"name: {given}"))
    verdict = lab.refused("sample", CONFIG)
    new = sorted(str(path.relative_to(around)) for path in files() - before if path.name != "runs")
    return Verdict("silent", f"written: {', '.join(new)}") if new else verdict


table(
    CONFIGURATION,
    "fresh",
    name,
    {
        "name ''": "''",
        "name ../../x": "../../x",
        "absolute name": "HERE/elsewhere",
        "name with NUL, or 300 long": {"NUL": '"a\\0b"', "300 long": "x" * 300, "newline": '"a\\nb"', "dot": "'.'"},
        "name a/b": "a/b",
    },
)


def refused_run(lab: Lab, setting: str) -> Verdict:
    return lab.refused("run", CONFIG, setting)


table(
    CONFIGURATION,
    "fresh",
    refused_run,
    {
        "seed 20250101123456": {"large": "seeds=[20250101123456]", "larger": f"seeds=[{1 << 70}]"},
        "output_dir a file": "output_dir=train.jsonl",
    },
)


def no_traceback(lab: Lab, *settings: str) -> Verdict:
    """Refused or used; never a traceback after stages have run."""
    return lab.judged(lambda done: "", "run", CONFIG, *settings, refusal=True)


@drill(CONFIGURATION, "ddp_timeout .inf", "fresh")
def endless_timeout(lab: Lab) -> Verdict:
    return no_traceback(lab, "ddp_timeout=.inf", "deepspeed=auto")


@drill(CONFIGURATION, "seed 0.. as large as torch takes", "fresh")
def large_seed(lab: Lab) -> Verdict:
    return no_traceback(lab, f"seeds=[{(1 << 31) - 1}]")


@drill(CONFIGURATION, "a negative seed", "fresh")
def negative_seed(lab: Lab) -> Verdict:
    return no_traceback(lab, "seeds=[-1]")


@drill(CONFIGURATION, f"own config at NAME/{SAVED_CONFIG}", "fresh")
def own_config(lab: Lab) -> Verdict:
    """Refused, or its comments survive."""
    lab.run.mkdir(parents=True)
    own = lab.run / SAVED_CONFIG
    own.write_text(JOB)
    done = lab.allo("sample", own)
    if own.read_text() != JOB:
        return Verdict("silent", "overwritten: comments lost")
    return Verdict("good" if done.code == 0 or done.is_clear else "unclear", done.line)


@drill(CONFIGURATION, "eval with an absolute name leaves no run behind", "preferences")
def absolute_eval(lab: Lab) -> Verdict:
    folder = lab.folder / "elsewhere"
    done = lab.allo("eval", "base", CONFIG, f"name={folder}")
    if folder.exists():
        return Verdict("silent", f"{folder.name} is there")
    return Verdict("good" if done.code == 0 or done.is_clear else "unclear", done.line)


def forbidden(lab: Lab, match: str) -> Verdict:
    if library() is None:
        return Verdict("skipped", reason)
    return lab.refused("sample", CONFIG, before=fault("deny", 0, lab.folder, match))


table(
    CONFIGURATION,
    "fresh",
    forbidden,
    {
        "output_dir read-only": "runs",
        "output_dir not permitted": "runs/drill/",
    },
)
