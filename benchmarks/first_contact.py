"""What a new GPU has to show in its first seven minutes: nine steps, each in a separate process.

    make gpu-check                       or: python3 benchmarks/first_contact.py
    make gpu-check ARGS=--rehearse       the same on this CPU, with tiny shapes, in two minutes

A step that fails or comes to its limit keeps what it has measured, and the next step begins. `--out` gets
`first-contact.jsonl` (a line a step), `first-contact.md` (a table, written again after each step) and
`first-contact.log` (all output). The caches of compilers are empty at the beginning, as on a new machine.

It needs PyTorch, Lightning and the packages around them, and no network. Small packages that the machine lacks can be
brought as wheels: `make gpu-wheels` puts them into the folder wheels, and this script takes what is missing from there
into a folder of its own, without a change to the environment. `--rehearse` proves that the steps run, and nothing about
a GPU or a compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Run as a file on a machine where the package is not installed.
for folder in (str(ROOT / "benchmarks"), str(ROOT)):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from steps import SLACK, Process, Report, Step, child, run_steps  # noqa: E402  (after the lines above)

SECONDS = 420.0
WHEELS = ROOT / "wheels"
UNKNOWN = "unknown"
"""The commit, where the repository's history is not there."""
FIT = ("paper_run", "lightning_danube.cli.trainer_verbs", "lightning_danube.pretraining", "lightning_danube.callbacks")
"""What the process of a step that trains imports while it waits."""
PACKAGES = ("torch", "triton", "lightning", "transformers", "peft", "torchmetrics", "numpy", "pyarrow", "datasets",
            "tokenizers", "jsonargparse", "omegaconf", "litgpt", "torchao", "flash-attn")  # fmt: skip
Options = Mapping[str, Any]


def device_of(options: Options) -> str:
    return "cpu" if options["rehearse"] else "cuda"


# --- 1: what is here --------------------------------------------------------------------------------------------------


def versions(report: Report, options: Options) -> None:
    import torch
    from device_times import copy_gb_per_second, product_tflops

    report(python=platform.python_version(), packages=installed(PACKAGES))
    report(compilers={name: shutil.which(name) is not None for name in ("gcc", "g++", "nvcc")}, cores=os.cpu_count())
    if device_of(options) == "cuda":
        properties = torch.cuda.get_device_properties(0)
        report(
            gpu=properties.name,
            gib=properties.total_memory / 2**30,
            multiprocessors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            bf16=torch.cuda.is_bf16_supported(),
        )
        report(product_tflops=product_tflops(), copy_gb_per_second=copy_gb_per_second())
    cannot = modules_that_cannot_be_imported()
    for module, why in cannot.items():
        report.row(module=module, why=why)
    report(modules_not_imported=len(cannot))
    unexpected = {module for module, why in cannot.items() if not may_be_missing(why)}
    if unexpected:
        raise RuntimeError(f"these modules cannot be imported: {', '.join(sorted(unexpected))}")


