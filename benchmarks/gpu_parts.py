"""The paper's models beside their peers on one GPU, in parts of at most ten minutes.

    make benchmark-gpu                            or: python3 benchmarks/gpu_parts.py
    make benchmark-gpu ARGS="decoding --again"    this part, also if this commit has its result
    make benchmark-gpu ARGS=--rehearse            the same on this CPU, with tiny shapes

A part writes `<part>-<commit>.jsonl`, `.md` and `.log` into the folder of the results. A part that this commit has
finished is left out, so a cut-off series continues where it stopped. `tables.md` has the newest table of each part.

Each contestant is a process of its own. A peer that is not installed is named and left out. Where the configured number
of rows does not fit the GPU's memory by `plan`'s arithmetic, ours takes as many as fit; a peer takes half as many rows
until they fit. Tokens are counted without padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (str(ROOT / "benchmarks"), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import first_contact  # noqa: E402  (after the lines above)
from first_contact import FIT, UNKNOWN, WHEELS, about, carried_packages, device_of, environment_of, is_installed  # noqa: E402
from steps import Process, Report, Step, child, run_steps  # noqa: E402

SECONDS = 570.0
"""For a part. A command on a borrowed machine often has ten minutes."""
WARM_UP = 2
Options = Mapping[str, Any]
Contestant = Callable[[Report, Options], None]


# --- contestants in processes of their own ----------------------------------------------------------------------------


def contest(report: Report, options: Options, names: Sequence[str], libraries: Sequence[str], **more: Any) -> None:
    """Runs contestants one after the other and reports a row for each.

    A contestant that is out of memory runs again with half the rows. The process of the next one is started
    beforehand, as in `run_steps`.

    Raises:
        RuntimeError: one of them failed; all have run.
    """
    log, failed = Path(options["scratch"]) / "contestants.log", []

    def new() -> Process:
        return Process(Path(__file__).resolve(), log, {}, libraries)

    left, waiting = [(name, dict(more)) for name in names], new()
    try:
        while left:
            name, work = left.pop(0)
            process, waiting = waiting, new()
            try:
                process.begin({"step": name, "options": {**options, **work}})
                code = process.wait(options["seconds"])
            finally:
                process.end()
            fewer = work["micro_batch_size"] // 2
            if code != 0 and fewer and ("out_of_memory" in process.measured or "OutOfMemoryError" in process.tail):
                left.insert(0, (name, {**work, "micro_batch_size": fewer}))
                continue
            shown = {key: work[key] for key in ("micro_batch_size", "context") if key in work}
            row = {"contestant": name, **shown, **process.measured}
            if code != 0:
                failed.append(name)
                row.setdefault("error", f"exit code {code}")
                print(process.tail)
            report.row(**row)
    finally:
        waiting.end()
    if failed:
        raise RuntimeError(f"failed: {'; '.join(failed)}")


def timed(step: Callable[[int], int], steps: int, report: Report, device: str, flops: float | None = None) -> None:
    """Runs a peer's steps, and reports their rates.

    Args:
        step: trains on the batch of this number, and returns its tokens.
        flops: of a token; None: no MFU.
    """
    import torch
    from device_times import GIB, peak_flops, speed

    ends, tokens = [time.monotonic()], []
    try:
        for number in range(WARM_UP + steps):
            tokens.append(step(number))
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.monotonic())
    except torch.OutOfMemoryError as error:
        report(out_of_memory=str(error).splitlines()[0][:80])
        raise
    seconds = [after - before for before, after in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]
    report(seconds_to_first_step=ends[1] - ends[0])
    report(**speed(seconds, statistics.mean(tokens[WARM_UP:]), flops or 0.0, peak_flops() if flops else None))
    if device == "cuda":
        report(peak_gib=torch.cuda.max_memory_allocated() / GIB)


def ours(config: Mapping[str, Any], directory: Path) -> None:
    """Runs `fit` with a configuration whose callback reports and ends the process."""
    import paper_run

    file = paper_run.write_configuration(config, directory / "config.yaml")
    os.chdir(directory)
    from lightning_danube.__main__ import main

    raise RuntimeError(f"fit ended with {main(['fit', '--config', str(file)])} before its steps were measured")


def new_directory(options: Options, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{name.replace(',', '').replace(' ', '-')}-", dir=options["scratch"]))


# --- training ---------------------------------------------------------------------------------------------------------


def training(model: str, report: Report, options: Options) -> None:
    """Pre-training steps of a model: `fit` in each way that there is, then the peers."""
    import paper_run

    recompute = model == "danube3-4b"
    rows, planned = rows_that_fit(model, recompute, options)
    report(rows_at_once=rows, plan_gib=planned)
    if rows == 0:
        report(left_out=f"one row needs {planned:.1f} GiB by plan's arithmetic, more than this GPU has")
        return
    variants = [f"danube, {name}" for name in paper_run.known_variants()]
    default = "compiled" if paper_run.compiles_as_configured() else "eager"
    variants.remove(f"danube, {default}")  # is what is configured
    if not is_installed("torchao"):
        variants.remove("danube, compiled, float8")
        report(float8="left out: torchao is not installed")
    peers = ["transformers, compiled", "transformers"]
    if recompute:
        report(litgpt="left out: its model does not recompute activations")
    elif is_installed("litgpt"):
        peers.insert(0, "LitGPT, compiled")
    else:
        report(litgpt="left out: not installed")
    # What is asked first of all comes first, in case the part comes to its limit.
    names = [*variants[:2], *peers, *variants[2:]]
    contest(report, options, names, FIT, model=model, recompute=recompute, micro_batch_size=rows)


def rows_that_fit(model: str, recompute: bool, options: Options) -> tuple[int, float]:
    """Returns the rows of a micro-batch, as configured or fewer, and GiB that `plan`'s arithmetic counts for them.

    With recomputation more rows cost little, so as many as fit. No row: 0, and what one would take.
    """
    import torch

    from lightning_danube.model import PRESETS
    from lightning_danube.planning.memory import TrainingMemory
    from lightning_danube.planning.run import USABLE

    if options["rehearse"]:
        return 2, 0.0
    capacity = USABLE * torch.cuda.get_device_properties(0).total_memory
    return most_rows(
        lambda rows: (
            TrainingMemory(PRESETS[model], rows, 8192, "bf16-mixed", recompute=recompute, gpu=True).peak().total
        ),
        8 if recompute else 6,
        capacity,
    )


def most_rows(bytes_of: Callable[[int], int], most: int, capacity: float) -> tuple[int, float]:
    for rows in range(most, 0, -1):
        if bytes_of(rows) <= capacity:
            return rows, bytes_of(rows) / 2**30
    return 0, bytes_of(1) / 2**30


def steps_of(options: Options) -> int:
    return 2 if options["rehearse"] else 8


def danube_training(variant: str, report: Report, options: Options) -> None:
    import paper_run

    directory = new_directory(options, variant)
    steps, rows = steps_of(options), options["micro_batch_size"]
    config = paper_run.configuration(
        options["model"],
        directory,
        steps=steps + WARM_UP + 1,
        device=device_of(options),
        tiny=options["rehearse"],
        model=paper_run.known_variants()[variant],
        data={"micro_batch_size": rows},
        recorder={"steps": steps, "profile": False},
    )
    ours(config, directory)


def work_of(options: Options) -> Any:
    """Returns the decoder's shape, rows and context of a peer's step."""
    import training as peers

    from lightning_danube.model import PRESETS, DecoderConfig

    if options["rehearse"]:
        return peers.Work(DecoderConfig(64, 96, 2, 4, 2, vocab_size=1000), 2, 64)
    config = dataclasses.replace(PRESETS[options["model"]], max_position_embeddings=8192)
    return peers.Work(config, options["micro_batch_size"], 8192)


def transformers_training(compiled: bool, report: Report, options: Options) -> None:
    """LlamaForCausalLM under autocast with fused AdamW, in a plain loop."""
    import torch
    import training as peers

    work, device = work_of(options), device_of(options)
    with torch.device(device):
        model = peers.transformers_model(work).train()
    if options["recompute"]:
        model.gradient_checkpointing_enable()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    batches = peers.batches(work, device)

    def step(number: int) -> int:
        inputs, _ = next(batches)
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=inputs, labels=inputs).loss
        peers.update(loss, model, optimizer)
        return int(inputs.numel())

    timed(step, steps_of(options), report, device, work.flops / work.tokens)


def litgpt_training(report: Report, options: Options) -> None:
    """LitGPT's model, compiled as its own `pretrain` does, with its chunked loss and fused AdamW, in a plain loop."""
    import torch
    import training as peers
    from litgpt.utils import chunked_cross_entropy

    work, device = work_of(options), device_of(options)
    with torch.device(device):
        model = peers.litgpt_model(work)
    forward = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = peers.batches(work, device)

    def step(number: int) -> int:
        inputs, labels = next(batches)
        with torch.autocast(device, torch.bfloat16):
            loss = chunked_cross_entropy(forward(inputs), labels)
        peers.update(loss, model, optimizer)
        return int(inputs.numel())

    timed(step, steps_of(options), report, device, work.flops / work.tokens)


