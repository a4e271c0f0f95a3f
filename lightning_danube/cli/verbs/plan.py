"""`plan`: reports the memory, time, money and text that a pre-training run of a configuration would need."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_danube.cli.verbs.configuration import add_configuration
from lightning_danube.planning.accelerators import ACCELERATORS, Accelerator, parse_accelerator, this_cpu
from lightning_danube.terminal import amount, show, text_table

if TYPE_CHECKING:
    from lightning_danube.planning.memory import DeviceMemory, TrainingMemory
    from lightning_danube.planning.run import Pace, TrainerSection
    from lightning_danube.pretraining.curriculum import Curriculum
    from lightning_danube.pretraining.settings import CurriculumSettings, PretrainingSettings
    from lightning_danube.pretraining.supply import Supply

GIB, MIB = 2**30, 2**20

SHORTEST_STEP = 0.01
"""Shortest predicted time of a step in seconds. Below it, starting the kernels on an accelerator (ms) dominates."""

UNKNOWN = "–"
"""Shown for a time that the arithmetic cannot predict."""


def add_arguments(parser: ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--accelerator",
        action="append",
        metavar="NAME[=PRICE]",
        help=f"{', '.join(ACCELERATORS)}, or FLOPS/MEMORY such as 400e12/64GiB; with the price of one device for an "
        "hour the cost is shown; may be repeated (all, without prices)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="share of the peak that the model's own arithmetic reaches, if you have measured it; without it the time "
        "is predicted from arithmetic, memory traffic and network",
    )
    parser.add_argument(
        "--network",
        type=float,
        default=400.0,
        metavar="GB/S",
        help="that a node sends to the others, in one direction, by all its adapters (400: eight of 400 Gb/s; one "
        "Ethernet adapter of 100 Gb/s is 12.5)",
    )
    parser.add_argument(
        "--source-tokens",
        metavar="SOURCE=TOKENS,…",
        help="tokens of sources without prepared shards, such as web=10T,wiki=6B",
    )
    parser.add_argument(
        "--write-speed",
        type=float,
        default=1.0,
        metavar="GB/S",
        help="at which a checkpoint is written (1 GB/s, an assumption)",
    )


def run(arguments: Namespace) -> None:
    if arguments.utilisation is not None and not 0 < arguments.utilisation <= 1:
        raise ValueError(f"--utilisation is {arguments.utilisation}: a share of the peak, above 0 and at most 1")
    if not arguments.write_speed > 0:
        raise ValueError(f"--write-speed is {arguments.write_speed}: give GB/s, above 0")
    if not arguments.network > 0:
        raise ValueError(f"--network is {arguments.network}: give GB/s of a node, above 0")
    accelerators = [parse_accelerator(text) for text in arguments.accelerator or ACCELERATORS]
    every_known = not arguments.accelerator

    from lightning_danube.cli.configs import planned_run
    from lightning_danube.planning.memory import BYTES
    from lightning_danube.planning.network import Network
    from lightning_danube.planning.run import mean_document, pace_of
    from lightning_danube.pretraining.supply import parse_source_tokens, supplies

    planned = planned_run(arguments.config, arguments.overrides)
    data, model = planned.data, planned.model
    supply = supplies(data, parse_source_tokens(arguments.source_tokens, data.sources))
    memory, notes = _memory(planned.trainer, data, model)
    if every_known and planned.trainer.accelerator == "cpu":
        accelerators.insert(0, this_cpu(memory.precision, memory.layout.devices))
        notes.append(f"{accelerators[0].name}: the rate is that of its matrix products, just measured, not a peak")
    of_a_node = planned.trainer.devices_of_a_node
    network = Network(0, min(of_a_node, memory.layout.devices), arguments.network * 1e9)
    document = mean_document(data, supply) if data.document_masks else None
    paces = [
        pace_of(memory, data, one, network, utilisation=arguments.utilisation, document=document)
        for one in accelerators
    ]
    sections = [
        _model(planned.name, model, data, memory),
        _stages(data, supply),
        _texts(data, supply),
        _parts(memory),
        _accelerators(accelerators, paces, memory, data, arguments.utilisation),
        _steps(accelerators, paces, memory, data, arguments.network, document),
        _checkpoints(accelerators, paces, memory, data, planned.trainer, arguments.write_speed),
    ]
    show("\n\n".join(section for section in sections if section))
    if BYTES[memory.precision][1] != 2:
        why = "" if planned.trainer.precision is not None else ", the fastest on this CPU"
        notes.append(
            f"the run computes in {memory.precision}{why}; the peaks are those of 16 bits: state one with "
            "--accelerator FLOPS/MEMORY for its time"
        )
    if notes:
        show("\n" + "\n".join(f"note: {note}" for note in notes))


def _memory(
    trainer: TrainerSection, data: CurriculumSettings, model: PretrainingSettings
) -> tuple[TrainingMemory, list[str]]:
    from lightning_danube.planning.memory import TrainingMemory
    from lightning_danube.planning.run import layout_of

    layout, notes = layout_of(trainer)
    gpu = trainer.accelerator != "cpu"
    compiled = gpu and model.compile_blocks is not False and model.lora is None
    memory = TrainingMemory(
        model.config,
        rows=data.micro_batch_size,
        context=data.context_length,
        precision=_precision(trainer),
        recompute=model.activation_checkpointing,
        accumulate=data.accumulation(layout.replicas) > 1,
        layout=layout,
        gpu=gpu,
        compiled=compiled,
        float8=model.float8,
        document_masks=data.document_masks,
        averages=model.optimizer.averages,
        orthogonalizes=model.optimizer.orthogonalizes,
        lora=model.lora,
        new_tokens=0 if model.continuation is None else len(model.continuation.pieces),
    )
    if model.lora is not None:
        notes.append(
            "the frozen weights need no gradients of their own, so the arithmetic of an adapter is up to a third less "
            "than the figures above, which are those of all weights"
        )
    return memory, notes


def _precision(trainer: TrainerSection) -> str:
    """Returns the configured precision, or the default of `fit`: this CPU's precision, or bf16-mixed elsewhere."""
    from lightning_danube.options import full_name

    if trainer.precision is not None:
        return full_name(trainer.precision)
    if trainer.accelerator != "cpu":
        return "bf16-mixed"
    from lightning_danube.training.precision import choose

    return choose("cpu").precision