def installed(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "–"
    return found


def modules_that_cannot_be_imported() -> dict[str, str]:
    """Returns module → what it lacks, over the whole package: every verb, task, callback and format."""
    import lightning_danube

    found = {}
    for module in pkgutil.walk_packages(lightning_danube.__path__, "lightning_danube.", onerror=lambda name: None):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            found[module.name] = f"no {error.name}"
        except Exception as error:
            found[module.name] = str(error).splitlines()[0][:120]
    return found


def may_be_missing(why: str) -> bool:
    """Whether a module lacks only what an extra brings, or what has no wheel for some machines."""
    from lightning_danube.extras import MODULES

    optional = {module for modules in MODULES.values() for module in modules} | {"bitsandbytes", "gguf", "triton"}
    return any(re.search(rf"\b{re.escape(module)}\b", why) for module in optional)


# --- 2: the same numbers as in float64 on the CPU ---------------------------------------------------------------------

INITIALIZER = 0.06
BOUNDS = {"float32": 1e-4, "bf16": 5e-2}
"""Largest allowed ‖difference‖ / ‖reference‖ of logits, loss and gradients.

On a CPU float32 has 1e-6, and the gradients under autocast to bf16 have 1.2e-2. A mask that is left out makes 1.1.
"""


def correctness(report: Report, options: Options) -> None:
    import torch

    device, tokens = device_of(options), 64 if options["rehearse"] else 256
    tests = None if options["rehearse"] else begin_tests_of_compiled_steps()
    wrong = []
    for documents in (False, True):
        reference = outcome(tiny_decoder(torch.float64), *tiny_batch(tokens, documents), precision="float64")
        for precision in ("float32", "bf16"):
            # A run compiles in bfloat16, so a compilation in float32 would only cost time.
            for compiled in (False,) if options["rehearse"] or precision == "float32" else (False, True):
                decoder = tiny_decoder(torch.float32).to(device)
                if compiled:
                    decoder.compile_blocks()
                batch = tuple(None if part is None else part.to(device) for part in tiny_batch(tokens, documents))
                with attention_operators() as ran:
                    found = outcome(decoder, *batch, precision=precision)
                errors = {name: relative_error(found[name], reference[name]) for name in reference}
                good = max(errors.values()) < BOUNDS[precision]
                report.row(
                    documents=documents,
                    precision=precision,
                    compiled=compiled,
                    **errors,
                    ok=good,
                    attention=sorted(ran),
                )
                if not good:
                    wrong.append(f"{precision}, documents {documents}, compiled {compiled}")
    if tests is not None:
        assert tests.stdout is not None
        said = tests.stdout.read()
        report(tests_of_compiled_steps=last_line(said))
        if tests.wait():
            print(said)
            wrong.append("tests/generation/test_compiled_steps.py")
    if wrong:
        raise RuntimeError(f"wrong: {'; '.join(wrong)}")


def tiny_decoder(dtype: Any) -> Any:
    """Returns a decoder of two layers with the paper's 96 channels a head; the same weights in each type."""
    import torch

    from lightning_danube.model import Decoder, DecoderConfig

    torch.manual_seed(0)
    # Weights larger than usual: otherwise the layers change little, and a mistake in them would not be seen.
    config = DecoderConfig(192, 256, 2, 4, 2, head_dim=96, vocab_size=512, initializer_range=INITIALIZER)
    return Decoder(config).to(dtype)


def tiny_batch(tokens: int, documents: bool) -> tuple[Any, Any, Any]:
    """Returns input ids, labels and document ids of two rows."""
    import torch

    ids = torch.randint(0, 512, (2, tokens + 1), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, tokens, dtype=torch.long)
    starts[0, [tokens // 5, tokens // 2]] = starts[1, [7, tokens // 3, tokens - 9]] = 1
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), starts.cumsum(1) if documents else None


def outcome(decoder: Any, inputs: Any, labels: Any, documents: Any, *, precision: str) -> dict[str, Any]:
    """Returns logits, loss and all gradients in one vector."""
    import torch

    from lightning_danube.model import next_token_loss

    kind = inputs.device.type
    runs = None if documents is None else runs_on(kind, documents)
    with torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext():
        hidden = decoder.hidden_states(inputs, document_ids_BT=documents, document_runs=runs)
        logits = decoder.lm_head(hidden)
        total, count = next_token_loss(hidden, decoder.lm_head.weight, labels)
    loss = total / count
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten().double() for parameter in decoder.parameters()])
    return {"logits": logits.detach(), "loss": loss.detach(), "gradients": gradients}


def runs_on(device: str, documents: Any) -> Any:
    """Returns the documents of each token as the data modules add them to a batch."""
    from lightning_danube.model.masks import runs_of

    runs = runs_of(documents.cpu())
    assert runs is not None, "the documents of these steps are runs"
    return runs._replace(starts_N1=runs.starts_N1.to(device))


def relative_error(found: Any, reference: Any) -> float:
    difference = (found.double().cpu() - reference.double().cpu()).norm() / reference.double().norm().cpu()
    return float(difference) if math.isfinite(difference) else math.inf


@contextmanager
def attention_operators() -> Iterator[set[str]]:
    """Fills a set with the attention operators and kernels that run inside."""
    from device_times import new_profiler

    found: set[str] = set()
    with new_profiler() as profiler:
        yield found
    found |= {kernel for entry in profiler.key_averages() if (kernel := attention_name(entry.key))}


def attention_name(key: str) -> str | None:
    """Returns a short name of an operator or kernel of attention; None for all others."""
    if key.startswith("aten::_scaled_dot_product") and "backward" not in key:
        return key.removeprefix("aten::_scaled_dot_product_")
    named = re.search(r"(fmha\w*|flash_fwd\w*|cudnn\w*sdpa\w*|varlen_attn\w*|flex_attention\w*|BlockedAttention)", key)
    return named[1][:60] if named else None


