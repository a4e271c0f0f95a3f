"""datatrove makes the same shards as the own engine, except where near-duplicates form chains; it continues a kill."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_danube.__main__ import main
from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import BANDS, Filters, Quality, sketches
from lightning_danube.tokens.engines import ENGINES
from lightning_danube.tokens.engines.source_work import Cluster
from lightning_danube.tokens.preparation import prepare
from lightning_danube.tokens.shards import ShardFacts, TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.weights.tokenizers import document_tokenizer

pytestmark = pytest.mark.datatrove

ROOT = Path(__file__).resolve().parents[3]
WORDS = [f"{stem}{end}" for stem in ("riv", "sto", "gre", "mou", "slo", "tre") for end in ("er", "ne", "en", "ing")]
HELD_OUT = 0.1


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return document_tokenizer("danube-small")


def texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    choose = random.Random(seed)
    return [f"{n} " + " ".join(choose.choices(WORDS, k=words)) for n in range(count)]


def write_rows(folder: Path, rows: list[str], files: int = 4) -> Path:
    """Writes rows in order to files of three formats."""
    folder.mkdir(parents=True)
    for number in range(files):
        own = rows[len(rows) * number // files : len(rows) * (number + 1) // files]
        if number % 3 == 0:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in own))
        elif number % 3 == 1:
            pq.write_table(pa.table({"text": own}), folder / f"{number}.parquet", row_group_size=7)
        else:
            (folder / f"{number}.csv").write_text("text\n" + "".join(f'"{row}"\n' for row in own))
    return folder


def by_datatrove(
    source: Source, tokenizer: DocumentTokenizer, cache: Path, quality: Quality | None = None, **cluster: Any
) -> TokenShards:
    from lightning_danube.tokens.engines.datatrove_engine import prepare_with_datatrove

    quality = quality or Quality()
    options: dict[str, Any] = {"held_out": HELD_OUT, "quality": quality, "cache_dir": cache}
    where = Cluster(**{"workers": 1, **cluster})
    seconds = prepare_with_datatrove({"src": source}, tokenizer, cluster=where, **options)
    directory = ShardFacts("src", source, tokenizer, HELD_OUT, quality, cache).directory()
    assert seconds["src"] > 0 and sorted(os.listdir(directory.parent)) == [directory.name]
    shards = TokenShards(directory, tokenizer)
    shards.verify()
    return shards


def by_own(source: Source, tokenizer: DocumentTokenizer, cache: Path, quality: Quality | None = None) -> TokenShards:
    quality = quality or Quality()
    options: dict[str, Any] = {"held_out": HELD_OUT, "quality": quality, "cache_dir": cache}
    prepare({"src": source}, tokenizer, processes=1, **options)
    return TokenShards(ShardFacts("src", source, tokenizer, HELD_OUT, quality, cache).directory(), tokenizer)


def ids(shards: TokenShards) -> dict[str, list[int]]:
    streams = {split: shards.tokens(split) for split in ("train", "validation")}
    return {split: stream.read(0, len(stream)).tolist() for split, stream in streams.items()}


def kept(shards: TokenShards, tokenizer: DocumentTokenizer) -> set[str]:
    found = set()
    for stream in ids(shards).values():
        ends = np.flatnonzero(np.array(stream) == tokenizer.eos_id) + 1
        found |= {str(tokenizer.hf.decode(own, skip_special_tokens=True)) for own in np.split(stream, ends)[:-1]}
    return found


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    path = tmp_path / "benchmark.jsonl"
    rows = [{"question": " ".join(f"asked{n}x{k}" for k in range(14))} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("deduplicate", ["none", "exact"])
@pytest.mark.parametrize("tasks", [1, 3, None])
def test_the_tokens_and_counts_are_those_of_the_own_engine(
    deduplicate: Any, tasks: int | None, tmp_path: Path, tokenizer: DocumentTokenizer, benchmark: str
) -> None:
    """For every number of tasks: the files are dealt in blocks, and of equal texts the first one stays."""
    rows = texts(90)
    asked = " ".join(f"asked1x{k}" for k in range(14))
    rows = [*rows[:30], "too short", f"before {asked} after " + rows[0], *rows[30:], *rows[5:20], *rows[40:50]]
    folder = write_rows(tmp_path / "texts", rows)
    with (folder / "0.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    source = Source(str(folder), on_bad_row="skip")
    quality = Quality(deduplicate=deduplicate, filters=Filters(min_words=5), decontaminate=(benchmark,))
    ours = by_own(source, tokenizer, tmp_path / "own", quality)
    shards = by_datatrove(source, tokenizer, tmp_path / "trove", quality, tasks=tasks)
    assert ids(shards) == ids(ours)
    assert shards.meta["counts"] == ours.meta["counts"]
    assert shards.meta["counts"]["duplicates"] == {"exact": 25 if deduplicate == "exact" else 0, "near": 0}
    assert shards.meta["counts"]["filtered"] == {"too few words": 1}
    assert shards.meta["counts"]["contaminated"] == 1
    assert shards.directory.name == ours.directory.name
    rejected = "rejected.jsonl"
    assert (shards.directory / rejected).read_text() == (ours.directory / rejected).read_text()
    files = [file["name"] for file in shards.meta["splits"]["train"]["files"]]
    assert files == [f"train-{task << 20:05d}.arrow" for task in range(tasks or 4)]


def components(found: list[str]) -> list[set[str]]:
    """Sets of texts of which each shares a whole band of its sketch with another one, found by comparing all pairs."""
    bands = np.stack(np.split(sketches(found), BANDS, axis=1), axis=1)
    groups = [{number} for number in range(len(found))]
    for one in range(len(found)):
        for other in range(one):
            if (bands[one] == bands[other]).all(axis=1).any() and groups[one] is not groups[other]:
                groups[one] |= groups[other]
                for member in groups[one]:
                    groups[member] = groups[one]
    return [{found[member] for member in group} for group in {id(group): group for group in groups}.values()]


def test_one_document_of_each_cluster_of_near_duplicates_stays(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    """Chains are clusters, too: each text differs from the one before by a few words, and the last from the first."""
    rows = texts(40, words=60)
    for first in rows[:6]:
        words = first.split()
        for step in range(5):
            words[10 * step + 3] = f"new{step}"
            rows.append(" ".join(words))
    random.Random(1).shuffle(rows)
    source = Source(str(write_rows(tmp_path / "texts", rows + rows[:5])))
    quality = Quality(deduplicate="near")
    shards = by_datatrove(source, tokenizer, tmp_path / "trove", quality, tasks=3)
    found, groups = kept(shards, tokenizer), components(rows)
    assert 40 <= len(groups) < len(rows) - 10
    assert [len(found & group) for group in groups] == [1] * len(groups)
    assert shards.meta["counts"]["duplicates"] == {"near": len(rows) + 5 - len(groups)}
    # The own engine keeps a text of a chain that is far enough from the texts before it.
    ours = by_own(source, tokenizer, tmp_path / "own", quality)
    assert ours.meta["counts"]["documents"] > len(groups)


def test_near_shards_have_a_directory_of_their_own_that_is_found(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    source, quality = Source(str(write_rows(tmp_path / "texts", texts(30)))), Quality(deduplicate="near")
    shards = by_datatrove(source, tokenizer, tmp_path / "cache", quality)
    facts = ShardFacts("src", source, tokenizer, HELD_OUT, quality, tmp_path / "cache")
    places: dict[str, Path] = {engine: facts.directory(engine) for engine in ENGINES}
    assert shards.directory == places["datatrove"] != places["own"]
    assert shards.meta["engine"]["name"] == "datatrove"
    options: dict[str, Any] = {"held_out": HELD_OUT, "quality": quality, "cache_dir": facts.cache_dir}
    assert prepare({"src": source}, tokenizer, processes=1, **options) == {"src": 0.0}


def test_a_stage_that_ended_early_continues_with_the_tasks_that_are_missing(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_danube.tokens.engines import datatrove_engine

    source = Source(str(write_rows(tmp_path / "texts", texts(60) + texts(20))))
    quality = Quality(deduplicate="exact")
    expected = ids(by_datatrove(source, tokenizer, tmp_path / "whole", quality))
    make, made = datatrove_engine.make_unit, []

    def fails_at_third(job: Any, number: int, rows: Any) -> tuple[int, int]:
        made.append(number)
        if len(made) == 3:
            raise RuntimeError("power cut")
        return make(job, number, rows)

    monkeypatch.setattr(datatrove_engine, "make_unit", fails_at_third)
    with pytest.raises(RuntimeError, match="power cut"):
        by_datatrove(source, tokenizer, tmp_path / "cut", quality)
    with pytest.raises(ValueError, match=r"source 'src' was begun with 4 tasks, and --tasks is 2: give --tasks 4"):
        by_datatrove(source, tokenizer, tmp_path / "cut", quality, tasks=2)
    assert ids(by_datatrove(source, tokenizer, tmp_path / "cut", quality)) == expected
    assert made == [made[0], made[1], made[2], made[2], made[4]] and len(set(made)) == 4


def config(folder: Path, source: str, **options: str) -> list[str]:
    path = folder / "prepare.yaml"
    path.write_text(
        f"""