def _model(name: str, model: PretrainingSettings, data: CurriculumSettings, memory: TrainingMemory) -> str:
    from lightning_danube.pretraining.settings import step_layout

    config = model.config
    flops = config.flops_per_token(data.context_length)
    total = data.total_tokens * flops
    steps = data.total_tokens // data.batch_tokens
    layout = memory.layout
    held = layout.replicas * data.micro_batch_size
    lines = [
        f"{name}: {config.num_hidden_layers} layers × {config.hidden_size:,} hidden, {config.num_attention_heads} "
        f"query and {config.num_key_value_heads} key-value heads, {config.parameters:,} parameters"
        + ("" if model.weights is None else f", from {model.weights}")
        + ("" if model.lora is None else f"; an adapter of {memory.trained_parameters:,} trains"),
        f"run: {data.total_tokens:,} tokens in {amount(steps, 'step')} of {data.batch_tokens:,} "
        f"({step_layout(layout.replicas, data.batch_samples // held, data.micro_batch_size, data.context_length)})",
        f"arithmetic: {flops:.4g} FLOPs/token at {data.context_length:,} tokens of context, forward and backward, "
        f"{total:.4g} in all",
        f"key-value cache, when it writes: {config.cache_bytes(1):,} bytes/token, "
        f"{_size(config.cache_bytes(data.context_length))} for {data.context_length:,} (16 bits)",
    ]
    return "\n".join(lines)


def _size(bytes_: int) -> str:
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 100 else f"{bytes_ / MIB:.2f} MiB"


def _curriculum(data: CurriculumSettings, supply: dict[str, Supply]) -> Curriculum:
    from lightning_danube.pretraining.curriculum import Curriculum

    # A source of unknown size also takes its share; its number of epochs is not shown.
    rows = {name: s.rows(data.context_length) or 1 for name, s in supply.items()}
    return Curriculum(
        data.stages, rows, context_length=data.context_length, batch_samples=data.batch_samples, seed=data.seed
    )


