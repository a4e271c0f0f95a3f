"""The page about runs: complete, self-contained, and shown by a real browser as it is meant to be."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from lightning_danube.__main__ import main
from lightning_danube.reports.run_page import _differing_settings, markdown_html, page_of_runs
from lightning_danube.reports.runs import RecordedRun, read_run_of_any_task

PROBE = """<script>
const wide = document.documentElement.scrollWidth, images = [...document.images];
document.title = JSON.stringify({images: images.length, drawn: images.filter(one => one.naturalWidth > 0).length,
  overflow: wide - window.innerWidth, headings: [...document.querySelectorAll("h2")].map(one => one.textContent)});
</script></body>"""


def test_a_page_of_one_run(recorded: RecordedRun) -> None:
    history = [
        {"time": "2026-01-01T10:00:00", "step": 0, "devices": 1, "differences": {}, "versions": {}, "commit": "a" * 40},
        {"time": "2026-01-02T10:00:00", "step": 4, "devices": 2, "differences": {"data.workers": [0, 2]}},
    ]
    page = page_of_runs([dataclasses.replace(recorded, history=history)])
    assert not re.search(r"""(src|href)="(?!data:|#)|url\(|@import|<script""", page)
    assert "data.workers: 0 → 2" in page and "a" * 12 in page and "a" * 13 not in page
    assert "The river was\n  long" in page and "after 600 tokens" in page
    for what in ("Training loss over tokens", "The mix of each stage", "Held-out loss by source"):
        assert f'alt="{what}' in page
    assert 'class="missing"' not in page


def test_what_a_run_lacks_is_one_line_each(recorded: RecordedRun) -> None:
    empty = dataclasses.replace(recorded, curves=pd.DataFrame(), summary={}, texts={}, problems=["there is no …"])
    page = page_of_runs([empty])
    assert page.count('class="missing"') == len(re.findall(r'<p class="missing">[^\n]*</p>', page)) > 5
    assert "Missing: there is no …" in page and "logged no loss/train" in page and "<img" not in page


def test_runs_side_by_side(recorded: RecordedRun) -> None:
    config = {**recorded.config, "seed_everything": 7}
    other = dataclasses.replace(recorded, directory=Path("runs/other/version_3"), config=config)
    page = page_of_runs([recorded, other])
    settings = page.partition(">Settings that differ</h2>")[2].partition("</section>")[0]
    (row,) = re.findall(r"<tbody>(.*?)</tbody>", settings)
    assert re.findall(r">([^<]+)<", row) == ["seed_everything", "–", "7"]
    assert "Run 2: runs/other/version_3" in page
    assert 'alt="curves loss/…"' in page and 'alt="curves optimizer/…"' in page
    assert _differing_settings([recorded, recorded]) == "<p>The runs have the same settings.</p>"


def test_values_that_were_logged_once_are_a_table(recorded: RecordedRun) -> None:
    curves = pd.DataFrame({"loss/train": [2.0, 1.0], "accuracy/test": [float("nan"), 0.25]}, index=[1, 2])
    config = {"model": {"class_path": "a.b.TextClassification"}, "data": {"class_path": "a.b.Data"}}
    page = page_of_runs([dataclasses.replace(recorded, config=config, curves=curves, texts={})])
    assert re.search(r"<th>accuracy/test</th><td>0.25</td>", page) and "<td>TextClassification" not in page
    assert page.count("<img") == 1


def test_the_text_of_a_run_stays_text(recorded: RecordedRun) -> None:
    texts = {"samples/1": {4: "    <script>alert(1)</script>"}, "answers/1": {4: "<b>bold</b> `<i>`"}}
    page = page_of_runs([dataclasses.replace(recorded, texts=texts)])
    assert "<script" not in page and "<b>" not in page and "<code>&lt;i&gt;</code>" in page


def test_damaged_files_are_named(recorded: RecordedRun, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: mine\ndata:\nmodel:\n")
    (tmp_path / "summary.json").write_text('{"tok')
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"st\n')
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"no events")
    run = read_run_of_any_task(tmp_path)
    assert [problem.partition(" (")[0] for problem in run.problems] == [
        "summary.json is damaged",
        "history.jsonl is damaged",
    ]
    assert "summary.json is damaged" in page_of_runs([run])


def test_the_markdown_of_reports() -> None:
    text = "# Of `x`\n\n| a | b |\n| --- | ---: |\n| 1\\|2 | <3> |\n\n- one\n- two\n\n    code\n      more\n\n"
    text += "some\nwords\n"
    assert markdown_html(text).replace("\n\n", "\n") == (
        "<h3>Of <code>x</code></h3>\n"
        '<div class="scroll"><table><tr><th>a</th><th>b</th></tr>'
        "<tr><td>1|2</td><td>&lt;3&gt;</td></tr></table></div>\n"
        "<ul><li>one</li><li>two</li></ul>\n<pre>code\n  more</pre>\n<p>some words</p>"
    )


@pytest.mark.medium
def test_a_browser_shows_the_page(tiny_run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser: apt-get install chromium")
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    assert main(["report", str(tiny_run), "--output", str(one)]) == 0
    assert main(["report", str(tiny_run), str(tiny_run), "--output", str(two)]) == 0
    for file, heading in ((one, "Stages and held-out loss"), (two, "Settings that differ")):
        file.write_text(file.read_text("utf-8").replace("</body>", PROBE), "utf-8")
        for width in (1200, 500):
            options = [
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync", f"--window-size={width},900"),
                f"--user-data-dir={tmp_path / f'{file.stem}-{width}'}",
            ]
            command = [browser, *options, "--dump-dom", file.as_uri()]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
            title = re.search(r"<title>(.*?)</title>", done.stdout)
            assert title is not None
            seen = json.loads(title[1].replace("&amp;", "&"))
            assert seen["images"] == seen["drawn"] > 3
            assert seen["overflow"] <= 0, f"the page is wider than {width} pixels"
            assert heading in seen["headings"]