data:
  class_path: lightning_danube.pretraining.CurriculumData
  init_args:
    tokenizer: danube-small
    context_length: 32
    batch_tokens: 256
    held_out: {HELD_OUT}
    cache_dir: {folder}/cache
    sources: {{src: {source}}}
    stages: [{{name: all, tokens: 1K, mix: {{src: 1}}}}]
"""
    )
    return ["prepare", "--config", str(path), "--engine", "datatrove"]


def test_kill_9_leaves_no_process_and_the_next_start_continues(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    folder = write_rows(tmp_path / "texts", texts(1600, words=200), files=8)
    command = [*config(tmp_path, f"{{path: {folder}}}"), "--processes", "2"]
    script = [sys.executable, "-m", "lightning_danube", *command]
    process = subprocess.Popen(script, cwd=ROOT, stderr=subprocess.DEVNULL)
    working = "cache/shards/.src-*.datatrove"
    while not list(tmp_path.glob(f"{working}/logs/write/completions/*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path.name for path in tmp_path.glob(f"{working}/logs/write/completions/*")}
    assert 0 < len(done) < 8
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(f"{working}/tasks/*.json")}
    assert main(command) == 0
    shards = TokenShards(next(tmp_path.glob("cache/shards/src-*")), tokenizer)
    assert before and shards.meta["counts"]["documents"] == 1600
    ours = by_own(Source(str(folder)), tokenizer, tmp_path / "own")
    assert ids(shards) == ids(ours)


@pytest.mark.medium
def test_a_damaged_file_between_two_starts_is_named(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file that the last stage reads is damaged in several ways. No other shards are made."""
    from lightning_danube.tokens.engines.datatrove_engine import JoinShards

    rows = texts(40)
    source = Source(str(write_rows(tmp_path / "texts", rows + rows[:10])))
    quality = Quality(deduplicate="exact")
    expected = ids(by_own(source, tokenizer, tmp_path / "own", quality))
    with monkeypatch.context() as patch:
        patch.setattr(JoinShards, "_join", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            by_datatrove(source, tokenizer, tmp_path / "cache", quality)
    (building,) = (tmp_path / "cache" / "shards").glob(".src-*.datatrove")
    shutil.copytree(building, tmp_path / "left")
    names = ["plan.json", "tasks/00000.json", "tasks/00003.json"]
    refused = 0
    dice = random.Random(1)
    for name in names:
        for kind in range(6):
            shutil.rmtree(tmp_path / "cache")
            shutil.copytree(tmp_path / "left", building)
            content = bytearray((building / name).read_bytes())
            digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
            match kind:
                case 0:
                    content[dice.choice(digits)] ^= 1
                case 1:
                    content[dice.randrange(len(content))] ^= 4
                case 2:
                    del content[dice.randrange(len(content)) :]
                case _:
                    content = bytearray([b"{}", b"[" * 100_000, b'{"files": 5}'][kind - 3])
            (building / name).write_bytes(content)
            try:
                shards = by_datatrove(source, tokenizer, tmp_path / "cache", quality)
            except ValueError as error:
                assert f"{name} is damaged" in str(error) and "\n" not in str(error), (name, kind, error)
                refused += 1
            else:
                assert ids(shards) == expected, (name, kind)
    assert refused == 6 * len(names)


def test_a_damaged_row_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer: DocumentTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_rows(tmp_path / "texts", texts(20))
    with (folder / "0.jsonl").open("a") as file:
        file.write("{broken\n")
    assert main([*config(tmp_path, f"{{path: {folder}}}"), "--processes", "1"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "took" not in line]
    assert f"{folder}/0.jsonl, row 6: not JSON" in line
    assert not list(tmp_path.glob("cache/shards/*"))


def test_a_source_of_which_nothing_may_be_kept_is_told(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    source = Source(str(write_rows(tmp_path / "texts", texts(8))))
    quality = Quality(filters=Filters(min_words=1000))
    with pytest.raises(ValueError, match="holds no text that may be kept: 8 rows were rejected or removed"):
        by_datatrove(source, tokenizer, tmp_path / "cache", quality)
    assert not list(tmp_path.glob("cache/shards/*"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{path: TEXTS, max_tokens: 10K}", "data.sources.src.max_tokens: the engine datatrove has no limit of tokens"),
        ("{path: SAVED}", "data.sources.src.path is SAVED, a directory of save_to_disk: the engine datatrove deals"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(
    source: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, saved = write_rows(tmp_path / "texts", texts(8)), tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    places = {"TEXTS": str(folder), "SAVED": str(saved)}
    for place, path in places.items():
        source, said = source.replace(place, path), said.replace(place, path)
    assert main(config(tmp_path, source)) == 2
    assert said in capsys.readouterr().err


def test_a_hub_set_is_dealt_by_file(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The addresses are those of files here. Each is fetched, read and removed; messages name the file."""
    from lightning_danube.tokens.engines import source_work

    rows = texts(40)
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(4):
        own: list[Any] = rows[number * 10 : number * 10 + 10]
        pq.write_table(pa.table({"text": own, "n": [1] * 10}), folder / f"train-{number:05d}-of-00004.parquet")
    source = Source("owner/set")
    addresses = [f"file://{file}" for file in sorted(folder.iterdir())]
    monkeypatch.setattr(source_work, "hub_files", lambda name, source: addresses)
    shards = by_datatrove(source, tokenizer, tmp_path / "cache", tasks=2)
    assert ids(shards) == ids(by_own(Source(str(folder)), tokenizer, tmp_path / "own"))
    assert shards.meta["engine"]["tasks"] == 2

    pq.write_table(pa.table({"text": [3]}), folder / "train-00003-of-00004.parquet")
    shards = by_datatrove(Source("owner/set", on_bad_row="skip"), tokenizer, tmp_path / "other")
    (row,) = map(json.loads, (shards.directory / "rejected.jsonl").read_text().splitlines())
    assert row["file"] == "train-00003-of-00004.parquet"
    assert row["message"] == "train-00003-of-00004.parquet, row 1: column 'text' holds int, not text"

    os.remove(folder / "train-00002-of-00004.parquet")
    with pytest.raises(ValueError, match=r"train-00002-of-00004.parquet cannot be fetched \(.*run the command again"):
        by_datatrove(source, tokenizer, tmp_path / "third")


STAND_INS = {
    "squeue": 'cat "$QUEUE"',
    "scontrol": "echo here",
    "srun": 'while [ "$1" != launch_pickled_pipeline ]; do shift; done; exec "$@"',
    # Runs the tasks of the array one after the other, before it returns.
    "sbatch": """
for last; do :; done
printf '%s\\n' "$*" >> "$QUEUE.submitted"
grep '^#SBATCH' "$last" >> "$QUEUE.submitted"
echo "Submitted batch job 7"
grep -q merge_stats "$last" && exit 0
tasks=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
export RUN_OFFSET=0 SLURM_NODELIST=here
for task in $(seq 0 $tasks); do SLURM_ARRAY_TASK_ID=$task bash "$last" >> "$QUEUE.log" 2>&1; done
exit 0
""",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs of SLURM's names that run a job here, at once. Yields the file whose lines are the names of jobs."""
    folder, queue = tmp_path / "bin", tmp_path / "queue"
    folder.mkdir()
    queue.touch()
    for name, script in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("QUEUE", str(queue))
    yield queue


def test_jobs_of_slurm_make_the_shards(
    tmp_path: Path, tokenizer: DocumentTokenizer, stand_ins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins of SLURM's commands, which run a job at once."""
    source = Source(str(write_rows(tmp_path / "texts", texts(20), files=2)))
    slurm = {"partition": "cpu", "time": "1:00:00", "account": "us"}
    shards = by_datatrove(source, tokenizer, tmp_path / "cache", where="slurm", workers=1, tasks=2, slurm=slurm)
    assert ids(shards) == ids(by_own(source, tokenizer, tmp_path / "own"))
    assert "2 tasks are submitted, the last job is 7: run the same command when it is over" in capsys.readouterr().err
    submitted = Path(f"{stand_ins}.submitted").read_text()
    for option in ("partition=cpu", "time=1:00:00", "account=us", "array=0-1%1", f"job-name={shards.directory.name}-"):
        assert f"#SBATCH --{option}" in submitted
    assert "--dependency=afterok:7" in submitted and "qos" not in submitted


def test_jobs_of_slurm_that_found_a_damaged_row_tell_it_at_the_next_call(
    tmp_path: Path, tokenizer: DocumentTokenizer, stand_ins: Path
) -> None:
    folder = write_rows(tmp_path / "texts", texts(20), files=1)
    with (folder / "0.jsonl").open("a") as file:
        file.write("{broken\n")
    slurm = {"partition": "cpu", "time": "1:00:00"}
    with pytest.raises(AssertionError):  # nothing is made yet
        by_datatrove(Source(str(folder)), tokenizer, tmp_path / "cache", where="slurm", slurm=slurm)
    with pytest.raises(ValueError, match=f"^{folder}/0.jsonl, row 21: not JSON"):
        by_datatrove(Source(str(folder)), tokenizer, tmp_path / "cache", where="slurm", slurm=slurm)
    assert not list(tmp_path.glob("cache/shards/*"))


def test_a_source_whose_jobs_are_in_the_queue_is_not_submitted_again(
    tmp_path: Path, tokenizer: DocumentTokenizer, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(str(write_rows(tmp_path / "texts", texts(8))))
    name = ShardFacts("src", source, tokenizer, HELD_OUT, Quality(), tmp_path / "cache").directory().name
    slurm = {"partition": "cpu", "time": "1:00:00"}
    stand_ins.write_text(f"another\n{name}-write\n")
    with pytest.raises(
        ValueError, match=f"source 'src': the job {name}-write of an earlier call is still in the queue"
    ):
        by_datatrove(source, tokenizer, tmp_path / "cache", where="slurm", slurm=slurm)
    stand_ins.write_text("")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(ValueError, match="sbatch took no job: see its own message above, and --slurm"):
        by_datatrove(source, tokenizer, tmp_path / "cache", where="slurm", slurm=slurm)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="--executor slurm: there is no squeue here: use a machine that can submit"):
        by_datatrove(source, tokenizer, tmp_path / "cache", where="slurm", slurm=slurm)


@pytest.mark.parametrize(
    ("address", "said"),
    [("", "does not start on this machine"), ("head:6379", "at RAY_ADDRESS=head:6379 is not within reach")],
)
def test_a_ray_that_does_not_start_is_one_line(
    address: str, said: str, tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in of Ray's package."""

    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup.\nMore lines.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, __spec__=ModuleSpec("ray", None)))
    monkeypatch.setenv("RAY_ADDRESS", address)
    source = Source(str(write_rows(tmp_path / "texts", texts(8))))
    expected = f"--executor ray: Ray {said} (The current node timed out during startup): see ray status, and try again"
    with pytest.raises(ValueError, match=re.escape(expected)):
        by_datatrove(source, tokenizer, tmp_path / "cache", where="ray")


def test_datatrove_still_has_the_private_parts_that_are_used() -> None:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.dedup.minhash import read_sigs

    assert callable(PipelineExecutor._run_for_rank) and callable(read_sigs)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "datatrove"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    monkeypatch.delitem(sys.modules, "lightning_danube.tokens.engines.datatrove_engine", raising=False)
    with pytest.raises(ValueError, match=r"prepare --engine datatrove needs datatrove, .*\[datatrove\]'"):
        import lightning_danube.tokens.engines.datatrove_engine  # noqa: F401
