"""docs/making/typed.py types the commands of a page and keeps what they print."""

import subprocess
from pathlib import Path

import pytest

from docs.making import fill, results, typed
from docs.making.pages import read

PAGE = """
```
echo one
printf 'two\\nthree\\n' >&2
```

<!-- fill typed: benchmarks/results/typed/page.txt#1 -->

```
one
```

<!-- /fill -->

```yaml
no: command
```

```
cat > file.txt <<'END'

> inside
END
cat file.txt
```
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "clone"
    directory.mkdir()
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "-q"], cwd=directory, check=True)
    subprocess.run(["git", *who, "commit", "-q", "--allow-empty", "-m", "x"], cwd=directory, check=True)
    monkeypatch.setattr(typed, "read", lambda page: PAGE)
    monkeypatch.setattr(typed, "FOLDER", tmp_path / "kept")
    return directory


def test_blocks_of_commands_are_read_from_a_page(clone: Path) -> None:
    assert [block.splitlines()[0] for block in typed.blocks("page.md")] == ["echo one", "cat > file.txt <<'END'"]


def test_what_was_printed_is_kept_and_read_again(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["typed.py", "docs/page.md", "--clone", str(clone)])
    typed.main()
    found = typed.records(tmp_path / "kept" / "page.txt")
    assert found[1].commands == "echo one\nprintf 'two\\nthree\\n' >&2"
    assert found[1].printed == "one\ntwo\nthree"
    assert found[2].commands.splitlines()[1:3] == ["", "> inside"]
    assert found[2].printed == "> inside"
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.typed("kept/page.txt#1") == "```text\none\ntwo\nthree\n```"
    assert results.typed("kept/page.txt#1", "two", "two") == "```text\n…\ntwo\n…\n```"
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    block = "<!-- fill typed: kept/page.txt#1 two t -->\n\n{}\n\n<!-- /fill -->\n"
    assert fill.filled("page.md", block.format("x")) == block.format("```text\n…\ntwo\n…\n```")
    assert results.typed_on("kept/page.txt").startswith("(Recorded: 20")
    with pytest.raises(ValueError, match=r"kept/page\.txt#1: no line begins with 'of two'"):
        results.typed("kept/page.txt#1", "of_two")


def test_a_block_that_is_typed_again_takes_the_place_of_its_record(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept" / "page.txt"
    kept.parent.mkdir()
    old = {n: typed.Record(n, "echo old", "old", 1, "2020-01-01, commit a, machine") for n in (1, 2)}
    kept.write_text(typed.written(old), "utf-8")
    monkeypatch.setattr("sys.argv", ["typed.py", "docs/page.md", "--clone", str(clone), "--blocks", "1"])
    typed.main()
    found = typed.records(kept)
    assert found[1].printed == "one\ntwo\nthree" and found[2] == old[2]


def test_a_block_that_fails_is_not_kept(clone: Path) -> None:
    with pytest.raises(ValueError, match=r"block 3 ended with exit code 4:\necho a"):
        typed.type_block(3, "echo a | cat\nexit 4", clone)
    with pytest.raises(ValueError, match="which no page should hold"):
        typed.type_block(3, "pwd", clone)


def test_a_record_says_whether_the_clone_was_changed_apart_from_records(clone: Path) -> None:
    kept, code = clone / typed.RECORDS / "page.txt", clone / "code.py"
    kept.parent.mkdir(parents=True)
    for file in (kept, code):
        file.touch()
    subprocess.run(["git", "add", "."], cwd=clone, check=True)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "commit", "-q", "-m", "x"], cwd=clone, check=True)
    kept.write_text("x", "utf-8")
    assert " with changes" not in typed.type_block(1, "echo", clone).where
    code.write_text("x", "utf-8")
    assert " with changes" in typed.type_block(1, "echo", clone).where


def test_colours_and_lines_that_are_written_over_are_left_out(clone: Path) -> None:
    assert typed.type_block(1, r"printf 'a \033[31mred\033[0m\n10 %%\r20 %%\rdone\n'", clone).printed == "a red\ndone"


def test_numbers_of_blocks() -> None:
    assert typed.numbers("2,4-6") == [2, 4, 5, 6]


def test_what_a_page_shows_was_printed_by_the_commands_above_it() -> None:
    """A page whose commands were changed has to be typed again."""
    for kept in sorted(typed.FOLDER.glob("*.txt")):
        page = f"docs/{kept.stem}.md"
        shown = dict(enumerate(typed.blocks(page), start=1))
        for number, record in typed.records(kept).items():
            assert shown.get(number, "").strip() == record.commands.strip(), f"{page}: type block {number} again"
        text = read(page)
        for number in typed.records(kept):
            assert f"{kept.stem}.txt#{number}" in text or not typed.records(kept)[number].printed, f"{page}: {number}"