def begin_tests_of_compiled_steps() -> subprocess.Popen[str]:
    """Starts the tests of recorded and compiled decoding that need a GPU, beside the rest of the step."""
    which = ["-m", "slow or not slow", "-k", "cuda", "tests/generation/test_compiled_steps.py"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *which],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:200]


# --- 3: attention -----------------------------------------------------------------------------------------------------


def attention(report: Report, options: Options) -> None:
    """Each kernel by itself, so that one that takes minutes to compile costs only what comes after it."""
    import attention_kernels
    import torch

    device = device_of(options)
    shapes = [(4, 2, 16)] if options["rehearse"] else attention_kernels.SHAPES
    context, rounds = (128, 1) if options["rehearse"] else (8192, 3)
    for heads, kv_heads, channels in shapes:
        drawn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        q, k, v = (
            drawn(1, count, context, channels).to(device, torch.bfloat16).requires_grad_()
            for count in (heads, kv_heads, kv_heads)
        )
        tera = 7 * 2 * heads * context * context / 2 * channels / 1e12
        for name, kernel in attention_kernels.kernels(device, heads // kv_heads).items():
            shape = f"{heads} on {kv_heads} × {channels}, {context:,}"
            try:
                attention_kernels.time_of(kernel, q, k, v)
                seconds = sorted(attention_kernels.time_of(kernel, q, k, v) for _ in range(rounds))
            except RuntimeError as error:
                report.row(shape=shape, kernel=name, ms=None, tflops=None, why=str(error).splitlines()[0][:80])
                continue
            median = seconds[rounds // 2]
            report.row(shape=shape, kernel=name, ms=1e3 * median, tflops=tera / max(median, 1e-9))


# --- 4 and 5: training ------------------------------------------------------------------------------------------------


def training(other: bool, report: Report, options: Options) -> None:
    """`fit` with the 500M's configuration. The callback reports, and ends the process.

    Args:
        other: compile the blocks if the configuration does not, and the other way round.
    """
    import paper_run

    variant = "as configured"
    if other:
        variant = "eager" if paper_run.compiles_as_configured() else "compiled"
    directory = Path(options["scratch"]) / f"fit-{variant}".replace(" ", "-")
    directory.mkdir(parents=True, exist_ok=True)
    steps = 2 if options["rehearse"] else 10
    config = paper_run.configuration(
        "danube3-500m",
        directory,
        steps=steps + paper_run.WARM_UP + paper_run.PROFILED + 1,
        device=device_of(options),
        tiny=options["rehearse"],
        model=paper_run.known_variants()[variant],
        recorder={"steps": steps},
    )
    file = paper_run.write_configuration(config, directory / "config.yaml")
    arguments = config["data"]["init_args"]
    report(variant=variant, tokenizer=arguments["tokenizer"], micro_batch_size=arguments["micro_batch_size"])
    report(plan_gib=paper_run.planned_gib(file))
    os.chdir(directory)
    from lightning_danube.__main__ import main

    code = main(["fit", "--config", str(file)])
    raise RuntimeError(f"fit ended with {code} before its steps were measured")


# --- 6: the loss ------------------------------------------------------------------------------------------------------


def losses() -> dict[str, Callable[..., Any]]:
    """Returns name → a loss with the arguments of `next_token_loss`.

    Another form of the loss is a line here. Options that `next_token_loss` does not have are left out.
    """
    from lightning_danube.model import next_token_loss

    known = inspect.signature(next_token_loss).parameters
    wanted: dict[str, dict[str, Any]] = {
        "as configured": {},
        "chunks of 1,024": {"chunk_tokens": 1024},
        "chunks of 4,096": {"chunk_tokens": 4096},
        "chunks of 8,192": {"chunk_tokens": 8192},
        "fused": {"fused": True},
    }
    return {name: partial(next_token_loss, **given) for name, given in wanted.items() if set(given) <= set(known)}


def loss(report: Report, options: Options) -> None:
    """Forward and backward from hidden states and head on, under autocast as in a run of bf16-mixed."""
    import torch
    from device_times import peak_flops, with_peak

    device = device_of(options)
    tokens, width, vocabulary = (64, 32, 100) if options["rehearse"] else (6 * 8192, 1536, 32000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, tokens // 6, width, generator=generator).to(device).requires_grad_()
    head = (0.02 * torch.randn(vocabulary, width, generator=generator)).to(device).requires_grad_()
    labels = torch.randint(0, vocabulary, hidden.shape[:2], generator=generator).to(device)
    products = 6 * hidden.shape[0] * hidden.shape[1] * width * vocabulary
    if peak := peak_flops():
        report(products_alone_ms=1e3 * products / peak)
    for name, function in losses().items():

        def once(function: Callable[..., Any] = function) -> float:
            hidden.grad = head.grad = None
            with torch.autocast(device, torch.bfloat16):
                total, count = function(hidden, head, labels)
            (total / count).backward()
            return float(total.detach() / count)

        value = once()
        seconds, gib = with_peak(once, device)
        report.row(loss=name, ms=1e3 * seconds, gib_above=gib, nats=value)


# --- 7: a stop and a resume -------------------------------------------------------------------------------------------


def resume(report: Report, options: Options) -> None:
    """Two runs begin: one goes through, one gets SIGTERM after its second step. The third resumes the second."""
    import paper_run

    directory = Path(options["scratch"]) / "resume"
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "children.log"
    total, stop = 5, 2
    environment = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    whole, stopped, resumed = (Process(Path(__file__).resolve(), log, environment, FIT) for _ in range(3))
    try:
        files = {}
        for name, stop_after in (("whole", None), ("stopped", stop)):
            config = paper_run.configuration(
                "danube3-500m",
                directory,
                steps=total,
                device=device_of(options),
                tiny=options["rehearse"],
                # Three times half a minute of compilation would prove nothing more.
                model={"compile_blocks": False, **({} if options["rehearse"] else {"decoder": SMALL_DECODER})},
                data={} if options["rehearse"] else {"context_length": 2048, "micro_batch_size": 4},
                recorder={"stop_after": stop_after},
            )
            files[name] = paper_run.write_configuration({**config, "name": name}, directory / f"{name}.yaml")
        # The shards are made once, before two runs ask for them at the same time.
        from lightning_danube.__main__ import main

        main(["prepare", "--config", str(files["whole"])])
        whole.begin({"command": ["fit", "--config", str(files["whole"])]})
        stopped.begin({"command": ["fit", "--config", str(files["stopped"])]})
        report(code_of_the_stopped=stopped.wait(600))
        resumed.begin({"command": ["fit", "--config", str(files["stopped"]), "--ckpt_path", "last"]})
        report(code_of_the_whole=whole.wait(600), code_of_the_resumed=resumed.wait(600))
        found = [losses_by_step(process) for process in (whole, stopped, resumed)]
        report(**compare_resumed(*found, total=total, stop=stop))
    except Exception:
        print("".join(process.tail for process in (whole, stopped, resumed)))
        raise
    finally:
        for process in (whole, stopped, resumed):
            process.end()


SMALL_DECODER = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def losses_by_step(process: Process) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in process.measured.get("rows", [])}


def compare_resumed(
    whole: Mapping[int, float], stopped: Mapping[int, float], resumed: Mapping[int, float], *, total: int, stop: int
) -> dict[str, Any]:
    """Returns the largest relative difference between the losses of the whole run and of the one in two parts.

    Raises:
        RuntimeError: steps are missing, or trained twice, or the losses differ by more than what the order of a GPU's
            additions explains.
    """
    if sorted(whole) != list(range(1, total + 1)):
        raise RuntimeError(f"the whole run trained steps {sorted(whole)}, not 1 to {total}")
    if sorted([*stopped, *resumed]) != sorted(whole) or max(stopped) != stop:
        raise RuntimeError(f"steps {sorted(stopped)} came before the stop, and {sorted(resumed)} after the resume")
    both = {**stopped, **resumed}
    largest = max(abs(both[step] - whole[step]) / abs(whole[step]) for step in whole)
    if not largest < 1e-3:
        raise RuntimeError(f"the losses differ by up to {largest:.2g} of their values")
    return {"losses_equal_bit_by_bit": both == dict(whole), "largest_difference": largest, "steps": total}


# --- 8: documents -----------------------------------------------------------------------------------------------------


def documents(report: Report, options: Options) -> None:
    """Training steps of the 500M on two rows of packed documents, by what attention gets of them."""
    import torch
    from device_times import peak_flops, with_peak

    from lightning_danube.model import PRESETS, Decoder, DecoderConfig, next_token_loss
    from lightning_danube.planning.memory import TrainingMemory

    device = device_of(options)
    config, context = dataclasses.replace(PRESETS["danube3-500m"], max_position_embeddings=8192), 8192
    if options["rehearse"]:
        config, context = DecoderConfig(64, 96, 2, 4, 2, vocab_size=128), 96
    torch.manual_seed(0)
    with torch.device(device):
        decoder = Decoder(config)
    ids = torch.randint(0, config.vocab_size, (2, context + 1), generator=torch.Generator().manual_seed(0)).to(device)
    packed = packed_documents(2, context).to(device)
    report(documents_a_row=float(packed.max() + 1))
    plan = TrainingMemory(config, 2, context, "bf16-mixed", gpu=device == "cuda", document_masks=True)
    report(plan_activations_gib=plan.kept_bytes() / 2**30)
    states: dict[str, Any] = {}
    for name, forward in ways_to_mask(decoder, packed).items():

        def once(forward: Callable[[Any], Any] = forward) -> Any:
            decoder.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                hidden = forward(ids[:, :-1])
                total, count = next_token_loss(hidden, decoder.lm_head.weight, ids[:, 1:])
            (total / count).backward()
            return hidden.detach()

        try:
            states[name] = once()
            seconds, gib = with_peak(once, device)
        except torch.OutOfMemoryError as error:
            report.row(masks=name, ms=None, gib_above=None, why=str(error).splitlines()[0][:80])
            decoder.zero_grad()
            torch.cuda.empty_cache()
            continue
        flops = 2 * context * float(config.flops_per_token(context))
        peak = peak_flops()
        report.row(masks=name, ms=1e3 * seconds, gib_above=gib, mfu=None if peak is None else flops / seconds / peak)
    for name in ("as configured", "blocks"):
        if {name, "dense"} <= states.keys():
            difference = relative_error(states[name], states["dense"])
            report(**{f"{name}_beside_dense".replace(" ", "_"): difference})
            if difference > BOUNDS["bf16"]:
                raise RuntimeError(f"{name}: the hidden states differ by {difference:.2g} from those of the dense mask")


def packed_documents(rows: int, context: int, mean: int | None = None) -> Any:
    """Returns the documents of each token, (rows, context), of lengths as chats have them: many short, a few long."""
    import torch

    mean = mean or max(4, context // 12)
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(rows, context, generator=generator) < 1 / mean
    starts[:, 0] = False
    return starts.long().cumsum(1)


def ways_to_mask(decoder: Any, packed: Any) -> dict[str, Callable[[Any], Any]]:
    """Returns name → hidden states of input ids.

    `as configured`: with the runs that the data modules add; `blocks`: with the ids alone, for FlexAttention; `dense`:
    the decoder's forward pass with a mask of all pairs.
    """
    import torch

    from lightning_danube.model import document_mask

    def dense(ids: Any) -> Any:
        model = decoder.model
        hidden = model.embed_tokens(ids)
        cos, sin = model.rotary_emb(torch.arange(ids.shape[1], device=ids.device)[None], hidden.dtype)
        mask = document_mask(packed)
        for block in model.layers:
            hidden = block(hidden, cos, sin, mask)
        return model.norm(hidden)

    runs = runs_on(packed.device.type, packed)
    return {
        "none": lambda ids: decoder.hidden_states(ids),
        "as configured": lambda ids: decoder.hidden_states(ids, document_ids_BT=packed, document_runs=runs),
        "blocks": lambda ids: decoder.hidden_states(ids, document_ids_BT=packed),
        "dense": dense,
    }


# --- 9: generation ----------------------------------------------------------------------------------------------------


def decoding(report: Report, options: Options) -> None:
    """The 500M with random weights, greedy, one row: what `generate` runs, with and without `--compile`, twice each.

    On a GPU both are recorded as a CUDA graph. The first run of each records, and compiles.

    The compiled way is left out where the compiler is switched off, as in a rehearsal.
    """
    import generation
    import torch

    from lightning_danube.generation.compiled_steps import CompiledStep
    from lightning_danube.generation.packing import pack_for_generation
    from lightning_danube.model import PRESETS, Decoder, DecoderConfig

    device, dtype = device_of(options), torch.bfloat16
    config, prompt_tokens, new = PRESETS["danube3-500m"], 512, 128
    if options["rehearse"]:
        config, prompt_tokens, new, dtype = DecoderConfig(64, 96, 2, 4, 2, vocab_size=128), 16, 8, torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        decoder = Decoder(config).to(dtype).eval()
    pack_for_generation(decoder, rows=1)
    prompt = torch.randint(3, config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    bytes_a_step = generation.bytes_a_step(config, dtype.itemsize, 1, prompt_tokens + new // 2)
    bandwidth = None if options["rehearse"] else generation.bytes_a_second(device)
    report(memory_gb_per_second=None if bandwidth is None else bandwidth / 1e9, gb_a_token=bytes_a_step / 1e9)
    with torch.inference_mode():
        for name in ("as written",) if os.environ.get("TORCH_COMPILE_DISABLE") else ("as written", "compiled"):
            step = CompiledStep(decoder) if name == "compiled" else None
            for number in (1, 2):
                times = generation.ours(decoder, [prompt], new, step)
                rate = (new - 1) / (times[-1] - times[1])
                report.row(
                    generation=name,
                    run=number,
                    tokens_per_second=rate,
                    of_the_memory=None if bandwidth is None else rate * bytes_a_step / bandwidth,
                    first_token_ms=1e3 * (times[1] - times[0]),
                    whole_s=times[-1] - times[0],
                )


# --- the steps --------------------------------------------------------------------------------------------------------

STEPS = (
    Step("versions", 32, versions, "what is here, what is missing", FIT),
    Step("correctness", 75, correctness, "the numbers of float64 on the CPU; which attention kernels run"),
    Step("attention", 35, attention, "rates of the attention kernels at the paper's shapes"),
    Step("fit", 55, partial(training, False), "tokens/s, MFU, memory beside the plan's: 500M at 8,192 tokens", FIT),
    Step("fit, the other way", 40, partial(training, True), "what compiled blocks gain, and their start", FIT),
    Step("loss", 12, loss, "the loss alone, by the size of its chunks"),
    Step("resume", 50, resume, "a stop by a signal, and the same losses after it", ("paper_run",)),
    Step("documents", 36, documents, "masks of packed documents: time and memory"),
    Step("decoding", 60, decoding, "tokens/s of generation, and their share of the memory's speed", ("generation",)),
)


@contextmanager
def carried_packages(wheels: Path) -> Iterator[str | None]:
    """Yields a folder with the packages of the wheels that are not installed here, to be removed; None for no such."""
    files = sorted(wheels.glob("*.whl"))
    missing = [file for file in files if not is_installed(file.name.partition("-")[0])]
    if not missing:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="wheels-") as site:
        command = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", site]
        subprocess.run([sys.executable, "-m", "pip", *command, *map(str, missing)], check=True)
        print(f"from {wheels}: {', '.join(file.name.partition('-')[0] for file in missing)}", flush=True)
        yield site


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def about(rehearse: bool) -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "what": "a rehearsal on a CPU, with tiny shapes: no number here says anything about a GPU"
        if rehearse
        else "the first minutes on a GPU",
        "begun": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit.stdout.strip() or UNKNOWN,
    }


def environment_of(site: str | None, scratch: str, rehearse: bool) -> dict[str, str]:
    """Returns the variables of each step: what is carried, no network, empty caches of compilers.

    A rehearsal has one thread and compiles nothing: that would take most of its time, and tests do it.
    """
    paths = [str(ROOT), str(ROOT / "benchmarks"), *([site] if site else []), os.environ.get("PYTHONPATH", "")]
    own = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
    return {
        **({"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"} if rehearse else own),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "LIGHTNING_DANUBE_CACHE": f"{scratch}/cache",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="folder of the results"
    )
    parser.add_argument("--rehearse", action="store_true", help="on this CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", metavar="STEP", choices=[step.name for step in STEPS], help="these steps")
    parser.add_argument("--seconds", type=float, help="for all steps together (420)")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        return child(STEPS, arguments.child)
    if not arguments.rehearse and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        print("error: there is no NVIDIA GPU here; --rehearse runs the steps on this CPU", file=sys.stderr)
        return 2
    steps = [step for step in STEPS if arguments.only is None or step.name in arguments.only]
    with carried_packages(WHEELS) as site, tempfile.TemporaryDirectory(prefix="first-contact-") as scratch:
        records = run_steps(
            steps,
            arguments.out,
            "rehearsal" if arguments.rehearse else "first-contact",
            script=Path(__file__).resolve(),
            seconds=arguments.seconds or SECONDS,
            # A busy CPU is no reason for a rehearsal to fail.
            slack=8.0 if arguments.rehearse else SLACK,
            options={"rehearse": arguments.rehearse, "scratch": scratch},
            environment=environment_of(site, scratch, arguments.rehearse),
            about=about(arguments.rehearse),
        )
    return 0 if all(record["ok"] for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
