"""Whether `plan`'s time is what training takes: predicted tokens/s beside those of runs.

    python benchmarks/plan_speed.py [--keep]

Takes a second of CPU time and no GPU. The runs are published ones, and this project's own on an H100 and an H200
(benchmarks/results/gpu). Constants of the prediction are in planning/step_time.py and planning/network.py with their
sources. What a run is known to have done differently from `fit` stands here, in its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lightning_danube.model.config import DecoderConfig
from lightning_danube.planning.accelerators import ACCELERATORS, Accelerator
from lightning_danube.planning.memory import Layout, TrainingMemory, head_dim
from lightning_danube.planning.network import Network
from lightning_danube.planning.step_time import MEAN_DOCUMENT, OURS, Kernels, step_time
from lightning_danube.terminal import show

RESULTS = Path(__file__).resolve().parent / "results"
BOUND = 0.15
H100, H200 = ACCELERATORS["h100"], ACCELERATORS["h200"]

NVL, SXM = 835e12, 989e12
"""Dense bf16 peaks of NVIDIA's H100 NVL and SXM, by its data sheet."""
LIMITED = dataclasses.replace(H100, name="H100, 500 W", flops=NVL, float8=2 * NVL, bandwidth=2.4e12)
"""torchtitan's machines have 96 GB of HBM2e with 2.4 TB/s and 500 W. The report says that the peak is between NVL and
SXM, and not where. The table takes the lower end."""

M500 = DecoderConfig.preset("danube3-500m")
LLAMA = DecoderConfig(4096, 14336, 32, 32, 8, vocab_size=128256)  # Llama 3.1 8B
DANUBE = DecoderConfig(2560, 6912, 24, 32, 8, vocab_size=32000, sliding_window=4096)  # H2O-Danube-1.8B
SMOLLM3 = DecoderConfig(2048, 11008, 36, 16, 4, vocab_size=128256, tie_word_embeddings=True, nope_interval=4)
DANUBES_ROWS = {2048: 0.7, 4096: 0.1, 8192: 0.1, 16384: 0.1}
"""Context → share of the tokens of H2O-Danube-1.8B."""

