"""Tokens/s of `prepare` beside `datasets.map` and datatrove, with one tokenizer on the same texts.

    python benchmarks/prepare.py [--texts FILE.jsonl] [--processes 2] [--rounds 3]

The texts are a jsonl file with a column `text`; without one, the embedded documentation that plays the web.
Each round runs every contestant once, in a new process and with empty outputs, one after the other; each round begins
with another. Seconds are those of the whole process, imports included, as a person waits for it, and the CPU seconds
of it and all its children, which say more on a machine that others use, too. Of both the start is taken off for the
rates: the median of the same process on ten of the rows. All tokenize with the same file, to ids of 16 bits; `prepare`
also checks every row, splits off the held-out documents, syncs the files to the disk and hashes them.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from machine import ROOT, described, write_result

from lightning_danube.device import usable_cores

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

CONFIG = """
data:
  class_path: lightning_danube.pretraining.CurriculumData
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
from lightning_danube.tokens.tokenizer import DocumentTokenizer
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


class Took(NamedTuple):
    seconds: float
    cpu_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, help="a jsonl file with a column text")
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    become_reaper()

    from lightning_danube.files import default_cache_dir
    from lightning_danube.text.embedded.documentation import collect_documentation
    from lightning_danube.tokens.tokenizer import DocumentTokenizer

    arguments.texts = arguments.texts or collect_documentation(default_cache_dir())["web"]
    tokenizer = DocumentTokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.hf.save_pretrained(f"{scratch}/tokenizer")
        parts = split(arguments.texts, Path(scratch, "parts"), arguments.processes)
        contestants = {"prepare": PREPARE, "datasets.map": DATASETS, "datatrove": DATATROVE}
        try:
            importlib.metadata.version("datatrove")
        except importlib.metadata.PackageNotFoundError:
            print("datatrove is left out: pip install -c constraints.txt -e '.[benchmark]'")
            del contestants["datatrove"]
        few = Path(scratch, "few.jsonl")
        few.write_bytes(b"".join(arguments.texts.read_bytes().splitlines(keepends=True)[:10]))
        few_parts = split(few, Path(scratch, "few"), arguments.processes)
        took: dict[str, list[Took]] = {name: [] for name in contestants}
        starts: dict[str, list[Took]] = {name: [] for name in contestants}
        tokens = 0
        for number in range(arguments.rounds):
            names = list(contestants)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                for texts, folder, times in ((few, few_parts, starts), (arguments.texts, parts, took)):
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
                print(f"round {number + 1}, {name}: {took[name][-1].seconds:.1f} s", flush=True)
    write(took, starts, tokens, arguments)


def split(texts: Path, directory: Path, count: int) -> Path:
    """The same rows in as many files as there are processes: datatrove is parallel over files only."""
    directory.mkdir()
    lines = texts.read_bytes().splitlines(keepends=True)
    for number in range(count):
        (directory / f"{number}.jsonl").write_bytes(b"".join(lines[number::count]))
    return directory


def timed(script: str, out: Path) -> Took:
    path = out / "contestant.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds = time.perf_counter() - began
    wait_for_all()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(seconds, cpu_seconds)


def become_reaper() -> None:
    """Lets processes whose parents are gone become children of this one, as those of a fork server do: else their CPU
    seconds would be nobody's."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def wait_for_all() -> None:
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def write(
    took: dict[str, list[Took]], starts: dict[str, list[Took]], tokens: int, arguments: argparse.Namespace
) -> None:
    size = arguments.texts.stat().st_size
    lines = [
        described("datasets", "tokenizers", "pyarrow", *(["datatrove"] if "datatrove" in took else [])),
        f"{tokens:,} tokens of {size / 1e6:.1f} MB jsonl, {arguments.processes} processes, {arguments.rounds} rounds",
        "",
        "| | seconds | least to most | of them to start | CPU s | tokens/s | tokens/CPU s | prepare ×, by the clock "
        "| prepare ×, by CPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    whole, start = ({name: medians(times) for name, times in both.items()} for both in (took, starts))
    rates = {
        name: (
            tokens / (whole[name].seconds - start[name].seconds),
            tokens / (whole[name].cpu_seconds - start[name].cpu_seconds),
        )
        for name in took
    }
    for name, times in took.items():
        span = f"{min(one.seconds for one in times):.1f} to {max(one.seconds for one in times):.1f}"
        ahead = " | ".join(f"{ours / rate:.2f}" for ours, rate in zip(rates["prepare"], rates[name], strict=True))
        lines.append(
            f"| {name} | {whole[name].seconds:.1f} | {span} | {start[name].seconds:.1f} "
            f"| {whole[name].cpu_seconds:.1f} | {rates[name][0]:,.0f} | {rates[name][1]:,.0f} | {ahead} |"
        )
    write_result("prepare", "\n".join(lines))


def medians(times: list[Took]) -> Took:
    return Took(*(statistics.median(values) for values in zip(*times, strict=True)))


if __name__ == "__main__":
    main()