def _stages(data: CurriculumSettings, supply: dict[str, Supply]) -> str:
    """Returns a table of the stages: where each stage ends, and how much it takes from each source."""
    curriculum = _curriculum(data, supply)
    rows = []
    for span in curriculum.spans:
        shares = (f"{100 * span.samples_by_source[name] / span.samples:.2f} %" for name in curriculum.sources)
        rows.append(
            [
                span.name,
                f"{span.samples * data.context_length:,}",
                f"{span.stop * data.context_length:,}",
                f"{span.stop // data.batch_samples:,}",
                *shares,
            ]
        )
    return text_table(["stage", "tokens", "ends after token", "after step", *curriculum.sources], rows)


def _texts(data: CurriculumSettings, supply: dict[str, Supply]) -> str:
    """Returns a table of the number of epochs over each source at the end of each stage."""
    curriculum = _curriculum(data, supply)
    known = {name for name, s in supply.items() if s.rows(data.context_length)}
    after = [curriculum.passes_after(k + 1) for k in range(len(data.stages))]
    taken = {name: sum(span.samples_by_source[name] for span in curriculum.spans) for name in curriculum.sources}
    rows, notes = [], []
    for name, s in supply.items():
        epochs = [f"{passed[name]:.2f}" if name in known else "?" for passed in after]
        has = "?" if s.tokens is None else f"{s.tokens:,}"
        rows.append([name, f"{taken[name] * data.context_length:,}", has, s.said_by, *epochs])
        if name in known and after[-1][name] > data.max_epochs:
            notes.append(
                f"{name}: {after[-1][name]:.1f} epochs are more than data.max_epochs = {data.max_epochs:g}: fit will "
                "refuse"
            )
    if unknown := [name for name, s in supply.items() if s.tokens is None]:
        option = ",".join(f"{name}=10B" for name in unknown)
        notes.append(
            f"{', '.join(unknown)}: `prepare` counts the tokens. To see the epochs without it, give your own numbers: "
            f"--source-tokens {option}"
        )
    first, *others = (stage.name for stage in data.stages)
    header = ["source", "tokens taken", "training tokens", "said by", f"epochs after {first}"]
    table = text_table([*header, *(f"… {name}" for name in others)], rows)
    return "\n".join([table, *notes])


def _engine(memory: TrainingMemory) -> str:
    layout = memory.layout
    if layout.devices == 1:
        return "one device"
    parts = [f"{'FSDP2' if layout.sharded else 'DDP'} over {layout.replicas}"] if layout.replicas > 1 else []
    if layout.shard_size not in (None, layout.replicas):
        parts = [f"HSDP over {layout.replicas // layout.shares} × {layout.shares}"]
    if layout.tensor_parallel > 1:
        parts.append(f"tensor parallel over {layout.tensor_parallel}")
    return ", ".join(parts)


def _parts(memory: TrainingMemory) -> str:
    """Returns a table of the memory of one device by part, for the configured trainer and for alternatives."""
    from lightning_danube.planning.memory import IMPORTS, DeviceMemory, Layout, kept_beside_tensors

    columns: list[tuple[str, DeviceMemory]] = [(_engine(memory), memory.peak())]
    devices = memory.layout.devices
    if devices > 1:
        for layout in (Layout(devices), Layout(devices, sharded=True)):
            other = dataclasses.replace(memory, layout=layout)
            if layout != memory.layout:
                columns.append((_engine(other), other.peak()))
    unit, size = ("GiB", GIB) if memory.peak().total >= GIB else ("MiB", MIB)
    rows = [[part, *(f"{getattr(peak, part) / size:.2f}" for _, peak in columns)] for part in DeviceMemory.PARTS]
    rows.append(["in all", *(f"{peak.total / size:.2f}" for _, peak in columns)])
    rows.append(["greatest in", *(peak.moment for _, peak in columns)])
    lines = [text_table([f"{unit} on a device, {memory.precision}", *(name for name, _ in columns)], rows)]
    what = {False: "without", True: "with", "selective": "with selective"}[memory.recompute]
    compiled = ", with compiled blocks" if memory.compiled else ""
    lines.append(
        f"{what} activation checkpointing{compiled}, {amount(memory.rows, 'row')} of {memory.context:,} tokens at once"
    )
    if not memory.recompute:
        selective, whole = (
            dataclasses.replace(memory, recompute="selective").peak().total,
            dataclasses.replace(memory, recompute=True).peak().total,
        )
        lines.append(
            f"model.init_args.activation_checkpointing: true would take {whole / size:.2f} {unit} in all, selective "
            f"{selective / size:.2f}"
        )
    if not memory.gpu:
        lines.append(
            f"not counted: a process on a CPU also holds about {IMPORTS // MIB} MiB of libraries, and about "
            f"{kept_beside_tensors(memory.peak().total) // MIB} MiB for kernels, mapped files and the allocator"
        )
    return "\n".join(lines)


