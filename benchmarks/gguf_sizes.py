"""How large the paper's models are in each type of GGUF file, from their shapes alone, beside the sizes that it states.

    python benchmarks/gguf_sizes.py
    python benchmarks/gguf_sizes.py --quantize danube3-500m

llama.cpp plans each file from a head without tensors. With `--quantize` a model of that shape with random weights is
really written and quantized, to see that the plan is kept; that takes 3 GB of disk for the 500M. Needs the extra
llama-cpp. GB are 10⁹ bytes, as in the paper (arXiv 2407.09276, its table of quantized models).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from machine import described, write_result

from lightning_danube.model import PRESETS, Decoder
from lightning_danube.weights.gguf.files import save_gguf, save_gguf_shape
from lightning_danube.weights.llama_cpp import planned_bytes, quantize

PUBLISHED_GB = {
    "danube3-4b": {
        "F16": 7.92,
        "Q8_0": 4.21,
        "Q6_K": 3.25,
        "Q5_K_M": 2.81,
        "Q4_K_M": 2.39,
        "Q3_K_M": 1.94,
        "Q2_K": 1.51,
    },
    "danube3-500m": {"F16": 1.03, "Q8_0": 0.55, "Q6_K": 0.42, "Q5_K_M": 0.37, "Q4_K_M": 0.32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", choices=PRESETS, help="quantize a model of this shape, too")
    arguments = parser.parse_args()
    lines = [
        described("llama-cpp-python"),
        "",
        "| model | type | planned, GB | bits/weight | published, GB | apart |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for preset, config in PRESETS.items():
            head = directory / f"{preset}.gguf"
            save_gguf_shape(config, head)
            for kind in PUBLISHED_GB["danube3-4b"]:
                size = planned_bytes(head, kind)
                published = PUBLISHED_GB[preset].get(kind)
                beside = "– | –" if published is None else f"{published:.2f} | {size / 1e9 - published:+.3f}"
                bits = 8 * size / config.parameters
                lines.append(f"| {preset} | {kind} | {size / 1e9:.3f} | {bits:.2f} | {beside} |")
                sizes = {"gigabytes": size / 1e9, "bits_per_weight": bits, "published_gigabytes": published}
                rows.append({"model": preset, "type": kind, **sizes})
        if arguments.quantize:
            lines += quantized(arguments.quantize, directory)
    write_result("gguf-sizes", "\n".join(lines), rows)


def quantized(preset: str, directory: Path) -> list[str]:
    """What a plan says, and what comes of random weights."""
    torch.manual_seed(0)
    whole = directory / "whole.gguf"
    save_gguf(Decoder(PRESETS[preset]).to(torch.float16), whole, dtype=torch.float16)
    lines = ["", f"| {preset}, random weights | planned, bytes | in the file | apart |", "|---|---|---|---|"]
    for kind in PUBLISHED_GB[preset]:
        planned = planned_bytes(whole, kind)
        file = directory / f"{kind}.gguf"
        real = quantize(whole, file, kind).tensor_bytes
        file.unlink()
        lines.append(f"| {kind} | {planned:,} | {real:,} | {100 * (planned / real - 1):+.4f} % |")
    return lines


if __name__ == "__main__":
    main()
