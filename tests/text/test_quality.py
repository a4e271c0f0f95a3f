import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.text.duplicates import drop_near
from lightning_danube.text.quality import NEAR, Benchmarks, Filters, Quality, sketches
from lightning_danube.tokens import preparation
from lightning_danube.tokens.preparation import open_or_prepare
from lightning_danube.tokens.shards import TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer

VOCABULARY = [f"{a}{b}" for a in "bcdfghklm" for b in ("an", "el", "ir", "os", "ut", "ay")]


def prose(seed: int, words: int) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=words)


def report_of(tmp_path: Path, texts: list[str], source: dict[str, Any] | None = None, **quality: Any) -> dict[str, Any]:
    """What `prepare` says of the texts."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cache = tmp_path / "cache"
    shards, _ = open_or_prepare(
        "src",
        Source(str(path), **(source or {})),
        DocumentTokenizer("danube-small"),
        held_out=0.1,
        cache_dir=cache,
        processes=1,
        quality=Quality(**quality),
    )
    assert isinstance(shards, TokenShards)
    read: dict[str, Any] = json.loads((shards.directory / "report.json").read_text())
    assert shards.meta["counts"] == {key: read[key] for key in shards.meta["counts"]}
    return read


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (" ".join(prose(0, 60)) + ".", None),
        (" ".join(prose(0, 49)), "too few words"),
        (" ".join(prose(0, 100_001)), "too many words"),
        (" ".join(prose(0, 60)) + " 12" * 20, "too few words with letters"),
        (" ".join(prose(0, 60)) + " a# #b #c #d #e #f #g", "too many symbols"),
        ("\n".join([" ".join(prose(n, 10)) for n in range(6)] + [" ".join(prose(0, 10))] * 3), "repeated lines"),
        ("\n".join([" ".join(prose(n, 10)) for n in range(6)] + [" ".join(prose(0, 10))] * 2), None),
    ],
)
def test_rules_for_prose(text: str, rule: str | None) -> None:
    assert Filters().against(text) == rule


def test_filters_are_off_by_default_and_for_sources_that_say_so(tmp_path: Path) -> None:
    texts = [" ".join(prose(n, 60 if n % 2 else 20)) for n in range(40)]
    for number, (source, quality, left) in enumerate(
        [({}, {}, 40), ({}, {"filters": Filters()}, 20), ({"filters": False}, {"filters": Filters()}, 40)]
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        report = report_of(directory, texts, source, **quality)
        assert report["documents"] == left
        assert report["filtered"] == ({"too few words": 20} if left == 20 else {})


def test_exact_and_near_duplicates_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "UNIT_BYTES", 5_000)  # copies lie in other units
    originals = [prose(n, 200) for n in range(30)]
    # One word of 200 changed touches 5 of 196 shingles; a hundred leave no two texts alike.
    near = [[*words[:100], "changed", *words[101:]] for words in originals[:10]]
    far = [[*words[:100], *prose(99 + n, 100)] for n, words in enumerate(originals[:10])]
    texts = [" ".join(words) for words in [*originals, *originals[:5], *near, *far]]
    for deduplicate, left, gone in (
        ("none", 55, {"exact": 0, "near": 0}),
        ("exact", 50, {"exact": 5, "near": 0}),
        ("near", 40, {"exact": 5, "near": 10}),
    ):
        report = report_of(tmp_path, texts, deduplicate=deduplicate)
        assert report["documents"] == left
        assert report["duplicates"] == gone


def test_near_duplicates_are_those_of_all_pairs(tmp_path: Path) -> None:
    """Against comparing every document with every one kept before; bands may miss one pair in twenty at the border."""
    words = prose(1, 300)
    texts = [" ".join([*words[: 300 - n], *prose(n, n)]) for n in range(0, 200, 2)]
    drawn = sketches(texts)
    keep = np.ones(len(texts), dtype=bool)
    drop_near(keep, lambda: [drawn], tmp_path)
    found = (~keep).tolist()
    kept: list[int] = []
    for n in range(len(texts)):
        if all(np.mean(drawn[n] == drawn[k]) < NEAR for k in kept):
            kept.append(n)
    assert abs(sum(found) - (len(texts) - len(kept))) <= 5
    assert found[0] is False and all(found[1:8]) and not found[99]


def test_sketches_estimate_the_share_of_common_shingles() -> None:
    words = prose(2, 1000)
    pairs = [" ".join(words), " ".join([*words[:800], *prose(3, 200)])]
    # 796 shingles of 996 are common: 796 / (2·996 − 796) = 0.67. 128 permutations: standard deviation 0.042.
    left, right = sketches(pairs)
    assert np.mean(left == right) == pytest.approx(0.67, abs=3 * 0.042)


def test_benchmark_texts_are_found_and_counted(tmp_path: Path) -> None:
    long, short, tiny = prose(10, 30), prose(11, 9), prose(12, 5)
    rows = [{"question": " ".join(long), "choices": ["yes"]}, {"q": {"a": [" ".join(short)]}}, {"q": " ".join(tiny)}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist([{"question": " ".join(prose(13, 20))}]), tmp_path / "two.parquet")
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.parquet")]

    def around(words: list[str]) -> str:
        return "Before, " + ", ".join(words).upper() + "; after."

    inside = [
        around(long[5:18]),  # 13 words in a row, in other letters and with commas
        around(long[5:18]),
        around(short),
    ]
    outside = [around(long[5:17]), around(short[:8]), around(tiny), *(" ".join(prose(n, 90)) for n in range(20, 60))]
    report = report_of(tmp_path, [*inside, *outside], decontaminate=tuple(files))
    assert report["contaminated"] == 3 and report["documents"] == len(outside)
    assert report["benchmarks"] == [
        {"file": files[0], "rows": 3, "rows_too_short": 1, "rows_found": 2, "documents": 3},
        {"file": files[1], "rows": 1, "rows_too_short": 0, "rows_found": 0, "documents": 0},
    ]


def test_found_rows_are_those_of_plain_search() -> None:
    """Against sets of tuples of words."""
    texts = [prose(n, 40) for n in range(50)]
    benchmarks_of = [words[10:30] for words in texts[:20]] + [prose(500 + n, 20) for n in range(20)]
    path_rows = [{"text": " ".join(words)} for words in benchmarks_of]
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "b.jsonl")
        file.write_text("\n".join(json.dumps(row) for row in path_rows))
        benchmarks = Benchmarks.read([str(file)])
        benchmarks.save(Path(directory, "b.npz"))
        again = Benchmarks.load(Path(directory, "b.npz"))

    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + 13]) for at in range(len(words) - 12)}

    for words in texts:
        expected = [n for n, row in enumerate(benchmarks_of) if grams(row) & grams(words)]
        assert benchmarks.found_in(" ".join(words)) == again.found_in(" ".join(words)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", b"text", r"data\.decontaminate: .*b\.txt is neither jsonl nor parquet"),
        ("b.jsonl", b'{"q": \n', r"data\.decontaminate: .*b\.jsonl, row 1: not JSON"),
        ("b.jsonl", b'{"q": "too short"}\n', r"data\.decontaminate: .*b\.jsonl holds no text of at least 8 words"),
        ("b.parquet", b"PAR1", r"data\.decontaminate: .*b\.parquet is not a whole parquet file"),
    ],
)
def test_benchmark_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Benchmarks.read([str(tmp_path / name)])


@pytest.mark.parametrize(
    "text",
    [
        " ".join(prose(0, 50)),
        " ".join(["a"] * 100_000),
        " ".join([*prose(0, 80), *["12"] * 20]),
        " ".join([*prose(0, 90), *["#b"] * 10]),
        "\n".join([*(" ".join(prose(n, 10)) for n in range(7)), *[" ".join(prose(0, 10))] * 3]),
    ],
)
def test_a_text_at_a_limit_is_kept(text: str) -> None:
    assert Filters().against(text) is None


@pytest.mark.parametrize("ellipsis", ["…", "...", "#"])
def test_every_kind_of_ellipsis_is_a_symbol(ellipsis: str) -> None:
    words = prose(0, 60)
    text = " ".join([*words[:53], *(word + ellipsis for word in words[53:])])
    assert Filters().against(text) == "too many symbols"
    assert Filters(max_symbols=7 / 60).against(text) is None


def test_lines_are_compared_without_indentation_and_blank_lines() -> None:
    lines = [" ".join(prose(n, 10)) for n in range(6)]
    repeated = [*lines, *(f"  {line} " for line in lines[:3])]
    assert Filters().against("\n".join(repeated)) == "repeated lines"
    assert Filters().against("\n\n\n\n".join(lines)) is None


def test_a_benchmark_text_of_eight_words_is_searched_for_and_one_of_seven_is_not(tmp_path: Path) -> None:
    eight, seven = prose(3, 8), prose(4, 7)
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": " ".join(seven)}) + "\n" + json.dumps({"q": " ".join(eight)}))
    benchmarks = Benchmarks.read([str(tmp_path / "b.jsonl")])
    assert (benchmarks.files[0].rows, benchmarks.files[0].rows_too_short) == (2, 1)
    assert benchmarks.found_in(f"see {' '.join(eight)} there") == [1]
    assert benchmarks.found_in(f"see {' '.join(seven)} there") == []


def test_rows_are_numbered_over_all_files_of_benchmarks(tmp_path: Path) -> None:
    texts = [" ".join(prose(seed, 20)) for seed in range(6)]
    files = {"one": texts[:2], "two": texts[2:5], "three": texts[5:]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"q": row}) + "\n" for row in rows))
    benchmarks = Benchmarks.read([str(tmp_path / f"{name}.jsonl") for name in files])
    for number, text in enumerate(texts):
        assert benchmarks.found_in(text) == [number]
    assert [benchmarks.place_of(number) for number in range(6)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0),
    ]  # fmt: skip


def test_filters_count_in_the_identity_of_the_sources_that_they_apply_to(tmp_path: Path) -> None:
    plain, filtered, stricter = Quality(), Quality(filters=Filters()), Quality(filters=Filters(max_symbols=0.2))
    assert len({str(quality.identity(True)) for quality in (plain, filtered, stricter)}) == 3
    assert len({str(quality.identity(False)) for quality in (plain, filtered, stricter)}) == 1
    file = tmp_path / "b.jsonl"
    identities = []
    for words in ("one", "two"):
        file.write_text(words)
        identities.append(str(Quality(decontaminate=(str(file),)).identity(True)))
    assert identities[0] != identities[1]
