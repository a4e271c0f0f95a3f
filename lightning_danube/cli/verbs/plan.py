"""`plan`: reports the memory, time, money and text that a pre-training run of a configuration would need."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_danube.cli.verbs.configuration import add_configuration
from lightning_danube.planning.accelerators import ACCELERATORS, Accelerator, parse_accelerator, this_cpu
from lightning_danube.terminal import show, text_table

if TYPE_CHECKING:
    from lightning_danube.planning.memory import DeviceMemory, TrainingMemory
    from lightning_danube.planning.run import TrainerSection
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
        "hour the cost is told; may be repeated (all, without prices)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="share of the peak that the model's own arithmetic reaches (0.4, an assumption: measure it)",
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
    if not 0 < arguments.utilisation <= 1:
        raise ValueError(f"--utilisation is {arguments.utilisation}: a share of the peak, above 0 and at most 1")
    if not arguments.write_speed > 0:
        raise ValueError(f"--write-speed is {arguments.write_speed}: give GB a second, above 0")
    accelerators = [parse_accelerator(text) for text in arguments.accelerator or ACCELERATORS]
    every_known = not arguments.accelerator

    from lightning_danube.cli.configs import planned_run
    from lightning_danube.planning.memory import BYTES
    from lightning_danube.pretraining.supply import parse_source_tokens, supplies

    planned = planned_run(arguments.config, arguments.overrides)
    data, model = planned.data, planned.model
    supply = supplies(data, parse_source_tokens(arguments.source_tokens, data.sources))
    memory, notes = _memory(planned.trainer, data, model)
    if every_known and planned.trainer.accelerator == "cpu":
        accelerators.insert(0, this_cpu(memory.precision, memory.layout.devices))
        notes.append(f"{accelerators[0].name}: the rate is that of its matrix products, just measured, not a peak")
    sections = [
        _model(planned.name, model, data, memory),
        _stages(data, supply),
        _texts(data, supply),
        _parts(memory),
        _accelerators(accelerators, memory, data, arguments.utilisation),
        _checkpoints(accelerators, memory, data, planned.trainer, arguments),
    ]
    show("\n\n".join(sections))
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
        f"run: {data.total_tokens:,} tokens in {steps:,} steps of {data.batch_tokens:,} "
        f"({layout.replicas} × {data.batch_samples // held} × {data.micro_batch_size} rows of {data.context_length:,})",
        f"arithmetic: {flops:.4g} FLOPs a token at {data.context_length:,} tokens of context, forward and backward, "
        f"{total:.4g} in all",
        f"key-value cache, when it writes: {config.cache_bytes(1):,} bytes a token, "
        f"{_size(config.cache_bytes(data.context_length))} for {data.context_length:,} (16 bits)",
    ]
    return "\n".join(lines)


def _size(bytes_: int) -> str:
    return f"{bytes_ / GIB:.2f} GiB" if bytes_ >= GIB / 100 else f"{bytes_ / MIB:.2f} MiB"


def _curriculum(data: CurriculumSettings, supply: dict[str, Supply]) -> Curriculum:
    from lightning_danube.pretraining.curriculum import Curriculum

    # A source of unknown size also takes its share; its number of passes is not shown.
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
    """Returns a table of the number of passes over each source at the end of each stage."""
    curriculum = _curriculum(data, supply)
    known = {name for name, s in supply.items() if s.rows(data.context_length)}
    after = [curriculum.passes_after(k + 1) for k in range(len(data.stages))]
    taken = {name: sum(span.samples_by_source[name] for span in curriculum.spans) for name in curriculum.sources}
    rows, notes = [], []
    for name, s in supply.items():
        passes = [f"{passed[name]:.2f}" if name in known else "?" for passed in after]
        has = "?" if s.tokens is None else f"{s.tokens:,}"
        rows.append([name, f"{taken[name] * data.context_length:,}", has, s.said_by, *passes])
        if name in known and after[-1][name] > data.max_passes:
            notes.append(
                f"{name}: {after[-1][name]:.1f} passes are more than data.max_passes = {data.max_passes:g}: fit will "
                "refuse"
            )
    first, *others = (stage.name for stage in data.stages)
    header = ["source", "tokens taken", "training tokens", "said by", f"passes after {first}"]
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
    from lightning_danube.planning.memory import DeviceMemory, Layout

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
    lines.append(f"{what} activation checkpointing{compiled}, {memory.rows} rows of {memory.context:,} tokens at once")
    if not memory.recompute:
        selective, whole = (
            dataclasses.replace(memory, recompute="selective").peak().total,
            dataclasses.replace(memory, recompute=True).peak().total,
        )
        lines.append(
            f"model.init_args.activation_checkpointing: true would take {whole / size:.2f} {unit} in all, selective "
            f"{selective / size:.2f}"
        )
    return "\n".join(lines)


def _accelerators(
    accelerators: Sequence[Accelerator], memory: TrainingMemory, data: CurriculumSettings, utilisation: float
) -> str:
    from lightning_danube.planning.run import USABLE, fewest_devices, seconds_of

    devices = memory.layout.devices
    flops = memory.config.flops_per_token(data.context_length) * data.total_tokens
    peak, rows = memory.peak().total, []
    unit, seconds_of_unit = _unit([seconds_of(flops, devices, one, utilisation) for one in accelerators])
    for accelerator in accelerators:
        capacity = USABLE * accelerator.memory
        fewest = [fewest_devices(memory, data, capacity, sharded=sharded) for sharded in (False, True)]
        seconds = seconds_of(flops, devices, accelerator, utilisation)
        hours = seconds / 3600
        times = [
            _rounded(seconds / seconds_of_unit),
            _rounded(hours * devices),
            "" if accelerator.price is None else _rounded(hours * devices * accelerator.price),
        ]
        if _is_too_short(memory, data, accelerator, utilisation):
            times = [UNKNOWN, UNKNOWN, ""]
        rows.append(
            [
                accelerator.name,
                f"{accelerator.flops / 1e12:,.0f}" if accelerator.flops >= 1e13 else f"{accelerator.flops / 1e12:.2g}",
                f"{accelerator.memory / GIB:.0f}",
                "yes" if peak <= capacity else "no",
                *(f"{n:,}" if n else "none" for n in fewest),
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
    return text_table(header, rows) + (
        f"\nat {100 * utilisation:g} % of the dense 16-bit peak (--utilisation), {100 * USABLE:g} % of the memory for "
        "tensors; prices are those you gave, in their money"
        + (too_short if any(UNKNOWN in row for row in rows) else "")
    )


def _unit(seconds: Sequence[float]) -> tuple[str, int]:
    """Returns the largest unit of time in which the longest time is at least one."""
    units = {"days": 86400, "hours": 3600, "minutes": 60}
    return next((one for one in units.items() if max(seconds) >= one[1]), ("minutes", 60))


def _is_too_short(
    memory: TrainingMemory, data: CurriculumSettings, accelerator: Accelerator, utilisation: float
) -> bool:
    """Returns whether a step is too short for its arithmetic to predict its time."""
    from lightning_danube.planning.run import seconds_of

    flops = memory.config.flops_per_token(data.context_length) * data.batch_tokens
    return seconds_of(flops, memory.layout.devices, accelerator, utilisation) < SHORTEST_STEP


def _rounded(number: float) -> str:
    if 0 < number < 0.001:
        return "< 0.001"
    return f"{number:,.0f}" if number >= 1000 else f"{number:,.1f}" if number >= 10 else f"{number:.3g}"


def _checkpoints(
    accelerators: Sequence[Accelerator],
    memory: TrainingMemory,
    data: CurriculumSettings,
    trainer: TrainerSection,
    arguments: Namespace,
) -> str:
    from lightning_danube.planning.run import HOURS_BETWEEN_FAILURES, CheckpointAdvice, checkpoint_bytes, seconds_of

    size, devices = checkpoint_bytes(memory), memory.layout.devices
    advice = CheckpointAdvice(size, size / (arguments.write_speed * 1e9), HOURS_BETWEEN_FAILURES * 3600 / devices)
    flops = memory.config.flops_per_token(data.context_length) * data.batch_tokens
    interval = trainer.save_interval
    every = None if interval is None else interval.steps(data.total_tokens, data.batch_tokens)
    what = "weights" if memory.lora is None else "the adapter"
    written = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    lines = [
        f"checkpoint: {written} ({what} and the optimizer's averages), {advice.write:,.1f} s at "
        f"{arguments.write_speed:g} GB/s (--write-speed)",
        f"a failure about every {advice.between_failures / 3600:,.0f} h: one in {HOURS_BETWEEN_FAILURES:,.0f} h of a "
        "device, as in the training of Llama 3 (arXiv 2407.21783)",
    ]
    rows = []
    for accelerator in accelerators:
        if _is_too_short(memory, data, accelerator, arguments.utilisation):
            continue
        seconds = seconds_of(flops, devices, accelerator, arguments.utilisation)
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
