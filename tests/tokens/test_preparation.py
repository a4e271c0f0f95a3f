"""`prepare` under what happens to it: kill -9, several processes, several machines, bad rows, long lines."""

import gzip
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_danube.__main__ import main
from lightning_danube.text import reading
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters, Quality
from lightning_danube.tokens import encoding, preparation
from lightning_danube.tokens.preparation import Preparation, open_or_prepare, prepare
from lightning_danube.tokens.shards import ShardFacts, TokenShards, is_held_out
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.forked import Forked

ROOT = Path(__file__).resolve().parents[2]
SMALL_UNITS = """
import sys
from lightning_danube.tokens import preparation
preparation.UNIT_BYTES, preparation.WORTH_PROCESSES = 20_000, 1
from lightning_danube.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


@pytest.fixture(scope="module")
def mistral() -> DocumentTokenizer:
    """A tokenizer that may encode a text in parts."""
    return DocumentTokenizer("mistral")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units so small that a little text has many."""
    monkeypatch.setattr(preparation, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(preparation, "WORTH_PROCESSES", 1)
    monkeypatch.setattr(preparation, "STREAMED_DOCUMENTS", 100)


def texts(count: int) -> list[str]:
    random_words = random.Random(count)
    words = [f"{stem}{end}" for stem in ("riv", "sto", "gre", "mou", "slo", "tre") for end in ("er", "ne", "en", "ing")]
    return [f"{n}. " + " ".join(random_words.choices(words, k=40)) + "\nend." for n in range(count)]


def write_jsonl(path: Path, rows: list[str]) -> None:
    data = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)


def config(directory: Path, sources: dict[str, str], extra: str = "") -> str:
    lines = "\n".join(f"      {name}: {{path: {path}}}" for name, path in sources.items())
    mix = ", ".join(f"{name}: 1" for name in sources)
    path = directory / "prepare.yaml"
    path.write_text(
        f"""
seed_everything: 3
data:
  class_path: lightning_danube.pretraining.CurriculumData
  init_args:
    tokenizer: danube-small
    context_length: 32
    batch_tokens: 256
    held_out: 0.1
    seed: ${{seed_everything}}
    cache_dir: {directory}/cache
{extra}
    sources:
{lines}
    stages: [{{name: all, tokens: 1K, mix: {{{mix}}}}}]
model: {{class_path: lightning_danube.pretraining.Pretraining}}
trainer: {{accelerator: cpu}}
"""
    )
    return str(path)


def made(cache: Path, name: str = "src") -> Path:
    (directory,) = (cache / "shards").glob(f"{name}-*")
    return directory


def content(directory: Path) -> dict[str, bytes]:
    """All that has to be the same; the report also holds seconds."""
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.name != "report.json"}