def _accelerators(
    accelerators: Sequence[Accelerator],
    paces: Sequence[Pace],
    memory: TrainingMemory,
    data: CurriculumSettings,
    utilisation: float | None,
) -> str:
    """Returns a table of the accelerators: whether the run fits, on how few, how long it takes and what it costs."""
    from lightning_danube.planning.run import USABLE, fitting_devices

    devices = memory.layout.devices
    peak, rows = memory.peak().total, []
    unit, seconds_of_unit = _unit([data.total_steps * pace.seconds for pace in paces])
    for accelerator, pace in zip(accelerators, paces, strict=True):
        capacity = USABLE * accelerator.memory
        hours = data.total_steps * pace.seconds / 3600
        times = [
            _rounded(3600 * hours / seconds_of_unit),
            _rounded(hours * devices),
            "" if accelerator.price is None else _rounded(hours * devices * accelerator.price),
        ]
        if pace.seconds < SHORTEST_STEP:
            times = [UNKNOWN, UNKNOWN, ""]
        rows.append(
            [
                accelerator.name,
                f"{accelerator.flops / 1e12:,.0f}" if accelerator.flops >= 1e13 else f"{accelerator.flops / 1e12:.2g}",
                f"{accelerator.memory / GIB:.0f}",
                "yes" if peak <= capacity else "no",
                *(fitting_devices(memory, data, capacity, sharded=sharded) for sharded in (False, True)),
                *times,
            ]
        )
    header = [
        f"{devices:,} ×",
        "TFLOP/s",
        "GiB",
        "fits",
        "fewest, DDP",
        "fewest, FSDP2",
        unit,
        "device-hours",
        "cost" if any(a.price is not None for a in accelerators) else "",
    ]
    too_short = (
        f"\n{UNKNOWN}: the arithmetic of a step takes less than {1000 * SHORTEST_STEP:g} ms there: it takes longer to "
        "start the kernels of the step, and how long is not known here; measure it with fit"
    )
    shares = sorted({one.share for one, pace in zip(accelerators, paces, strict=True) if pace.parts is None})
    if utilisation is not None:
        time = f"at {100 * utilisation:g} % of the dense 16-bit peak (--utilisation), "
    elif shares:
        time = f"at {' and '.join(f'{100 * share:g} %' for share in shares)} of the peak where no step is predicted, "
    else:
        time = ""
    return text_table(header, rows) + (
        f"\n{time}{100 * USABLE:g} % of the memory for tensors; prices are those you gave, in their money"
        + (too_short if any(UNKNOWN in row for row in rows) else "")
    )


