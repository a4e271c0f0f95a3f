"""Trials of the quickstart's settings: real runs of `fit` that have equal CPU time, compared by bits/byte.

    python benchmarks/quickstart_trials.py                    all trials, 480 CPU seconds of training each
    python benchmarks/quickstart_trials.py --seconds 120 --only chosen "8 rows"

A trial is the configuration `quickstart` with some options changed. The steps of all trials are timed first, on one
thread: that needs an idle machine, about 15 seconds a trial. Then each trial is trained, whatever else the machine
does. Its stages get as many tokens as fit into the CPU seconds, in the quickstart's proportions. A short run is warmed
up over the same share of its tokens. At the end `test` measures all held-out text of the five sources.

Each timing and each finished trial is kept in results/quickstart-trials.jsonl, so an interrupted series continues where
it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback
from machine import ROOT, described, write_result

from lightning_danube.options import parse_tokens
from lightning_danube.terminal import markdown_table
from lightning_danube.training.history import commit, machine

CONFIG = ROOT / "configs" / "quickstart.yaml"
RESULTS = ROOT / "benchmarks" / "results" / "quickstart-trials.jsonl"
TIMED_STEPS = 24
CLOCK = "LIGHTNING_DANUBE_TRIAL_CLOCK"
"""Environment variable: the file that StepClock writes."""

DATA, MODEL = "--data.init_args", "--model.init_args"
DECODER, OPTIMIZER = f"{MODEL}.decoder", f"{MODEL}.optimizer"

TRIALS: dict[str, list[str]] = {
    "chosen": [],
    "3 × 96": [f"{DECODER}.hidden_size", "96", f"{DECODER}.intermediate_size", "256"],
    "3 × 192": [f"{DECODER}.hidden_size", "192", f"{DECODER}.intermediate_size", "512"],
    "3 × 256": [f"{DECODER}.hidden_size", "256", f"{DECODER}.intermediate_size", "768"],
    "4 × 128": [f"{DECODER}.num_hidden_layers", "4"],
    "6 × 128": [f"{DECODER}.num_hidden_layers", "6"],
    "AdamW alone": [OPTIMIZER, "AdamW"],
    "Muon 0.01": [f"{OPTIMIZER}.peak", "0.01"],
    "Muon 0.04": [f"{OPTIMIZER}.peak", "0.04"],
    "AdamW 0.003 for the rest": [f"{MODEL}.learning_rate.peak", "3e-3"],
    "AdamW 0.012 for the rest": [f"{MODEL}.learning_rate.peak", "12e-3"],
    "16 rows": [f"{DATA}.batch_tokens", "4096", f"{DATA}.micro_batch_size", "16"],
    "16 rows of 128": [f"{DATA}.context_length", "128", f"{DATA}.micro_batch_size", "16"],
    "4 rows": [f"{DATA}.batch_tokens", "1024", f"{DATA}.micro_batch_size", "4"],
    "cosine": [f"{MODEL}.learning_rate.shape", "cosine"],
    "untied": [f"{DECODER}.tie_word_embeddings", "false"],
    "no weight decay": [f"{OPTIMIZER}.weight_decay", "0.0"],
    "Muon 0.014, AdamW 0.008": [f"{OPTIMIZER}.peak", "0.014", f"{MODEL}.learning_rate.peak", "8e-3"],
    "Mistral's 32,000 pieces": [f"{DATA}.tokenizer", "mistral"],
}
"""Name of a trial → what it changes."""


class StepClock(Callback):
    """Measures the CPU seconds of each optimizer step. Validation and checkpoints between steps do not count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self._began)

    def on_train_end(self, *_: Any) -> None:
        Path(os.environ[CLOCK]).write_text(json.dumps(self.seconds), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="CPU seconds of training (default 480)")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="names of trials")
    arguments = parser.parse_args()
    for name in arguments.only:
        if timing_of(name) is None:
            keep(timed(name))
    for name in arguments.only:
        if not any(one["trial"] == name and one["options"] == TRIALS[name] for one in finished(arguments.seconds)):
            keep(trial(name, arguments.seconds))
    report(arguments.seconds)


def kept() -> list[dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def keep(result: dict[str, Any]) -> None:
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result, ensure_ascii=False) + "\n")


def finished(seconds: float) -> list[dict[str, Any]]:
    return [one for one in kept() if one.get("budget_seconds") == seconds]


def timing_of(name: str) -> dict[str, Any] | None:
    """The timing of a trial with these options on this machine, if there is one."""
    wanted = {"trial": name, "options": TRIALS[name], "machine": machine(), "avx2_only": avx2_only()}
    timings = (one for one in kept() if "budget_seconds" not in one)
    return next((one for one in timings if wanted.items() <= one.items()), None)


