"""Every number of a filled block is the number of its file: pages and results cannot drift apart."""

import json
import re
from pathlib import Path

import pytest
import yaml

from docs.making import fill, picture, results
from docs.making.pages import pages, read
from lightning_danube.pretraining.settings import step_layout
from lightning_danube.pretraining.summary import result_text

ROOT = Path(__file__).resolve().parents[2]
FILLED = [page for page in pages() if re.search(r"^<!-- fill ", read(page), re.MULTILINE)]


def test_the_pages_with_results_are_filled_from_files() -> None:
    expected = {"README.md", "benchmarks/README.md"}
    expected |= {f"docs/{name}.md" for name in ("speed", "generation", "quickstart", "continue", "quantization")}
    assert expected <= set(FILLED)


@pytest.mark.parametrize("page", FILLED)
def test_a_page_shows_what_its_files_hold(page: str) -> None:
    text = read(page)
    assert fill.filled(page, text) == text, f"{page} differs from its sources; type: {fill.COMMAND}"


def test_a_number_that_was_changed_in_a_page_is_found() -> None:
    text = read("docs/continue.md")
    changed = text.replace("| before training | 3.0854 |", "| before training | 3.0853 |")
    assert changed != text
    assert fill.filled("docs/continue.md", changed) == text


def test_a_number_that_was_changed_in_a_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads((ROOT / "benchmarks/results/quickstart/summary.json").read_text("utf-8"))
    facts["val_loss"]["web"] += 1
    (tmp_path / "summary.json").write_text(json.dumps(facts))
    before = results.stage_losses("benchmarks/results/quickstart/summary.json")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    shown = f"{facts['val_loss']['web'] - 1:.3f}"
    assert before.count(shown) == 1
    assert results.stage_losses("summary.json") == before.replace(shown, f"{facts['val_loss']['web']:.3f}")


BLOCK = "<!-- fill {} -->\n\nx\n\n<!-- /fill -->\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLOCK.format("nothing"), r"page\.md: there is no maker 'nothing'; there are .*table"),
        (BLOCK.format("table: nowhere.md"), r"page\.md: the block 'table' reads nowhere\.md, which does not exist"),
        ("<!-- fill table: README.md -->\nx\n", r"page\.md: a block has no end"),
        ("x\n<!-- /fill -->\n", r"page\.md: a block has no end, or an end has no block"),
    ],
)
def test_a_wrong_block_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill.filled("page.md", text)


def test_every_maker_fills_a_block() -> None:
    used = {match["maker"] for page in FILLED for match in fill.BLOCK.finditer(read(page))}
    assert used == set(fill.makers())


def test_the_check_writes_nothing_and_names_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    monkeypatch.setattr(fill, "stale_pages", lambda: {"page.md": "anew"})
    monkeypatch.setattr("sys.argv", ["fill.py", "--check"])
    assert fill.main() == 1
    assert f"page.md differs from its sources; type: {fill.COMMAND}" in capsys.readouterr().out
    assert not (tmp_path / "page.md").exists()
    monkeypatch.setattr("sys.argv", ["fill.py"])
    assert fill.main() == 0
    assert (tmp_path / "page.md").read_text() == "anew"


def test_a_table_keeps_its_empty_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("text\n\n|  | b |\n| --- | --- |\n| 1 |  |\n\n| c |\n|---|\n| 2 |\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.table("a.md") == "|  | b |\n| --- | --- |\n| 1 |  |"
    assert results.table("a.md#2") == "| c |\n| --- |\n| 2 |"


def test_all_pages_quote_one_run_of_the_quickstart() -> None:
    facts = json.loads((ROOT / "benchmarks/results/quickstart/summary.json").read_text("utf-8"))
    printed = (ROOT / "benchmarks/results/quickstart/output.txt").read_text("utf-8")
    assert f"{facts['tokens']:,} tokens in {facts['steps']:,} steps" in printed
    for name, loss in facts["val_loss"].items():
        assert f"{loss:.3f}" in re.search(r"^after finish.*$", printed, re.MULTILINE)[0], name  # type: ignore[index]


TEXTS, CURVES, MAKER = r"<text[^>]*>([^<]*)</text>", r'<path d="(M[^"]*)" clip-path', r"Matplotlib v[\d.]+"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures as this version draws them."""
    folder = tmp_path_factory.mktemp("pictures")
    picture.draw(folder)
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("name", picture.FIGURES)
def test_a_picture_of_the_pages_is_drawn_from_kept_results(name: str, drawn: Path) -> None:
    for ground in ("light", "dark"):
        file = f"{name}-{ground}.svg"
        kept, new = ((folder / file).read_text("utf-8") for folder in (picture.PICTURES, drawn))
        # Another version of matplotlib may place a curve a hair further.
        same = re.findall(MAKER, kept)[0] == re.findall(MAKER, new)[0]
        for pattern in (TEXTS, CURVES) if same else (TEXTS,):
            found = re.findall(pattern, kept)
            assert found and found == re.findall(pattern, new), f"docs/pictures/{file} is old; type: {fill.COMMAND}"


def test_a_page_shows_each_picture_light_and_dark_and_says_in_words_what_it_shows() -> None:
    shown = re.compile(
        r'srcset="\S*pictures/(\S+)-dark\.svg">\s*<img src="\S*pictures/(\S+)-light\.svg" alt="([^"]{60,})">'
    )
    found = [match for page in pages() for match in shown.findall(read(page))]
    assert {dark for dark, _, _ in found} == set(picture.FIGURES)
    assert all(dark == light for dark, light, _ in found)
    kept = {path.name for path in picture.PICTURES.glob("*.svg")}
    assert kept == {f"{name}-{ground}.svg" for name in picture.FIGURES for ground in ("light", "dark")}


def test_the_kept_output_of_the_quickstart_is_what_this_version_prints_of_its_kept_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that changes its words changes the record and all pages with it."""
    kept = ROOT / "benchmarks/results/quickstart"
    printed, summary = (kept / "output.txt").read_text("utf-8"), json.loads((kept / "summary.json").read_text("utf-8"))
    sample = re.search(r"^sample: (.*)$", printed, re.MULTILINE)
    assert sample is not None
    (tmp_path / "runs/quickstart/version_0/checkpoints").mkdir(parents=True)
    (tmp_path / "runs/quickstart/version_0/checkpoints/stage_3_finish_step_00000489.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    told = result_text(
        summary, list(summary["val_loss"]), Path("runs/quickstart/version_0"), {"The function returns": sample[1]}
    )
    # The record was typed without the environment's programs on PATH.
    names = r"^(next: |      )\S*?(python -m lightning_danube|lightning-danube|tensorboard)(?= )"
    told, printed = (re.sub(names, r"\1\2", text, flags=re.MULTILINE) for text in (told, printed))
    told, printed = (text.replace("python -m lightning_danube", "lightning-danube") for text in (told, printed))
    assert printed.endswith(told + "\n")
    config = yaml.safe_load((kept / "config.yaml").read_text("utf-8"))["data"]["init_args"]
    layout = step_layout(1, 1, config["micro_batch_size"], config["context_length"])
    length = f"run: {summary['tokens']:,} tokens in {summary['steps']:,} steps of {config['batch_tokens']:,} ({layout})"
    assert f"\n{length}, into runs/quickstart/version_0\n" in printed
