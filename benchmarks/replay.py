"""What SmolLM2 gains and forgets when it is trained further on one field, with and without replayed general text.

    python benchmarks/replay.py --field abstracts.jsonl --field-text "{title}\\n{abstract}" \\
        --general c4.jsonl --other openwebtext.jsonl

Each arm is trained with each seed by `fit`, as in pretrain/continue-smollm2: all weights, equal tokens, one thread.
`field alone` reads only the field. `replay` gives a fifth of its tokens to general text. The held-out texts are the
same in all runs: of the field, of the general text, and of another general text that no run reads. What is forgotten is
the loss on the last two, against the weights before training. The arms are compared in pairs of the same seed, which
decides the order of the texts.

Each finished run is a line of results/replay.jsonl, and a run that was stopped continues from its last checkpoint: type
the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import ROOT, described, write_result

from lightning_danube.intervals import Estimate, student
from lightning_danube.terminal import markdown_table
from lightning_danube.training.history import commit, machine

RESULTS = ROOT / "benchmarks" / "results" / "replay.jsonl"
ARMS = {"field alone": {"field": 100}, "replay": {"field": 80, "general": 20}}
"""Name of an arm → the shares of its tokens."""
BEFORE = "before"
SOURCES = ("field", "general", "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for source in SOURCES:
        parser.add_argument(
            f"--{source}", required=True, help=f"the {source} text: a source of the data, such as a file"
        )
        parser.add_argument(f"--{source}-text", help="its column or template (text)")
    parser.add_argument("--tokens", type=int, default=49152, help="tokens of each run (49,152)")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of each source (16)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (1 2 3)")
    parser.add_argument("--peak", type=float, default=1e-4, help="highest learning rate (1e-4)")
    parser.add_argument("--weights", default="smollm2", help="the weights to continue (smollm2)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs are kept (runs)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are kept")
    arguments = parser.parse_args()
    if not have(arguments, BEFORE, 0):
        keep(arguments, measured_before(arguments))
    for seed in arguments.seeds:
        for arm in ARMS:
            if not have(arguments, arm, seed):
                keep(arguments, trained(arguments, arm, seed))
    report(arguments)


# --- results on disk --------------------------------------------------------------------------------------------------


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to be equal in results that are compared. Of a source only the name of its file, wherever it is."""
    sources = {source: Path(getattr(arguments, source)).name for source in SOURCES}
    names = ("tokens", "rows", "context", "peak", "weights")
    return sources | {name: getattr(arguments, name) for name in names}


def kept(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    lines = arguments.results.read_text(encoding="utf-8").splitlines() if arguments.results.exists() else []
    results = [json.loads(line) for line in lines]
    return [one for one in results if one["settings"] == settings(arguments)]


def have(arguments: argparse.Namespace, arm: str, seed: int) -> bool:
    return any((one["arm"], one["seed"]) == (arm, seed) for one in kept(arguments))


def keep(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    where = {"settings": settings(arguments), "machine": machine(), "commit": commit()}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result | where, ensure_ascii=False) + "\n")


# --- runs -------------------------------------------------------------------------------------------------------------


def measured_before(arguments: argparse.Namespace) -> dict[str, Any]:
    said, seconds = run(arguments, "validate", BEFORE, 0, "field alone")
    summary = read(Path(re.findall(r"^written to (.*)$", said, flags=re.MULTILINE)[0]))
    return {"arm": BEFORE, "seed": 0, "val_loss": summary["val_loss"], "cpu_seconds": seconds}


