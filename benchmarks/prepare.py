"""Tokens a second of `prepare` beside `datasets.map` and datatrove, with one tokenizer on the same texts.

    python benchmarks/prepare.py --texts FILE.jsonl [--processes 2] [--rounds 3]

Each round runs every contestant once, in a new process and with empty outputs, one after the other; a round's start is
rotated. What counts is the wall time of the whole process, imports included, as a person waits for it; and the same
less the start, which is the median time of the same process on ten of the rows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONFIG = """
data:
  class_path: lightning_danube.data.CurriculumData
  init_args:
    context_length: 512
    batch_tokens: 4096
    held_out: 0.01
    cache_dir: {out}
    sources: {{all: {{path: {texts}}}}}
    stages: [{{name: all, tokens: 1M, mix: {{all: 1}}}}]
"""

PREPARE = """
import sys
from lightning_danube.__main__ import main
if __name__ == "__main__":
    sys.exit(main(["prepare", "--config", "{out}/prepare.yaml", "--processes", "{processes}"]))
"""

# The tokenizer of `prepare`, ids as 16 bit like there; batches of 1000 are the default of `datasets`.
DATASETS = """
import datasets
from lightning_danube.data.tokenizer import DocumentTokenizer
def encode(batch, tokenizer):
    return {{"input_ids": tokenizer.encode_documents(batch["text"])}}
if __name__ == "__main__":
    rows = datasets.load_dataset("json", data_files="{texts}", split="train", cache_dir="{out}/cache")
    features = datasets.Features({{"input_ids": datasets.List(datasets.Value("uint16"))}})
    done = rows.map(
        encode, batched=True, num_proc={processes}, remove_columns=rows.column_names, features=features,
        fn_kwargs={{"tokenizer": DocumentTokenizer()}},
    )
    done.save_to_disk("{out}/tokens")
"""

DATATROVE = """
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader("{parts}", text_key="text"),
            DocumentTokenizer(
                "{out}/tokens", tokenizer_name_or_path="{tokenizer}/tokenizer.json", eos_token="</s>",
                shuffle_documents=False, batch_size=256,
            ),
        ],
        tasks={processes}, workers={processes}, logging_dir="{out}/logs",
    ).run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="a jsonl file with a column text")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    from lightning_danube.data.tokenizer import DocumentTokenizer

    tokenizer = DocumentTokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.hf.save_pretrained(f"{scratch}/tokenizer")
        parts = split(arguments.texts, Path(scratch, "parts"), arguments.processes)
        contestants = {"prepare": PREPARE, "datasets.map": DATASETS, "datatrove": DATATROVE}
        try:
            importlib.metadata.version("datatrove")
        except importlib.metadata.PackageNotFoundError:
            print("datatrove is not installed (pip install -c constraints.txt -e '.[benchmark]'): left out")
            del contestants["datatrove"]
        few = Path(scratch, "few.jsonl")
        few.write_bytes(b"".join(arguments.texts.read_bytes().splitlines(keepends=True)[:10]))
        few_parts = split(few, Path(scratch, "few"), arguments.processes)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        starts: dict[str, list[float]] = {name: [] for name in contestants}
        tokens = 0
        for number in range(arguments.rounds):
            names = list(contestants)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for texts, folder, times in ((few, few_parts, starts), (arguments.texts, parts, seconds)):
                    out = Path(scratch, "out")
                    out.mkdir()
                    (out / "prepare.yaml").write_text(CONFIG.format(out=out, texts=texts.resolve()))
                    values = {"out": out, "texts": texts.resolve(), "processes": arguments.processes}
                    script = contestants[name].format(**values, parts=folder, tokenizer=f"{scratch}/tokenizer")
                    times[name].append(timed(script, out))
                    if name == "prepare":
                        (report,) = out.glob("shards/*/report.json")
                        tokens = json.loads(report.read_text())["tokens"]
                    shutil.rmtree(out)
                print(f"round {number + 1}, {name}: {starts[name][-1]:.1f}, {seconds[name][-1]:.1f} s", flush=True)
    write(seconds, starts, tokens, arguments)


def split(texts: Path, directory: Path, count: int) -> Path:
    """The same rows in as many files as there are processes: datatrove is parallel over files only."""
    directory.mkdir()
    lines = texts.read_bytes().splitlines(keepends=True)
    for number in range(count):
        (directory / f"{number}.jsonl").write_bytes(b"".join(lines[number::count]))
    return directory


def timed(script: str, out: Path) -> float:
    path = out / "contestant.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - began


def write(
    seconds: dict[str, list[float]], starts: dict[str, list[float]], tokens: int, arguments: argparse.Namespace
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    versions = {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "pyarrow")}
    if "datatrove" in seconds:
        versions["datatrove"] = importlib.metadata.version("datatrove")
    size = arguments.texts.stat().st_size
    lines = [
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"{tokens:,} tokens of {size / 1e6:.1f} MB jsonl, {arguments.processes} processes, {arguments.rounds} rounds",
        "",
        "| | seconds (median) | least to most | start (median) | tokens/s | tokens/s after the start | × prepare |",
        "|---|---|---|---|---|---|---|",
    ]
    begun = {name: statistics.median(values) for name, values in starts.items()}
    rates = {name: tokens / (medians[name] - begun[name]) for name in medians}
    for name, median in medians.items():
        span = f"{min(seconds[name]):.1f} to {max(seconds[name]):.1f}"
        lines.append(
            f"| {name} | {median:.1f} | {span} | {begun[name]:.1f} | {tokens / median:,.0f} | {rates[name]:,.0f} "
            f"| {rates[name] / rates['prepare']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"prepare-{datetime.date.today()}.md").write_text(text)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