def _steps(
    accelerators: Sequence[Accelerator],
    paces: Sequence[Pace],
    memory: TrainingMemory,
    data: CurriculumSettings,
    network: float,
    document: float | None,
) -> str:
    """Returns a table of the predicted parts of a step; empty if no step is predicted."""
    from lightning_danube.planning.step_time import StepTime

    layout, rows = memory.layout, []
    flops = memory.config.flops_per_token(data.context_length) * data.batch_tokens / layout.devices
    for accelerator, pace in zip(accelerators, paces, strict=True):
        if pace.parts is None or pace.seconds < SHORTEST_STEP:
            continue
        parts = [f"{100 * getattr(pace.parts, part) / pace.seconds:.1f} %" for part in StepTime.PARTS]
        done = [flops, flops + pace.parts.recomputed_flops]
        rows.append(
            [
                accelerator.name,
                f"{pace.seconds:,.2f}",
                *parts,
                f"{data.batch_tokens / layout.devices / pace.seconds:,.0f}",
                *(f"{100 * one / pace.seconds / accelerator.flops:.1f} %" for one in done),
            ]
        )
    if not rows:
        return ""
    header = ["a step", "seconds", *StepTime.PARTS, "tokens/s a device", "MFU", "HFU"]
    lines = [text_table(header, rows)]
    lines.append("MFU: the model's own FLOPs as a share of the dense 16-bit peak; HFU: with what is computed again")
    if layout.devices > 1:
        lines.append(f"network: a node sends {network:g} GB/s to the others (--network)")
    if document is not None:
        lines.append(f"documents are masked from each other: taken as {document:,.0f} tokens long on average")
    return "\n".join(lines)


def _unit(seconds: Sequence[float]) -> tuple[str, int]:
    """Returns the largest unit of time in which the longest time is at least one."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    return next((one for one in units.items() if max(seconds) >= one[1]), ("minutes", 60))


def _rounded(number: float) -> str:
    if 0 < number < 0.001:
        return "< 0.001"
    return f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def _checkpoints(
    accelerators: Sequence[Accelerator],
    paces: Sequence[Pace],
    memory: TrainingMemory,
    data: CurriculumSettings,
    trainer: TrainerSection,
    write_speed: float,
) -> str:
    """Returns when the run starts, what a checkpoint takes, and a table of how often to save one."""
    from lightning_danube.planning.saving import (
        HOURS_BETWEEN_FAILURES,
        CheckpointAdvice,
        checkpoint_bytes,
        seconds_of_copy,
        seconds_to_start,
    )

    size, devices = checkpoint_bytes(memory), memory.layout.devices
    advice = CheckpointAdvice(
        size,
        size / (write_speed * 1e9),
        HOURS_BETWEEN_FAILURES * 3600 / devices,
        seconds_of_copy(memory) if trainer.saves_in_background else None,
        seconds_to_start(memory) if memory.gpu else 0.0,
    )
    interval = trainer.save_interval
    every = None if interval is None else interval.steps(data.total_tokens, data.batch_tokens)
    what = "weights" if memory.lora is None else "the adapter"
    written = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    waits = "" if advice.copy is None else f"; training waits {advice.waits:,.1f} s for a copy"
    lines = [
        f"checkpoint: {written} ({what} and the optimizer's averages), {advice.write:,.1f} s at {write_speed:g} GB/s "
        f"(--write-speed){waits}",
        f"a failure about every {advice.between_failures / 3600:,.0f} h: one in {HOURS_BETWEEN_FAILURES:,.0f} h of a "
        "device, as in the training of Llama 3 (arXiv 2407.21783)",
    ]
    if memory.gpu:
        compiled = "with nothing compiled before" if memory.compiled else "without compiled blocks"
        ids = 2 * data.batch_tokens * trainer.devices_of_a_node / devices
        lines.append(
            f"start: about {advice.start:,.0f} s until the first step {compiled}, and what the data take; in a step a "
            f"thread reads {ids / 1e6:,.2f} MB of token ids on a node"
        )
    rows = []
    for accelerator, pace in zip(accelerators, paces, strict=True):
        seconds = pace.seconds
        if seconds < SHORTEST_STEP:
            continue
        steps = max(1, round(advice.interval / seconds))
        if steps >= data.total_steps:
            row = [accelerator.name, f"{seconds:,.2f}", "at its end", ""]
        else:
            row = [accelerator.name, f"{seconds:,.2f}", f"{steps:,}", f"{100 * advice.lost(steps * seconds):.2f} %"]
        if every is not None:
            row += [f"{100 * advice.lost(every * seconds):.2f} %"]
        rows.append(row)
    if not rows:
        return "\n".join([*lines, "the run is too short for a failure: a checkpoint at its end is enough"])
    header = ["", "seconds a step", "best: save every … steps", "time lost"]
    return "\n".join([*lines, text_table([*header, *([f"lost with {every:,}"] if every is not None else [])], rows)])