def trained(arguments: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    name = f"{arm.replace(' ', '-')}-seed{seed}"
    place = directory(arguments) / name / "version_0"
    goes_on = ["--ckpt_path", "last"] if list(place.glob("checkpoints/*.ckpt")) else []
    _, seconds = run(arguments, "fit", name, seed, arm, *goes_on)
    summary = read(place / "summary.json")
    return {
        "arm": arm,
        "seed": seed,
        "tokens": summary["tokens"],
        "tokens_by_source": summary["stages"][0]["tokens_by_source"],
        "precision": summary["precision"],
        "val_loss": summary["val_loss"],
        "val_tokens": summary["val_tokens"],
        "cpu_seconds": seconds,
    }


def directory(arguments: argparse.Namespace) -> Path:
    return Path(arguments.runs) / f"replay-{arguments.tokens}-{arguments.rows}-{arguments.context}-{arguments.peak:g}"


def run(arguments: argparse.Namespace, verb: str, name: str, seed: int, arm: str, *options: str) -> tuple[str, float]:
    """Runs a verb on one thread. Returns what it printed, and its CPU seconds with those before a stop left out."""
    sources = {}
    for source in SOURCES:
        text = getattr(arguments, f"{source}_text")
        sources[source] = {"path": str(Path(getattr(arguments, source)))} | ({"text": text} if text else {})
    data: dict[str, Any] = {
        "sources": sources,
        "context_length": arguments.context,
        "batch_tokens": 4 * arguments.context,
        "micro_batch_size": 4,
        "validation_rows": arguments.rows,
        "stages": [{"name": "field", "tokens": arguments.tokens, "mix": ARMS[arm]}],
    }
    model: dict[str, Any] = {
        "weights": arguments.weights,
        "learning_rate": {"peak": arguments.peak, "final": 0.0, "warmup": arguments.tokens // 16},
    }
    names = ("PretrainingSummary", "CurriculumStages", "TokenLedger", "Throughput", "Checkpoints")
    callbacks: list[dict[str, Any]] = [{"class_path": f"lightning_danube.callbacks.{one}"} for one in names]
    callbacks[-1]["init_args"] = {"every_n_steps": 8, "keep": 1}
    # Held-out losses before training are measured once, not in each run: the weights and the texts are the same.
    trainer = {"callbacks": callbacks, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    # A file, because a mapping on the command line would be merged with the sources of the configuration.
    config = directory(arguments) / f"{name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "seed_everything": seed,
        "data": {"class_path": "lightning_danube.pretraining.CurriculumData", "init_args": {**data, "held_out": 0.05}},
        "model": {"class_path": "lightning_danube.pretraining.Pretraining", "init_args": model},
        "trainer": trainer,
    }
    content["data"]["init_args"]["seed"] = seed
    config.write_text(json.dumps(content, indent=1), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "lightning_danube", verb, "--config", str(config), *options]
    command += ["--runs", str(directory(arguments)), "--name", name]
    print(f"{name}: {verb}", flush=True)
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{name}: {seconds:.0f} CPU seconds, {time.monotonic() - began:.0f} s by the clock", flush=True)
    return done.stdout, round(seconds, 1)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


# --- the report -------------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> None:
    results = kept(arguments)
    losses = {(one["arm"], one["seed"]): one["val_loss"] for one in results}
    before = losses[BEFORE, 0]
    header = ["held-out loss, nats/token", *SOURCES]
    rows = [["before training", *(f"{before[source]:.4f}" for source in SOURCES)]]
    for arm in ARMS:
        changes = [[losses[arm, seed][source] - before[source] for seed in arguments.seeds] for source in SOURCES]
        rows.append([f"{arm}: change", *(shown(student(change)) for change in changes)])
    first, second = ARMS
    differences = [
        [losses[second, seed][source] - losses[first, seed][source] for seed in arguments.seeds] for source in SOURCES
    ]
    rows.append([f"{second} − {first}, paired", *(shown(student(difference)) for difference in differences)])
    tokens = next(one["val_tokens"] for one in results if one["arm"] != BEFORE)
    rows.append(["held-out tokens", *(f"{tokens[source]:,}" for source in SOURCES)])
    text = [
        described("torch", "lightning"),
        f"{arguments.weights}, {arguments.tokens:,} tokens a run, rows of {arguments.context}, peak "
        f"{arguments.peak:g}, seeds {', '.join(map(str, arguments.seeds))}; "
        f"{sum(one['cpu_seconds'] for one in results):,.0f} CPU seconds in all",
        "the mean over the seeds and Student's 95 % interval; `other` is general text that no run reads",
        "",
        markdown_table(header, rows),
    ]
    write_result("replay", "\n".join(text))


def shown(estimate: Estimate) -> str:
    return f"{estimate:+.4f}"


if __name__ == "__main__":
    main()
