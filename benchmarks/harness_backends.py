"""The same questions to the same model through this project's decoder and through the lm-evaluation-harness's own
Hugging Face backend on its export: whether the answers are the same, and how long each takes.

    python benchmarks/harness_backends.py --weights smollm2 --directory questions --tasks arc_challenge gsm8k --limit 20

Each task's questions are asked once by each, the harness first, in one process with the same number of threads, in
float32. `--batch` texts at once for its backend, as many places as the default of an evaluation for ours. CPU seconds
are those of the process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from machine import described, write_result

from lightning_danube.__main__ import main as danube
from lightning_danube.evaluation import harness
from lightning_danube.evaluation.academic_tasks import academic_tasks
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.weights.loading import load_as_exported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="smollm2")
    parser.add_argument("--directory", required=True, type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    torch.set_num_threads(arguments.threads)
    decoder, tokenizer = load_as_exported(arguments.weights, dtype="float32")
    pack_for_generation(decoder, rows=8192)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "model"
        assert danube(["export", "--weights", arguments.weights, "--dtype", "float32", "--out", str(out)]) == 0
        theirs = HFLM(pretrained=str(out), dtype="float32", batch_size=arguments.batch, device="cpu")
        rows = [compared(task, arguments, harness.DecoderLM(decoder, tokenizer), theirs) for task in arguments.tasks]
    columns = (
        "task | questions | largest difference, nats | same answers | same scores | harness, s | danube, s | CPU ×"
    )
    about = f"{arguments.weights}, float32, {arguments.threads} thread(s), batches of {arguments.batch} for the harness"
    lines = [
        f"{described('torch', 'transformers', 'lm-eval')}; {about}",
        "",
        f"| {columns} |",
        f"|{'---|' * len(columns.split('|'))}",
        *rows,
    ]
    write_result("harness-backends", "\n".join(lines))


def compared(name: str, arguments: argparse.Namespace, ours: Any, theirs: Any) -> str:
    (task,) = academic_tasks([name])
    prepared = harness.prepare_task(task, arguments.directory, arguments.limit, seed=0)
    expected, their_seconds, their_cpu = timed(theirs, prepared)
    found, seconds, cpu = timed(ours, prepared)
    difference, same, requests, same_scores = 0.0, 0, 0, 0
    for mine, reference in zip(found.samples, expected.samples, strict=True):
        assert mine["arguments"] == reference["arguments"]
        same_scores += all(float(mine[metric]) == float(reference[metric]) for metric in mine["metrics"])
        if mine["filter"] != found.samples[0]["filter"]:
            continue  # the same answers, read in another way
        for (answer,), (wanted,) in zip(mine["resps"], reference["resps"], strict=True):
            requests += 1
            if isinstance(wanted, str):
                same += answer == wanted
            else:
                difference = max(difference, abs(answer[0] - wanted[0]))
                same += answer[1] == wanted[1]
    cells = [
        f"{task.title}, {task.setting}",
        str(prepared.documents),
        f"{difference:.1e}" if difference else "–",
        f"{same} of {requests}",
        f"{same_scores} of {len(found.samples)}",
        f"{their_seconds:.0f}",
        f"{seconds:.0f}",
        f"{their_cpu / cpu:.1f}",
    ]
    row = f"| {' | '.join(cells)} |"
    print(row, flush=True)
    return row


def timed(lm: Any, prepared: harness.PreparedTask) -> tuple[harness.Answered, float, float]:
    clock, cpu = time.monotonic(), time.process_time()
    answered = harness.ask(lm, prepared)
    return answered, time.monotonic() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main()