def timed(name: str) -> dict[str, Any]:
    """Measures the CPU seconds of a step: the median of 24 steps without the first 8."""
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory)
        _, steps = run("fit", runs, "timed", [*TRIALS[name], "--trainer.max_steps", str(TIMED_STEPS)])
        return {
            "trial": name,
            "options": TRIALS[name],
            "seconds_per_step": round(statistics.median(steps[TIMED_STEPS // 3 :]), 5),
            "tokens_per_step": tokens_of_a_step(runs / "timed" / "version_0"),
            "machine": machine(),
            "avx2_only": avx2_only(),
        }


def trial(name: str, seconds: float) -> dict[str, Any]:
    """Trains and tests one setting. It must have been timed."""
    options, timing = TRIALS[name], timing_of(name)
    assert timing is not None
    tokens = round(seconds / timing["seconds_per_step"]) * timing["tokens_per_step"]
    with tempfile.TemporaryDirectory() as directory:
        runs = Path(directory)
        length = [f"{DATA}.stages", json.dumps(stages_of(tokens)), *scaled_schedule(tokens, options)]
        said, _ = run("fit", runs, "trial", [*options, *length])
        tested, _ = run("test", runs, "trial", [*options, *length, "--ckpt_path", "last"])
        trained = summary_of(runs / "trial" / "version_0" / "summary.json")
        bits = summary_of(Path(re.findall(r"^written to (.*)$", tested, flags=re.MULTILINE)[0]))["val_bits_per_byte"]
    sample = re.search(r"^sample: (.*)$", said, flags=re.MULTILINE)
    return {
        "trial": name,
        "options": options,
        "budget_seconds": seconds,
        "seconds_per_step": timing["seconds_per_step"],
        "parameters": trained["parameters"],
        "tokens": trained["tokens"],
        "steps": trained["steps"],
        "bits_per_byte": {source: round(value, 4) for source, value in bits.items()},
        "mean_bits_per_byte": round(sum(bits.values()) / len(bits), 4),
        "sample": sample[1] if sample else "",
        "machine": machine(),
        "avx2_only": avx2_only(),
        "commit": commit(),
    }


def avx2_only() -> bool:
    """Whether the environment limits torch to AVX2."""
    return os.environ.get("ATEN_CPU_CAPABILITY") == "avx2"


def run(verb: str, runs: Path, name: str, options: list[str]) -> tuple[str, list[float]]:
    """Runs a verb on one thread. Returns what it printed, and the CPU seconds of its training steps."""
    clock = runs / "clock.json"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        CLOCK: str(clock),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "lightning_danube", verb, "--config", str(CONFIG), *options]
    command += ["--runs", str(runs), "--name", name]
    if verb == "fit":
        command.append("--trainer.callbacks+=quickstart_trials.StepClock")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout, json.loads(clock.read_text(encoding="utf-8"))


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary


def tokens_of_a_step(run_directory: Path) -> int:
    config = yaml.safe_load((run_directory / "config.yaml").read_text(encoding="utf-8"))
    return parse_tokens(config["data"]["init_args"]["batch_tokens"])


def quickstart() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return config


def whole_quickstart() -> int:
    return sum(parse_tokens(stage["tokens"]) for stage in quickstart()["data"]["init_args"]["stages"])


def stages_of(tokens: int) -> list[dict[str, Any]]:
    """The quickstart's stages with another number of tokens in all."""
    stages = quickstart()["data"]["init_args"]["stages"]
    whole = whole_quickstart()
    return [{**stage, "tokens": round(parse_tokens(stage["tokens"]) * tokens / whole)} for stage in stages]


def scaled_schedule(tokens: int, options: list[str]) -> list[str]:
    """Warm-up and decay as the same share of another number of tokens, unless the trial states them."""
    rate = quickstart()["model"]["init_args"]["learning_rate"]
    key = f"{MODEL}.learning_rate"
    if any(option.startswith((f"{key}.warmup", f"{key}.decay")) for option in options):
        return []
    scaled = [name for name in ("warmup", "decay") if name in rate]
    # Rounded down: together they must fit into the run.
    return [
        word
        for name in scaled
        for word in (f"{key}.{name}", str(max(1, int(parse_tokens(rate[name]) * tokens / whole_quickstart() * 0.999))))
    ]


def report(seconds: float) -> None:
    results = sorted(finished(seconds), key=lambda one: one["mean_bits_per_byte"])
    sources = list(results[0]["bits_per_byte"])
    header = ["trial", "parameters", "tokens", "steps", "s/step", "mean bits/byte", *sources]
    rows = [
        [
            one["trial"],
            f"{one['parameters'] / 1e6:.2f}M",
            f"{one['tokens'] / 1e6:.2f}M",
            f"{one['steps']:,}",
            f"{one['seconds_per_step']:.3f}",
            f"{one['mean_bits_per_byte']:.3f}",
            *(f"{one['bits_per_byte'][source]:.2f}" for source in sources),
        ]
        for one in results
    ]
    kind = "AVX2 only (AVX-512 switched off)" if results[0]["avx2_only"] else "all instructions of the processor"
    text = [
        described("torch"),
        f"float32 and one thread, {kind}; one run each, seed 1",
        "",
        markdown_table(header, rows),
    ]
    samples = [f"- {one['trial']}: {one['sample']}" for one in results]
    write_result(f"quickstart-trials-{seconds:.0f}s", "\n".join([*text, "", "Samples:", "", *samples]))


if __name__ == "__main__":
    main()