# --- attention and decoding -------------------------------------------------------------------------------------------


def attention(report: Report, options: Options) -> None:
    """Forward and backward at 8,192 tokens, then a decoding step's attention; the peers are PyTorch's kernels."""
    import attention_kernels
    import torch

    first_contact.attention(report, options)
    device = device_of(options)
    shapes = [(4, 2, 16)] if options["rehearse"] else attention_kernels.SHAPES
    for heads, kv_heads, channels in shapes:
        for context in (64,) if options["rehearse"] else (512, 2048, 8192):
            drawn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
            q, k, v = (
                drawn(1, count, tokens, channels).to(device, torch.bfloat16)
                for count, tokens in ((heads, 1), (kv_heads, context), (kv_heads, context))
            )
            for name, kernel in attention_kernels.decoding_kernels(device, heads // kv_heads, context).items():
                row = {"shape": f"{heads} on {kv_heads} × {channels}, one token after {context:,}", "kernel": name}
                try:
                    seconds = statistics.median(attention_kernels.time_of_step(kernel, q, k, v) for _ in range(3))
                except RuntimeError as error:
                    report.row(**row, why=str(error).splitlines()[0][:80])
                    continue
                report.row(**row, ms=1e3 * seconds, gb_per_second=(k.nbytes + v.nbytes) / 1e9 / max(seconds, 1e-9))


def decoding(report: Report, options: Options) -> None:
    """The 500M in bfloat16, greedy, beside transformers' `generate`, eager and with its static, compiled cache."""
    import generation
    import torch

    from lightning_danube.model import DecoderConfig

    shape, dtype, prompts = "danube3-500m", torch.bfloat16, [128, 1024]
    device, new, rounds = device_of(options), 128, 3
    if options["rehearse"]:
        generation.SHAPES["tiny"] = DecoderConfig(64, 96, 2, 4, 2, vocab_size=30000)
        shape, dtype, prompts, new, rounds = "tiny", torch.float32, [8], 4, 1
    speed = generation.bytes_a_second(device) if device == "cuda" else None
    report(memory_gb_per_second=None if speed is None else speed / 1e9)
    for rows in (1, 8):
        arguments = Namespace(
            weights=None, shape=shape, device=device, compiled=not options["rehearse"], rows=rows,
            prompt_tokens=prompts, new_tokens=new, rounds=rounds, threads=1,
        )  # fmt: skip
        with torch.inference_mode():
            contestants, config, _ = generation.open_contestants(arguments, dtype, Path(options["scratch"]))
            contestants.pop("llama.cpp", None)
            for length in prompts:
                ids = torch.randint(3, 30000, (length,), generator=torch.Generator().manual_seed(0)).tolist()
                results = generation.measured(contestants, ids, arguments)
                read = generation.bytes_a_step(config, dtype.itemsize, rows, length + new // 2)
                for name, measured in results.items():
                    prefill, decode = (statistics.median(each[place] for each in measured) for place in (0, 1))
                    report.row(
                        contestant=name, rows=rows, prompt=length, prefill_tokens_per_second=prefill,
                        decode_tokens_per_second=decode,
                        of_the_memory=None if speed is None else decode / rows * read / speed,
                    )  # fmt: skip


# --- tuning -----------------------------------------------------------------------------------------------------------


def write_weights(directory: Path, options: Options) -> Path:
    """Writes a model of random weights with Mistral's tokenizer, as `--weights` takes it."""
    import torch
    from paper_run import TINY_DECODER, tokenizer_here

    from lightning_danube.model import PRESETS, Decoder, DecoderConfig
    from lightning_danube.tokens.tokenizer import load_hf_tokenizer
    from lightning_danube.weights.huggingface import save_hf

    tokenizer = load_hf_tokenizer(tokenizer_here())
    config = dataclasses.replace(PRESETS["danube3-500m"], max_position_embeddings=8192)
    if options["rehearse"]:
        config = DecoderConfig(**TINY_DECODER, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    with torch.device(device_of(options)):
        decoder = Decoder(config).to(torch.bfloat16)
    save_hf(decoder.cpu(), directory / "weights", tokenizer)
    return directory / "weights"


def chat_lengths(context: int, count: int = 400) -> list[int]:
    """Returns lengths of conversations in words: most are short, some fill the context."""
    import random

    rng = random.Random(0)
    return [min(int(rng.lognormvariate(4.6, 0.9)) + 8, context // 4) for _ in range(count)]


def chats(report: Report, options: Options) -> None:
    """Whole-model tuning on packed conversations, as configured and at 8,192 tokens, beside padded rows."""
    weights = str(write_weights(Path(options["scratch"]), options))
    for context, rows in ((64, 2),) if options["rehearse"] else ((2048, 8), (8192, 2)):
        names = ["danube, packed chats", "transformers, padded chats"]
        contest(report, options, names, FIT, weights=weights, context=context, micro_batch_size=rows)


def danube_chats(report: Report, options: Options) -> None:
    import random

    import yaml

    directory, steps = new_directory(options, "chats"), steps_of(options)
    rng, file = random.Random(1), directory / "chats.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number, words in enumerate(chat_lengths(options["context"], 200 if options["rehearse"] else 4000)):
            drawn = [f"{number}", *("".join(rng.choices("abcdefgh", k=4)) for _ in range(words))]
            half = max(1, words // 3)
            turns = {"user": " ".join(drawn[:half]), "assistant": " ".join(drawn[half:])}
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            lines.write(json.dumps({"messages": messages}) + "\n")
    config = yaml.safe_load((ROOT / "configs" / "sft" / "danube3-500m.yaml").read_text(encoding="utf-8"))
    config["data"]["init_args"] |= {
        "context_length": options["context"],
        "batch_rows": options["micro_batch_size"],
        "micro_batch_size": options["micro_batch_size"],
        "sources": {"chats": {"path": str(file), "shape": "messages"}},
        "epochs": 20,
    }
    config["model"]["init_args"] |= {
        "weights": options["weights"],
        "learning_rate": {"peak": 1e-5, "final": 0.0, "warmup": 0},
    }
    ours(tuned(config, directory, options, steps), directory)


def tuned(config: dict[str, Any], directory: Path, options: Options, steps: int) -> dict[str, Any]:
    """Returns a configuration of a tuning task on this device, with the callback that measures."""
    trainer = config["trainer"]
    trainer |= {"accelerator": "gpu" if device_of(options) == "cuda" else "cpu", "devices": 1}
    trainer |= {"num_sanity_val_steps": 0, "precision": "32-true" if options["rehearse"] else "bf16-mixed"}
    recorder = {"steps": steps, "profile": False}
    trainer["callbacks"].append({"class_path": "paper_run.StepRecorder", "init_args": recorder})
    return {**config, "runs": str(directory / "runs")}


def transformers_chats(report: Report, options: Options) -> None:
    """The same weights in LlamaForCausalLM on rows of one conversation each, padded to the longest, in a plain loop."""
    import torch
    import training as peers
    from transformers import LlamaForCausalLM

    device, rows = device_of(options), options["micro_batch_size"]
    model = LlamaForCausalLM.from_pretrained(options["weights"], dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    # Two pieces a word, about what the made-up words have.
    lengths = [min(2 * words, options["context"]) for words in chat_lengths(options["context"])]
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> int:
        chosen = torch.tensor(lengths[number * rows : (number + 1) * rows])
        ids = torch.randint(3, model.config.vocab_size, (rows, int(chosen.max())), generator=generator)
        mask = torch.arange(ids.shape[1])[None] < chosen[:, None]
        labels = ids.masked_fill(~mask, -100).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), labels=labels).loss
        peers.update(loss, model, optimizer)
        return int(mask.sum())

    timed(step, steps_of(options), report, device)


def classification(report: Report, options: Options) -> None:
    """LoRA on texts of 8,192 tokens with recomputation, one text a step, beside transformers and peft."""
    weights = str(write_weights(Path(options["scratch"]), options))
    names = ["danube, classification", "transformers, classification"]
    contest(
        report, options, names, FIT, weights=weights, context=64 if options["rehearse"] else 8192, micro_batch_size=1
    )


def danube_classification(report: Report, options: Options) -> None:
    import random

    import yaml

    directory, steps, rng = new_directory(options, "classification"), steps_of(options), random.Random(1)
    file = directory / "texts.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(60):
            # Longer than the context, at which texts are cut.
            words = [
                f"{number}",
                *("".join(rng.choices("abcdefgh", k=4)) for _ in range(options["context"] // 2 + 200)),
            ]
            lines.write(json.dumps({"text": " ".join(words), "label": f"class {number % 3}"}) + "\n")
    config = yaml.safe_load((ROOT / "configs" / "classification" / "patent-paper.yaml").read_text(encoding="utf-8"))
    data = config["data"]["init_args"]
    for role in ("validation", "test"):
        data.pop(role)
    data |= {"train": str(file), "context_length": options["context"], "epochs": 5}
    config["model"]["init_args"]["weights"] = options["weights"]
    ours(tuned(config, directory, options, steps), directory)


def transformers_classification(report: Report, options: Options) -> None:
    import torch
    import training as peers
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import LlamaForSequenceClassification

    device = device_of(options)
    base = LlamaForSequenceClassification.from_pretrained(
        options["weights"], num_labels=3, pad_token_id=0, dtype=torch.float32
    )
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(TaskType.SEQ_CLS, r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model = get_peft_model(base, lora).to(device).train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> int:
        ids = torch.randint(3, base.config.vocab_size, (1, options["context"]), generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=torch.tensor([number % 3], device=device)).loss
        peers.update(loss, model, optimizer)
        return int(ids.numel())

    timed(step, steps_of(options), report, device)


PARTS = (
    Step("attention", 300, attention, "attention, forward and backward, and of a decoding step, by kernel"),
    Step("training-500m", 450, partial(training, "danube3-500m"), "pre-training of the 500M at 8,192 tokens", FIT),
    Step("training-4b", 450, partial(training, "danube3-4b"), "the 4B with recomputation at 8,192 tokens", FIT),
    Step("decoding", 300, decoding, "generation with the 500M, one row and eight", ("generation",)),
    Step("chats", 300, chats, "tuning the 500M on packed conversations", ("paper_run",)),
    Step("classification", 300, classification, "LoRA on texts of 8,192 tokens", ("paper_run",)),
)


def contestants() -> list[Step]:
    """Returns the processes that `contest` starts."""
    import paper_run

    found: dict[str, Contestant] = {
        f"danube, {name}": partial(danube_training, name) for name in paper_run.known_variants()
    }
    found |= {
        "transformers": partial(transformers_training, False),
        "transformers, compiled": partial(transformers_training, True),
        "LitGPT, compiled": litgpt_training,
        "danube, packed chats": danube_chats,
        "transformers, padded chats": transformers_chats,
        "danube, classification": danube_classification,
        "transformers, classification": transformers_classification,
    }
    return [Step(name, 0, run, "") for name, run in found.items()]


def is_done(file: Path) -> bool:
    """Whether the part was measured to its end, by the records of `run_steps`."""
    if not file.is_file():
        return False
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return bool(lines) and bool(lines[-1].get("ok"))


def gather(out: Path, rehearsal: bool) -> None:
    """Writes the newest table of each part into one file."""
    pages = []
    for part in PARTS:
        files = [file for file in out.glob(f"{part.name}-*.md") if file.stem.endswith("-rehearsal") == rehearsal]
        if files:
            newest = max(files, key=lambda file: file.stat().st_mtime)
            pages.append(f"## {part.name}\n\n{newest.read_text(encoding='utf-8')}")
    (out / ("tables-rehearsal.md" if rehearsal else "tables.md")).write_text("\n".join(pages), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(names)}; all if not given")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of the results"
    )
    parser.add_argument("--again", action="store_true", help="also parts that this commit has measured")
    parser.add_argument("--rehearse", action="store_true", help="on this CPU, with tiny shapes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each part ({SECONDS:.0f})")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child([*PARTS, *contestants()], arguments.child)
    if unknown := sorted(set(arguments.parts) - set(names)):
        parser.error(f"there is no part {unknown[0]}: the parts are {', '.join(names)}")
    if not arguments.rehearse and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        print("error: there is no NVIDIA GPU here; --rehearse runs the parts on this CPU", file=sys.stderr)
        return 2
    facts, all_good = about(arguments.rehearse), True
    ending = f"{facts['commit']}{'-rehearsal' if arguments.rehearse else ''}"
    with carried_packages(WHEELS) as site:
        for part in (part for part in PARTS if not arguments.parts or part.name in arguments.parts):
            known = facts["commit"] != UNKNOWN and is_done(arguments.out / f"{part.name}-{ending}.jsonl")
            if known and not arguments.again:
                print(f"{part.name}: is measured at commit {facts['commit']}; --again measures it again")
                continue
            with tempfile.TemporaryDirectory(prefix="gpu-parts-") as scratch:
                (record,) = run_steps(
                    [part],
                    arguments.out,
                    f"{part.name}-{ending}",
                    script=Path(__file__).resolve(),
                    seconds=arguments.seconds,
                    slack=10.0,  # up to all the seconds of the part
                    options={"rehearse": arguments.rehearse, "scratch": scratch, "seconds": arguments.seconds},
                    environment=environment_of(site, scratch, arguments.rehearse),
                    about=facts,
                )
            all_good &= record["ok"]
            gather(arguments.out, arguments.rehearse)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