EVERY_SECOND = (1024 * 4096 + 4096**2 + 4096 * 14336) / (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
"""torchtitan's selective checkpointing computes every second product of a block again: those for keys, for attention's
output and for the gate's partner. This is their share of the FLOPs."""


def torchtitans_traffic(c: DecoderConfig) -> tuple[float, float]:
    """Returns the bytes that torchtitan's uncompiled kernels read and write for a token in a block: forward, backward.

    Its norms are six operations, most of them in float32. Its rotary positions are complex numbers. It repeats its
    key-value heads. tests/benchmarks/test_plan_speed.py counts the bytes of these operations.
    """
    heads, repeated = c.num_attention_heads + c.num_key_value_heads, 2 * c.num_attention_heads
    K, D, width = head_dim(c), c.hidden_size, c.intermediate_size
    # The copies read the heads that they repeat (and the sums of their gradients write those).
    copies = 2 * (repeated + 2 * c.num_key_value_heads)
    # 18 of 214: sums of the gradients of three and of two products.
    return 84 * D + (20 * heads + copies) * K + 10 * width, 214 * D + (20 * heads + copies) * K + 18 * width


EAGER_LOGITS = 36
"""Bytes that an uncompiled loss reads and writes for a 16-bit logit, which it casts to float32."""


NANOTRONS_LOGITS = 38 + 14
"""The same for Nanotron's loss (`_ShardedCrossEntropy`), forward and backward: a cast, a maximum, a difference, an
exponential, a sum and a quotient in float32; then a product and a cast back."""
NANOTRONS_GRADIENTS = 4 + 4 + 10 + 4
"""DDP copies a 16-bit gradient into its bucket and back. Nanotron adds it to a float32 gradient, which it sets to 0."""


def nanotrons_traffic(c: DecoderConfig, tensor_parallel: int) -> tuple[float, float]:
    """Returns the same for Nanotron's kernels with the settings of SmolLM3's published configuration.

    The code is github.com/huggingface/nanotron at commit fefb560 of its branch smollm3, of 2025-04-17, the day of the
    run's name. Of its two norms, the one before attention is not fused there (`input_layernorm = RMSNorm`), whatever
    the configuration says. The other norm and rotary positions are one kernel each, and three of four blocks have
    positions. Devices of a replica share the tokens of the residual stream. Queries and keys with values are two slices
    of one tensor, and so are gate and up.
    tests/benchmarks/test_plan_speed.py counts the bytes of the operations.
    """
    D, width = c.hidden_size / tensor_parallel, c.intermediate_size / tensor_parallel
    turned = 0.75 * (c.num_attention_heads + c.num_key_value_heads) * head_dim(c) / tensor_parallel
    sliced = (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim(c) / tensor_parallel
    # Norms, and two sums: of the residual stream, and of its gradients.
    forward, backward = 36 + 4 + 2 * 6, 92 + 6 + 2 * 6
    return forward * D + 4 * turned + 10 * width, backward * D + 4 * turned + 14 * sliced + 26 * width


@dataclass(frozen=True)
class Row:
    """A run, and what is predicted for it.

    Args:
        measured: tokens/s of one device.
        memory: shape, precision and layout; several with their shares of the tokens, if the run changed its context.
        micro_batches: of an optimizer step.
        document: mean tokens of a masked document.
    """

    name: str
    on: Accelerator
    measured: float
    memory: dict[TrainingMemory, float]
    micro_batches: int = 1
    kernels: Kernels = OURS
    document: float | None = None

    def predicted(self, on: Accelerator | None = None) -> float:
        """Returns tokens/s of one device."""
        on, seconds = on or self.on, 0.0
        for memory, share in self.memory.items():
            network = Network(on.link)
            time = step_time(memory, on, self.micro_batches, network, document=self.document, kernels=self.kernels)
            tokens = self.micro_batches * memory.tokens / memory.layout.tensor_parallel
            seconds += share * time.total / tokens
        return 1 / seconds


def measured(file: str, step: str, key: str, **row: str) -> float:
    """Returns a number of a kept result of a GPU."""
    for line in (RESULTS / "gpu" / file).read_text().splitlines():
        part = json.loads(line)
        if part.get("step") == step:
            found = part["measured"]
            if row:
                found = next(one for one in found["rows"] if row.items() <= one.items())
            return float(found[key])
    raise ValueError(f"{file} has no step {step!r}")


def ours() -> list[Row]:
    def fit(**options: bool) -> dict[TrainingMemory, float]:
        return {TrainingMemory(M500, 6, 8192, "bf16-mixed", gpu=True, **options): 1.0}

    h100, h200, series = (
        "first-contact-h100-01e0813.jsonl",
        "first-contact-h200-2026-11-27.jsonl",
        "training-500m-h200-2026-11-27.jsonl",
    )
    part, configured, eight = "training-500m", "danube, as configured", "danube, compiled, float8"
    two = TrainingMemory(M500, 2, 8192, "bf16-mixed", gpu=True)
    masked = dataclasses.replace(two, document_masks=True)
    without = Kernels(updates=False)
    seconds = {name: measured(h100, "documents", "ms", masks=name) / 1e3 for name in ("none", "as configured")}
    return [
        Row(
            "500M, compiled",
            H200,
            measured(series, part, "tokens_per_second", contestant=configured),
            fit(compiled=True),
        ),
        Row("500M, compiled, another run", H200, measured(h200, "fit", "tokens_per_second"), fit(compiled=True)),
        Row(
            "500M, compiled, FP8",
            H200,
            measured(series, part, "tokens_per_second", contestant=eight),
            fit(compiled=True, float8=True),
        ),
        Row("500M, compiled (fastest step)", H100, measured(h100, "fit", "most"), fit(compiled=True)),
        Row("500M, eager (fastest step)", H100, measured(h100, "fit, the other way", "most"), fit()),
        Row("500M, eager, no optimizer", H100, two.tokens / seconds["none"], {two: 1.0}, kernels=without),
        Row(
            "the same, documents by FlexAttention",
            H100,
            two.tokens / seconds["as configured"],
            {masked: 1.0},
            kernels=dataclasses.replace(without, attention="flex"),
            document=8192 / 12,
        ),
    ]


def torchtitan() -> list[Row]:
    """Llama 3.1 8B, FSDP2, 2 rows of 8,192 (torchtitan, benchmarks/llama3_h100_202412_torchtitan.md)."""
    rows = []
    published = {8: (5762, 6667, 8532), 128: (5605, 6514, 8380)}
    ways = {"eager": {}, "compiled": {"compiled": True}, "compiled, FP8": {"compiled": True, "float8": True}}
    for devices, numbers in published.items():
        for (way, options), number in zip(ways.items(), numbers, strict=True):
            layout = Layout(devices, sharded=True)
            memory = TrainingMemory(LLAMA, 2, 8192, "bf16-mixed", "selective", layout=layout, gpu=True, **options)
            # Its residual stream has 16 bits. It compiles its loss, too.
            compiled = "compiled" in way
            traffic = None if compiled else torchtitans_traffic(LLAMA)
            logits = None if compiled else EAGER_LOGITS
            kernels = Kernels("flash", logits, EVERY_SECOND, residual=2, traffic=traffic)
            rows.append(
                Row(f"torchtitan, Llama 3.1 8B, {devices} GPUs, {way}", LIMITED, number, {memory: 1.0}, 1, kernels)
            )
    return rows


def danube() -> Row:
    memory = {
        TrainingMemory(DANUBE, 16384 // context, context, "bf16-mixed", layout=Layout(8), gpu=True, float8=True): share
        for context, share in DANUBES_ROWS.items()
    }
    # arXiv 2401.16818: 292.7k tokens/s on a node. Not published: rows at once (taken as 16,384 tokens), kernels.
    kernels = Kernels("flash", EAGER_LOGITS)
    return Row("H2O-Danube-1.8B, 8 GPUs, eager, FP8", H100, 292_700 / 8, memory, 9, kernels)


def smollm3(nodes: int, measured: float) -> Row:
    """SmolLM3: 4 replicas of 2 devices on a node, 3 rows of 4,096, documents masked (stage1_8T.yaml)."""
    layout = Layout(4 * nodes, 2)
    memory = TrainingMemory(SMOLLM3, 3, 4096, "bf16-mixed", layout=layout, gpu=True, document_masks=True)
    kernels = Kernels(
        "flash",
        NANOTRONS_LOGITS,
        residual=2,
        traffic=nanotrons_traffic(SMOLLM3, layout.tensor_parallel),
        gradients=NANOTRONS_GRADIENTS,
        # Buckets of 50 MB hold gradients of 16 bits, which are summed in 32.
        bucket=2 * 50 * 2**20,
    )
    name = f"SmolLM3 3B, {8 * nodes} GPUs, eager"
    return Row(name, H100, measured, {memory: 1.0}, 1, kernels, MEAN_DOCUMENT)


SMOLLM3_RUN = 48, 14_000
"""Nodes and tokens/s of the run, from The Smol Training Playbook."""
SMOLLM3_ON_A_NODE = 1, 15_529
"""The median of the run of 32,000 steps on one node, in the data of the playbook's figure on drops of the throughput.
Its configuration was not within reach here. It is taken as that of the run, with 4 replicas."""


def rows() -> list[Row]:
    return [*ours(), *torchtitan(), danube(), smollm3(*SMOLLM3_RUN)]


def table(of: list[Row]) -> str:
    lines = [
        "| run | on | measured tokens/s a GPU | predicted | difference | within 15 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    missed = 0
    for row in of:
        predicted = row.predicted()
        difference = predicted / row.measured - 1
        misses = abs(difference) > BOUND
        missed += misses
        lines.append(
            f"| {row.name} | {row.on.name} | {row.measured:,.0f} | {predicted:,.0f} | {100 * difference:+.1f} % | "
            f"{'**no**' if misses else 'yes'} |"
        )
    lines += ["", f"{len(of) - missed} of {len(of)} rows are within {100 * BOUND:.0f} %."]
    limited = [row for row in of if row.on == LIMITED]
    wide = dataclasses.replace(LIMITED, flops=SXM, float8=2 * SXM)
    upper = [100 * (row.predicted(wide) / row.measured - 1) for row in limited]
    lines.append(
        f"With the upper end of the peak of torchtitan's machines, {SXM / 1e12:.0f} instead of {NVL / 1e12:.0f} "
        f"TFLOP/s, its rows are {min(upper):+.0f} to {max(upper):+.0f} %."
    )
    (nodes, run), (one, alone) = [
        (number, smollm3(number, speed)) for number, speed in (SMOLLM3_RUN, SMOLLM3_ON_A_NODE)
    ]
    lost = [
        1 - run_ / alone_ for run_, alone_ in ((run.measured, alone.measured), (run.predicted(), alone.predicted()))
    ]
    lines.append(
        f"SmolLM3 on {one} node: measured {alone.measured:,.0f} tokens/s a GPU, predicted {alone.predicted():,.0f} "
        f"({100 * (alone.predicted() / alone.measured - 1):+.0f} %). On {nodes} nodes a GPU is slower by "
        f"{100 * lost[0]:.0f} %, predicted {100 * lost[1]:.0f} %."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/plan-speed.md")
    keep = parser.parse_args().keep
    text = table(rows())
    show(text)
    if keep:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = f"`python benchmarks/plan_speed.py --keep`, after commit {commit}, Python {platform.python_version()}."
        (RESULTS / "plan-speed.md").write_text(f"{about} Arithmetic: the machine does not matter.\n\n{text}\n")


if __name__ == "__main__":
    main()