def report(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return read


def documents(directory: Path, tokenizer: DocumentTokenizer) -> list[str]:
    """Texts in the shards, training ones first."""
    found = []
    for split in ("train", "validation"):
        stream = TokenShards(directory, tokenizer).tokens(split)
        ids = stream.read(0, len(stream))
        ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
        for document in np.split(ids, ends)[:-1]:
            found.append(str(tokenizer.hf.decode(document, skip_special_tokens=True)))
    return found


def write_many_kinds(directory: Path) -> list[str]:
    """A directory with files of every kind; the texts in order."""
    directory.mkdir()
    everything = texts(2000)
    write_jsonl(directory / "a.jsonl", everything[:400])
    write_jsonl(directory / "b.jsonl.gz", everything[400:800])
    write_jsonl(directory / "c.jsonl.zst", everything[800:1200])
    rows = pa.Table.from_pylist([{"text": text, "n": n} for n, text in enumerate(everything[1200:1600])])
    pq.write_table(rows, directory / "d.parquet", row_group_size=90)
    lines = ['"' + text.replace('"', '""') + '"' for text in everything[1600:]]
    (directory / "e.csv").write_text("text\n" + "\n".join(lines) + "\n")
    return everything


def prepare_small(source: Source, tokenizer: DocumentTokenizer, cache: Path, **options: Any) -> Path:
    arguments: dict[str, Any] = {"held_out": 0.1, "processes": 1, **options}
    return open_or_prepare("src", source, tokenizer, cache_dir=cache, **arguments)[0].directory


@pytest.mark.medium
@pytest.mark.usefixtures("small_units")
def test_bytes_do_not_depend_on_processes_or_parts(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = write_many_kinds(tmp_path / "texts")
    source = Source(str(tmp_path / "texts"))
    quality = Quality(deduplicate="near", filters=Filters(min_words=5))
    one = prepare_small(source, tokenizer, tmp_path / "one", quality=quality)
    assert len(list(one.glob("train-*.arrow"))) > 3
    expected = [t for t in everything if not is_held_out(t, 0.1)] + [t for t in everything if is_held_out(t, 0.1)]
    assert documents(one, tokenizer) == expected

    several = prepare_small(source, tokenizer, tmp_path / "several", quality=quality, processes=3)
    assert content(several) == content(one)

    options: dict[str, Any] = {"held_out": 0.1, "quality": quality, "cache_dir": tmp_path / "parts"}
    for part in (3, 1, 2):
        assert not list((tmp_path / "parts").glob("shards/src-*"))
        prepare({"src": source}, tokenizer, processes=1, part=(part, 3), **options)
    assert content(made(tmp_path / "parts")) == content(one)

    monkeypatch.setattr(preparation, "UNIT_BYTES", 1 << 22)
    large = prepare_small(source, tokenizer, tmp_path / "large", quality=quality)
    assert documents(large, tokenizer) == expected and len(list(large.glob("train-*.arrow"))) == 1


@pytest.mark.medium
@pytest.mark.usefixtures("small_units")
def test_a_streamed_source_is_the_same_by_processes_and_parts(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    import datasets

    everything = texts(1000)
    datasets.Dataset.from_list([{"text": text} for text in everything]).save_to_disk(tmp_path / "saved")
    source = Source(str(tmp_path / "saved"))
    one = prepare_small(source, tokenizer, tmp_path / "one")
    assert sorted(documents(one, tokenizer)) == sorted(everything)
    assert content(prepare_small(source, tokenizer, tmp_path / "two", processes=2)) == content(one)
    options: dict[str, Any] = {"held_out": 0.1, "quality": Quality(), "cache_dir": tmp_path / "parts"}
    for part in (2, 1):
        prepare({"src": source}, tokenizer, processes=1, part=(part, 2), **options)
    assert content(made(tmp_path / "parts")) == content(one)


@pytest.mark.medium
@pytest.mark.usefixtures("small_units")
def test_max_tokens_ends_with_the_document_that_reaches_it(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "many.jsonl"
    write_jsonl(path, texts(2000))
    source = Source(str(path), max_tokens="50K")
    one = prepare_small(source, tokenizer, tmp_path / "one")
    longest = max(map(len, tokenizer.encode_documents(texts(2000))))
    assert 50_000 <= report(one)["tokens"] < 50_000 + longest
    assert content(prepare_small(source, tokenizer, tmp_path / "two", processes=3)) == content(one)
    options: dict[str, Any] = {"held_out": 0.1, "quality": Quality(), "cache_dir": tmp_path / "parts"}
    for part in (1, 2):
        prepare({"src": source}, tokenizer, processes=1, part=(part, 2), **options)
    assert content(made(tmp_path / "parts")) == content(one)


def start(tmp_path: Path, *arguments: str) -> Forked:
    """A `prepare` in a separate process, with small units."""
    return Forked(["prepare", *arguments], tmp_path / "output.txt", tmp_path, program=SMALL_UNITS)


def kill_when(process: Forked, units: Path, count: int) -> int:
    """kill -9 once so many units are there; how many there were."""
    deadline = time.monotonic() + 120
    while len(list(units.glob("*/unit.npz"))) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    return len(list(units.glob("*/unit.npz")))


@pytest.mark.medium
@pytest.mark.parametrize(("processes", "moments"), [(1, [30]), pytest.param(2, [1, 7, 20, 45], marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small_units")
def test_kill_9_and_start_again_gives_the_same_bytes(
    tmp_path: Path, tokenizer: DocumentTokenizer, processes: int, moments: list[int]
) -> None:
    texts_there = tmp_path / "texts"
    texts_there.mkdir()
    write_jsonl(texts_there / "a.jsonl", texts(8000))
    write_jsonl(texts_there / "b.jsonl.gz", texts(4000))
    path = config(tmp_path, {"src": str(texts_there)})
    arguments = ("--config", path, "--processes", str(processes))
    for moment in moments:
        process = start(tmp_path, *arguments)
        deadline = time.monotonic() + 120
        while not (found := list((tmp_path / "cache").glob("shards/.src-*.building/units"))):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        kept = kill_when(process, found[0], moment)
        assert not list((tmp_path / "cache").glob("shards/src-*")), "it was killed too late to prove anything"
    before = {file: file.stat().st_mtime_ns for file in found[0].glob("*/unit.npz")}
    assert len(before) >= kept >= moments[-1]
    process = start(tmp_path, *arguments)
    assert process.wait(timeout=120) == 0, (tmp_path / "output.txt").read_text()
    assert content(made(tmp_path / "cache")) == content(
        prepare_small(Source(str(texts_there)), tokenizer, tmp_path / "whole")
    )
    assert report(made(tmp_path / "cache"))["documents"] == 12_000
    assert [file.name for file in (tmp_path / "cache" / "shards").iterdir()] == [made(tmp_path / "cache").name]


@pytest.mark.usefixtures("small_units")
def test_finished_units_are_not_made_again(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "many.jsonl"
    write_jsonl(path, texts(1000))
    source, asked = Source(str(path)), []
    make_unit = preparation.make_unit

    def fails_at_the_fifth(job: Any, number: int, rows: Any) -> tuple[int, int]:
        asked.append(number)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return make_unit(job, number, rows)

    monkeypatch.setattr(preparation, "make_unit", fails_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        prepare_small(source, tokenizer, tmp_path / "cache")
    prepare_small(source, tokenizer, tmp_path / "cache")
    assert asked[:6] == [0, 1, 2, 3, 4, 4] and asked[5:] == list(range(4, asked[-1] + 1))
    assert report(made(tmp_path / "cache"))["documents"] == 1000


@pytest.mark.usefixtures("small_units")
def test_progress_names_rates_and_the_time_left(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preparation._Progress, "EVERY", 0.0)
    write_jsonl(tmp_path / "many.jsonl", texts(300))
    prepare_small(Source(str(tmp_path / "many.jsonl")), tokenizer, tmp_path / "cache")
    lines = capsys.readouterr().err.splitlines()
    number, rates = r"[\d,]+", r"\([\d,]+ documents/s, [\d,]+ tokens/s\), \d+ s left"
    found = [re.fullmatch(rf"tokenizing src: (\d+)%, ({number}) documents, {number} tokens {rates}", x) for x in lines]
    assert len(found) > 2 and all(found)
    assert [match[1] for match in found if match][-1] == "100" and [match[2] for match in found if match][-1] == "300"


@pytest.mark.medium
@pytest.mark.usefixtures("small_units")
def test_skipped_rows_are_counted_and_kept_aside(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    good = texts(300)
    lines: list[bytes] = [json.dumps({"text": text}).encode() for text in good]
    lines[100:100] = [b'{"text": ', b'{"text": "\xff"}', b'{"text": 5}', b'{"body": "b"}', b'"text"']
    lines.append(b'{"text": "\\ud83d"}')
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    one = prepare_small(Source(str(path), on_bad_row="skip"), tokenizer, tmp_path / "one")
    assert sorted(documents(one, tokenizer)) == sorted(good)
    counts = {"no such column": 1, "not JSON": 1, "not UTF-8": 2, "not an object": 1, "not text": 1}
    assert report(one)["rejected"] == counts
    rejected = [json.loads(line) for line in (one / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rejected] == [(str(path), n) for n in (101, 102, 103, 104, 105, 306)]
    assert report(one)["first_rejected"][0] == f"{path}, row 101: not JSON (Expecting value at character 11)"
    two = prepare_small(Source(str(path), on_bad_row="skip"), tokenizer, tmp_path / "two", processes=2)
    assert content(two) == content(one)
    path.write_bytes(b"\n".join(lines[:100] + lines[105:]) + b"\n")
    # The last row of the last unit, told by a process of a pool.
    with pytest.raises(ValueError, match=r"a\.jsonl, row 301: column 'text' holds half a surrogate pair \(\\ud83d\)"):
        prepare_small(Source(str(path)), tokenizer, tmp_path / "three", processes=2)


def test_skipping_goes_on_behind_bad_csv(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,id\ngood one,1\nbad,2,3\n\xff,4\n"quoted"x,5\ngood two,6\n')
    directory = prepare_small(Source(str(path), on_bad_row="skip"), tokenizer, tmp_path / "one", held_out=0.5)
    assert sorted(documents(directory, tokenizer)) == ["good one", "good two"]
    assert report(directory)["rejected"] == {"not CSV": 2, "not UTF-8": 1}


def test_rows_that_python_cannot_read_or_print_are_set_aside(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "a.jsonl"
    number, deep = "7" * 5000, "[" * 5000 + "]" * 5000
    path.write_text(
        f'{{"text": "good one"}}\n{{"text": "x", "n": {number}}}\n{{"text": "x", "n": {deep}}}\n'
        '{"te\\udc00t": "x"}\n{"text": "good two"}\n'
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2: not JSON \(a whole number of more than 4,300 digits\)"):
        prepare_small(Source(str(path)), tokenizer, tmp_path / "none", held_out=0.5)
    directory = prepare_small(Source(str(path), on_bad_row="skip"), tokenizer, tmp_path / "one", held_out=0.5)
    assert sorted(documents(directory, tokenizer)) == ["good one", "good two"]
    assert report(directory)["rejected"] == {"no such column": 1, "not JSON": 2}
    rejected = (directory / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["row"] for line in rejected] == [2, 3, 4]
    assert "only te\\udc00t" in json.loads(rejected[2])["message"]


def test_a_long_document_is_cut_at_white_space(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(preparation, "UNIT_BYTES", 3000)  # so a document goes through several units
    long = " ".join(texts(100)).replace("\n", " ").replace("r", "ü")
    for name in ("a.txt", "a.jsonl"):
        if name == "a.txt":
            (tmp_path / name).write_text(long)
        else:
            write_jsonl(tmp_path / name, [long])
        rows = list(reading.read_file(str(tmp_path / name), "text", None))
        pieces = [row.text for row in rows if isinstance(row, reading.Document)]
        assert "".join(pieces) == long and len(pieces) > 20
        assert all(len(piece.encode()) <= 1000 for piece in pieces)
        assert all(piece.endswith(" ") for piece in pieces[:-1])
        assert {row.row for row in rows} == {1}
        directory = prepare_small(Source(str(tmp_path / name)), tokenizer, tmp_path / f"cache-{name}", held_out=0.3)
        assert report(directory)["pieces_of_long_documents"] == len(pieces) - 1
    assert reading.cut("ü" * 1000) == ["ü" * 500, "ü" * 500]
    assert reading.cut("ü" + "aü" * 500) == ["ü" + "aü" * 332 + "a", "ü" + "aü" * 167]


def test_two_at_the_same_source_end_well_whoever_is_first(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two nodes of one run: when the second comes to join its units, the first has joined and cleared up."""
    (tmp_path / "a.txt").write_text("a river\nstones\n")
    finish = preparation._Workshop._finish
    options: dict[str, Any] = {"held_out": 0.1, "quality": Quality(), "cache_dir": tmp_path / "cache"}

    def the_only_part() -> None:
        prepare({"src": Source(str(tmp_path / "a.txt"))}, tokenizer, processes=1, part=(1, 1), **options)

    def after_another(workshop: Any, mine: Preparation) -> None:
        monkeypatch.setattr(preparation._Workshop, "_finish", finish)
        the_only_part()
        assert not mine.building.exists()
        finish(workshop, mine)

    monkeypatch.setattr(preparation._Workshop, "_finish", after_another)
    the_only_part()
    directory = made(tmp_path / "cache")
    assert report(directory)["documents"] == 1 and not list(directory.parent.glob(".*"))


def test_a_second_process_waits_for_the_shards_of_the_first(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs that begin at once on one cache: a mistake in the texts made one remove the units of the other."""
    (tmp_path / "a.txt").write_text("a river\nstones\n")
    source, make_unit, lines = Source(str(tmp_path / "a.txt")), preparation.make_unit, list[str]()
    second: list[Future[Path]] = []

    def told(line: str) -> None:
        lines.append(line)
        waits.set()

    def make(*arguments: Any) -> Any:
        made_units.append(arguments[1])
        if len(made_units) == 1:
            second.append(pool.submit(prepare_small, source, tokenizer, tmp_path / "cache"))
            assert waits.wait(60)
        return make_unit(*arguments)

    waits, made_units = threading.Event(), list[int]()
    monkeypatch.setattr(preparation, "make_unit", make)
    monkeypatch.setattr(preparation, "tell", told)
    with ThreadPoolExecutor(1) as pool:
        directory = prepare_small(source, tokenizer, tmp_path / "cache")
        assert second[0].result(60) == directory
    assert made_units == [0] and not list(directory.parent.glob(".*"))
    lock = directory.with_name(f".{directory.name}.lock")
    assert lines == [
        f"source 'src' ({lock}) is in use by process {os.getpid()} on {socket.gethostname()}: waiting until it ends"
    ]


def test_long_texts_are_encoded_in_parts_without_a_trace(
    tmp_path: Path, mistral: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_PART_CHARACTERS", 7)
    facts = ShardFacts("src", Source("x.txt"), mistral, 0.1, Quality(), tmp_path)
    preparation = Preparation(tmp_path / "shards", facts)
    preparation.open(None)
    job = preparation.job
    assert job.in_parts
    monkeypatch.setattr(encoding, "gigatoken_encoder", lambda tokenizer_json: None)
    drawn = random.Random(0)
    alphabet = [" ", " ", "  ", "▁", "\n", "\t", "river", "stone ", "</s>", "é", "日本", "\u200b", "🙂", "a" * 30, "."]
    long = ["".join(drawn.choices(alphabet, k=drawn.randrange(200))) for _ in range(300)]
    long += ["", " ", "x" * 100, " " * 100, "word " * 20, " word" * 20, "▁ " * 30]
    assert sum(len(encoding._parts(text)) > 3 for text in long) > 200
    for text, ids, expected in zip(
        long,
        encoding.TextEncoder(job.tokenizer_file.read_text(), job.in_parts).encode(long),
        mistral.encode_documents(long),
        strict=True,
    ):
        assert [mistral.bos_id, *ids, mistral.eos_id] == expected.tolist(), text


def test_only_a_tokenizer_without_pieces_over_a_space_encodes_in_parts(mistral: DocumentTokenizer) -> None:
    whole = json.loads(mistral.hf.backend_tokenizer.to_str())
    assert encoding.can_encode_in_parts(json.dumps(whole))
    pieces = {**whole["model"]["vocab"], "of▁the": 40_000}
    for change in (
        {"model": {**whole["model"], "vocab": pieces}},
        {"model": {**whole["model"], "type": "Unigram"}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}},
        {"added_tokens": [{**whole["added_tokens"][0], "special": False}]},
    ):
        assert not encoding.can_encode_in_parts(json.dumps(whole | change))


def test_rows_without_end_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_ROW", 1 << 20)
    monkeypatch.setattr(reading, "LONGEST_ARRAY", 1 << 20)
    long = "word " * 300_000
    write_jsonl(tmp_path / "a.jsonl", ["short", long, "also short"])
    (tmp_path / "a.csv").write_text(f"text\nshort\n{long}\nalso short\n")
    for name, place in (("a.jsonl", "row 2"), ("a.csv", "line 3")):
        rows = list(reading.read_file(str(tmp_path / name), "text", None))
        (bad,) = (row for row in rows if isinstance(row, reading.BadRow))
        assert bad.cause == "too long"
        assert f"{name}, {place}: longer than 1 MiB, the most a row may have" in bad.message
        assert [row.text for row in rows if isinstance(row, reading.Document)] == ["short", "also short"]
    (tmp_path / "a.json").write_text(json.dumps([{"text": long}]))
    with pytest.raises(
        ValueError, match=r"a\.json is one JSON array of more than 1 MiB.*write it as one object a line"
    ):
        list(reading.read_file(str(tmp_path / "a.json"), "text", None))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_a_single_line(tmp_path: Path) -> None:
    """200 MB without a line break: memory stays below that of the libraries (about 500 MB) and a few units."""
    line = (" ".join(texts(2000)).replace("\n", " ") + " ").encode()
    with open(tmp_path / "a.txt", "wb") as file:
        while file.tell() < 200_000_000:
            file.write(line)
    path = config(tmp_path, {"src": str(tmp_path / "a.txt")})
    # Not ru_maxrss of itself: that begins with the size of the process that forked it, which is this one's.
    watched = (
        "import re, resource, sys; from lightning_danube.__main__ import main; code = main(sys.argv[1:]);"
        "own = int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]);"
        "peak = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
        "print('peak', peak // 1024); sys.exit(code)"
    )
    arguments = ["prepare", "--config", path, "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "-c", watched, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split("peak ")[1])
    assert peak < 900, f"{peak} MiB"


def test_prepare_then_fit_starts_at_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_file = str(tiny / "tiny.yaml")
    assert main(["prepare", "--config", config_file]) == 0
    printed = capsys.readouterr().out
    assert "web" in printed and "bytes/token" in printed
    before = {file: file.stat().st_mtime_ns for file in (tiny / "cache").rglob("*")}
    assert main(["fit", "--config", config_file, "--trainer.max_steps", "1"]) == 0
    assert {file: file.stat().st_mtime_ns for file in (tiny / "cache").rglob("*")} == before
    assert main(["prepare", "--config", config_file, "--verify"]) == 0
    assert "files hold what was written" in capsys.readouterr().out


def test_the_command_says_what_the_other_parts_have_to_do(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), "--shard", "2/2"]) == 0
    assert "web: part 2 of 2 is made; 1 of 1 units are left to --shard 1/2" in capsys.readouterr().err
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), "--shard", "1/2"]) == 0
    assert "wiki" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/2"], "--shard is '3/2': give part and parts, counted from 1, such as 2/8"),
        (["--shard", "0/2"], "--shard is '0/2'"),
        (["--shard", "half"], "--shard is 'half'"),
        (["--verify", "--shard", "1/2"], "--verify checks whole shards: leave out --shard"),
        (["--verify"], "source 'web' has no shards at "),
        (["--processes", "0"], "--processes is 0: give 1 to "),
        (["--data.init_args.processes", "0"], "--data.init_args.processes is 0: give 1 to "),
        (
            ["--data.init_args.helt_out", "0.1"],
            "'helt_out' is not an option of CurriculumData: did you mean 'held_out'?",
        ),
        (["--data.init_args.deduplicate", "fuzzy"], "--data.init_args.deduplicate: expected one of"),
        (["--data.init_args.filters.min_words", "-1"], "--data.init_args.filters.min_words is -1, max_words 100000"),
        (
            ["--data.init_args.filters.min_alphabetic", "2"],
            "--data.init_args.filters.min_alphabetic is 2.0: give a share",
        ),
        (
            ["--data.init_args.filters.max_symbols", "-1"],
            "--data.init_args.filters.max_symbols is -1.0: it must not be negative",
        ),
        (
            ["--data.init_args.decontaminate", "[nowhere.jsonl]"],
            "--data.init_args.decontaminate: there is no file nowhere.jsonl",
        ),
        (
            ["--data.init_args.decontaminate", "[/]"],
            "data.decontaminate names /, which cannot be read: Is a directory",
        ),
        (["--nonsense", "1"], "--nonsense"),
    ],
)
def test_mistakes_are_told_in_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["prepare", "--config", str(tiny / "tiny.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_mistakes_in_the_file_are_told_in_one_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny / "tiny.yaml"
    whole = path.read_text()
    for wrong, right, message in (
        ("context_lenght:", "context_length:", "'context_lenght' is not an option of CurriculumData"),
        (
            "pretraining.CurriculumDat\n",
            "pretraining.CurriculumData\n",
            "there is no class 'CurriculumDat' in lightning_danube.pretraining",
        ),
        (
            "{path: nothing.jsonl}",
            f"{{path: {tiny}/web.jsonl}}",
            "data.sources.web.path: there is no file nothing.jsonl",
        ),
        ("finnish: 3\ndata:\n", "data:\n", "finnish"),
    ):
        assert right in whole
        path.write_text(whole.replace(right, wrong, 1))
        assert main(["prepare", "--config", str(path)]) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert main(["prepare", "--config", str(tiny / "nowhere.yaml")]) == 2
    assert f"there is no config file {tiny}/nowhere.yaml" in capsys.readouterr().err
    assert main(["prepare"]) == 2
    assert "the following arguments are required: --config" in capsys.readouterr().err
    path.write_text("data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}")
    assert main(["prepare", "--config", str(path)]) == 2
    assert "data is BoringDataModule, which reads its files when it runs" in capsys.readouterr().err


@pytest.mark.medium
@pytest.mark.usefixtures("small_units")
def test_a_process_ended_from_outside_is_named(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    from concurrent.futures.process import BrokenProcessPool

    path = tmp_path / "many.jsonl"
    write_jsonl(path, texts(300))

    def broken(*_: Any) -> Any:
        raise BrokenProcessPool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "make_unit", broken)
        with pytest.raises(ValueError, match="a process that tokenizes was ended from outside"):
            prepare_small(Source(str(path)), tokenizer, tmp_path / "cache")
    assert report(prepare_small(Source(str(path)), tokenizer, tmp_path / "cache"))["documents"] == 300
