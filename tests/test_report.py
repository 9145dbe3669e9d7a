"""The page of a finished run: what it says, and how a browser shows it."""

import json
import re
import shutil
from html import escape, unescape

import pytest
import torch
from PIL import Image

from allo_fast.__main__ import main
from allo_fast.config import UserError
from allo_fast.config_file import load_config
from allo_fast.method.selection import Selection
from allo_fast.report import figures, picture, samples, selected
from allo_fast.report.page import _header, _rows
from allo_fast.runs.rows import read_jsonl
from allo_fast.runs.run import Run
from allo_fast.stages import STAGES
from tests.conftest import random_selection, tiny_llama

pytestmark = pytest.mark.xdist_group("runs")  # one finished run for all
in_a_browser = pytest.mark.skipif(not any(map(shutil.which, picture.BROWSERS)), reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page(finished):
    return (finished[1] / "report.html").read_text()


def of(page: str, title: str) -> str:
    """A section of it."""
    (found,) = re.findall(rf"<h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    return found


def cells(html: str) -> list[list[str]]:
    return [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", html) if "<td>" in row]


def test_it_is_self_contained(page):
    for title in ("Accuracy", "Before and after", "Training", "Selected weights", "Time and memory", "Rows"):
        assert of(page, title)
    assert page.count("<svg") == 9 and "#010203" not in page, "letters take the page's colour"
    loaded = re.findall(r'(?:src|href)="(?!#|data:)[^"]*"|@import|<script [^>]|<link|fetch', page)
    assert not loaded, "nothing is fetched from elsewhere"


def test_it_says_what_was_run(finished, page):
    header = page[: page.index("</header>")]
    assert "<dt>data.train</dt><dd>arithmetic:train[1000:1006]: 6 rows, 0 set aside</dd>" in header
    assert "allo - dpo" in header and ("inside the noise" in header or "clear of zero" in header)
    assert "<dt>command</dt><dd>allo-fast run config.yaml</dd>" in header and f"torch {torch.__version__}" in header
    assert (finished[1] / "config.yaml").read_text().splitlines()[0] in header


def test_it_says_that_the_test_was_held_out(finished):
    config = load_config(finished[0], ["data.test=null"])
    run = Run(config, STAGES, folder=finished[1])
    header = _header(run, json.loads((finished[1] / "summary.json").read_text()))
    assert "<dt>data.test</dt><dd>held out of data.train: " in header


def test_answers_before_and_after(finished, page):
    _, folder = finished
    shown = of(page, "Before and after")
    rows = {model: read_jsonl(folder / f"09-evaluate/{model}/predictions.jsonl") for model in ("base", "allo-seed-0")}
    assert shown.count("<figcaption>") == 6 and "base: wrong" in shown
    prompts = re.findall("<figcaption>(.*?)</figcaption>", shown)
    first = next(
        n for n, row in enumerate(read_jsonl(folder / "09-evaluate/base/problems.jsonl")) if row["prompt"] == prompts[0]
    )
    assert all(row[first]["response"] in shown.replace("&lt;", "<").replace("&gt;", ">") for row in rows.values())


def test_problems_on_which_models_differ_come_first(finished, monkeypatch):
    """Each kind of outcome in turn, beginning with the commonest."""
    outcomes = {"base": "0000000000", "dpo": "0000000111", "allo": "0000000001"}
    rows = {m: [{"strict": int(x), "response": f"{m} {n}"} for n, x in enumerate(of_m)] for m, of_m in outcomes.items()}
    problems = [{"prompt": f"problem {n}"} for n in range(10)]
    read = lambda path: problems if path.name == "problems.jsonl" else rows[samples.model_of(path.parent.name)]  # noqa: E731
    monkeypatch.setattr(samples, "read_jsonl", read)
    html = samples.before_and_after(Run.read(finished[1], STAGES))
    assert re.findall("problem (.)", html) == ["7", "9", "0", "8", "1", "2"]
    assert "2 wrong right wrong; 1 wrong right right; 7 wrong wrong wrong" in html


def test_shares_and_rewards_are_compared_with_the_base(finished, monkeypatch):
    """Several responses to a problem, or a reward model's chances: no kinds to count, but better or not."""
    scores = {"base": (0.5, 0.25, 0.5), "dpo": (0.5, 0.5, 0.25), "allo": (0.5, 0.75, 1.0)}
    rows = {
        m: [{"strict": x, "responses": [f"<{m} {n}>", "b"]} for n, x in enumerate(row)] for m, row in scores.items()
    }
    problems = [{"prompt": f"problem {n}"} for n in range(3)]
    read = lambda path: problems if path.name == "problems.jsonl" else rows[samples.model_of(path.parent.name)]  # noqa: E731
    monkeypatch.setattr(samples, "read_jsonl", read)
    html = samples.before_and_after(Run.read(finished[1], STAGES))
    assert re.findall("problem (.)", html) == ["1", "2", "0"] and "In the order" not in html
    assert "allo: 0.75 of 2, of which this is the first</h3><p class=tokens>&lt;allo 1&gt;</p>" in html


def test_long_wrong_responses_are_cut(copied, monkeypatch):
    _, folder = copied
    monkeypatch.setattr(samples, "_TOKENS", 3)
    html = samples.forgotten_tokens(Run.read(folder, STAGES))
    first = html[html.index("<figure>") : html.index("</figure>")]
    assert first.count("<span") == 3 and " [...]" in first


def test_ids_of_figures_are_unique(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) > 100 and len(ids) == len({*ids})
    assert {*re.findall(r'(?:href="|url\()#([^")]+)', page)} <= {*ids}, "and what they draw is there"


def test_selected_weights_by_kind_and_in_common(finished, page):
    _, folder = finished
    table = cells(of(page, "Selected weights"))
    shares = [row for row in table if row[0] in ("down_proj", "embed_tokens")]
    counts = json.loads((folder / "05-locate/seed-0/counts.json").read_text())["learn"]
    of_kind = sum(n for name, (n, _) in counts.items() if "down_proj" in name) / sum(n for n, _ in counts.values())
    assert {row[0]: row[2] for row in shares}["down_proj"] == f"{of_kind:.1%}"
    paths = [folder / f"05-locate/seed-{seed}/learn.safetensors" for seed in (0, 1)]
    first, second = map(Selection.load, paths)
    both = sum(
        len({*first.positions(n).unpack().tolist()} & {*second.positions(n).unpack().tolist()}) for n in first.names
    )
    common = {row[0]: row[1:] for row in table if " and " in row[0]}
    assert common["learn, seed-0 and learn, seed-1"] == [f"{both / first.selected:.1%}", "10.0%"]
    assert len(common) == 4, "seeds of a stage, stages of a seed"


def test_overlap_is_of_the_smaller_one():
    model = tiny_llama()
    large, small = random_selection(model, 0.1), random_selection(model, 0.05)
    assert small.overlap(large) == large.overlap(small) == 1.0, "of the same scores"
    other = random_selection(model, 0.05, seed=2)
    assert 0 < small.overlap(other) < 0.2


def test_too_many_weights_are_not_compared(finished, monkeypatch):
    monkeypatch.setattr(selected, "_ENTRIES", 10)
    monkeypatch.setattr(Selection, "load", lambda path: pytest.fail("it was read"))
    assert "With more than 10 selected weights" in selected.section_of(Run.read(finished[1], STAGES))


def test_wrong_responses_by_token(finished, page):
    shown = of(page, "Wrong responses, by token")
    rows = read_jsonl(finished[1] / "06-rewards/seed-0/rewards.jsonl")
    weighing = [reward for reward in rows[0]["rewards"] if reward < 0.03]
    first = shown[shown.index("<figure>") : shown.index("</figure>")]
    assert re.findall(r"<sub>([\d.]+)</sub>", first) == [f"{reward:.2f}" for reward in weighing]
    assert first.count("rgba(var(--shade),0.75)") == len(weighing) and ">right</h3>" in first


def test_costs_are_measured_planned_and_of_dense_dpo(page):
    shown = of(page, "Time and memory")
    rows = {row[0]: row for row in cells(shown)}
    assert rows["08-learn/seed-0"][4:6] == ["9.99%", "100.0%"]
    measured, planned, dense = map(float, rows["08-learn/seed-0"][6:])
    assert measured == pytest.approx(planned, rel=0.1) and dense == 18.0
    assert re.search(r", locating 4\.\d\d<", shown), "of the rewriter, which locates for itself in float32"
    assert rows["02-sample/seed-0"][4:] == ["", "", "", "", ""]


def test_rows_that_were_set_aside_are_named(copied):
    config, folder = copied
    aside = folder / "02-sample/seed-0/quarantine.jsonl"
    assert "No row was set aside." in (folder / "report.html").read_text()
    rows = [{"id": f"row {n}", "reason": "no answer" if n < 4 else "<b>"} for n in range(5)]
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = _rows(Run.read(folder, STAGES), {"stages": {}})
    assert cells(html) == [
        ["data.train", "no answer", "4", "row 0, row 1, row 2"],
        ["data.train", "&lt;b&gt;", "1", "row 4"],
    ]


def test_it_says_what_it_cannot_show(copied, monkeypatch):
    config, folder = copied
    title = "<h2>Wrong responses, by token</h2>"
    assert title + "<p>Shade" in (folder / "report.html").read_text()
    monkeypatch.setattr("allo_fast.stages.models.base_path", lambda unit: folder / "gone")
    assert main(["report", str(config)]) == 0
    assert f"{title}<p>Not shown: {folder}/gone: no such file or folder</p>" in (folder / "report.html").read_text()


def test_a_figure_of_its_own_is_on_white():
    from matplotlib import pyplot as plt

    alone, within = (figures.as_svg(plt.figure(), "x", alone=alone) for alone in (True, False))
    assert "fill: #ffffff" in alone and "fill: #ffffff" not in within


# Appended to the page, which lies in a frame: what a reader would see go wrong, and a table sorted both ways.
PROBE = """<script>
const found = {width: innerWidth, needs: document.documentElement.scrollWidth, errors};
const table = [...document.querySelectorAll("table")].find((each) => each.querySelector("th").textContent === "stage");
const click = () => table.querySelector("th:nth-child(2) button").click();
const column = () => [...table.tBodies[0].rows].map((row) => parseFloat(row.cells[1].textContent));
click(); found.down = column(); click(); found.up = column();
found.background = getComputedStyle(document.body).backgroundColor;
parent.document.title = JSON.stringify(found);
</script>"""


@in_a_browser
@pytest.mark.parametrize("width, light", [(1100, 1), (390, 0)], ids=["desktop", "phone, dark"])
def test_in_a_browser(page, tmp_path, width, light):
    watched = "<script>const errors = []; onerror = (said) => errors.push(said);</script>"
    probed = page.replace("<style>", f"{watched}<style>", 1).replace("</html>", f"{PROBE}</html>")
    frame = f'<iframe srcdoc="{escape(probed)}" style="border: 0; width: {width}px; height: 900px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{frame}")
    said = picture.browse(tmp_path / "frame.html", "--dump-dom", f"--blink-settings=preferredColorScheme={light}")
    found = json.loads(unescape(re.search("<title>(.*?)</title>", said)[1]))
    assert found["width"] == width and found["needs"] <= width and found["errors"] == []
    assert found["down"] == sorted(found["down"], reverse=True) and found["up"] == sorted(found["down"])
    assert found["down"][0] > found["down"][-1], "of times that differ"
    assert found["background"] == ("rgb(244, 245, 242)" if light else "rgb(20, 24, 26)")


@in_a_browser
def test_a_picture_of_it(copied, capsys):
    config, folder = copied
    assert main(["report", str(config), "--png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.png")
    with Image.open(folder / "report.png") as image:
        width, height = image.size
        assert width == 1100 and 1500 < height < 12_000, "no higher than the page"
        assert len({image.convert("RGB").getpixel((550, y)) for y in range(0, height, 7)}) > 5


def test_a_picture_needs_a_browser(finished, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="--png: needs Chromium or Chrome; none of chromium, "):
        picture.picture(finished[1] / "report.html")


@in_a_browser
def test_a_picture_of_an_empty_page_and_of_an_endless_one(tmp_path, caplog, monkeypatch):
    (tmp_path / "empty.html").write_text("<!doctype html><title>nothing</title>")
    with Image.open(picture.picture(tmp_path / "empty.html")) as image:
        assert image.size == (1100, 24)
    monkeypatch.setattr(picture, "_HIGHEST", 500)
    (tmp_path / "long.html").write_text("<!doctype html>" + "<p>a line</p>" * 200)
    with Image.open(picture.picture(tmp_path / "long.html")) as image:
        assert image.size == (1100, 500) and "long.png: its first 500 pixels" in caplog.text


def test_a_browser_that_hangs_is_ended(tmp_path, monkeypatch):
    (browser := tmp_path / "chromium").write_text("#!/bin/sh\nexec sleep 60\n")
    browser.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(picture, "_PATIENCE", 1)
    (tmp_path / "page.png").write_text("an older one")
    with pytest.raises(UserError, match="--png: .*/chromium did not end within 1 s"):
        picture.picture(tmp_path / "page.html")
    assert (tmp_path / "page.png").exists()
