"""What each type of GGUF file costs and keeps: bytes, bits a weight, and how far llama.cpp's next-token distribution is
from that of the same weights here in float32.

    python benchmarks/gguf_types.py --weights smollm2 --text wiki.test.raw

Needs the extra llama-cpp. Types that llama.cpp only makes with an importance matrix are left out by default.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_danube.data.gguf_tokenizer import gguf_tokenizer_fields
from lightning_danube.llama_cpp import UNQUANTIZED, GGUFContent, check_file_type, import_llama_cpp, measure, quantize
from lightning_danube.model import Decoder
from lightning_danube.model.gguf_files import save_gguf
from lightning_danube.tables import text_table
from lightning_danube.weights import load_model

TYPES = (
    "F32 BF16 F16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_1 Q5_0 Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS Q3_K_L Q3_K_M Q3_K_S IQ3_M "
    "IQ3_S Q2_K"
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES.split())
    parser.add_argument("--chunks", type=int, default=8, help="texts to measure on, cut from the start of the file (8)")
    parser.add_argument("--context", type=int, default=512, help="tokens of each (512)")
    arguments = parser.parse_args()
    types = [check_file_type(name) for name in arguments.types]

    decoder, tokenizer = load_model(arguments.weights, dtype="float32")
    text = arguments.text.read_text("utf-8")[: 8 * arguments.chunks * arguments.context]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    ids_CT = ids[: arguments.chunks * arguments.context].view(arguments.chunks, arguments.context)
    reference = [log_probabilities(decoder, ids_T) for ids_T in ids_CT]
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        whole = Path(directory) / "F32.gguf"
        save_gguf(decoder, whole, dtype=torch.float32, tokenizer_fields=gguf_tokenizer_fields(tokenizer))
        for name in types:
            file = Path(directory) / f"{name}.gguf"
            if name in UNQUANTIZED:
                fields = gguf_tokenizer_fields(tokenizer)
                save_gguf(decoder, file, dtype=DTYPES[name], tokenizer_fields=fields, overwrite=True)
                content = measure(file)
            else:
                content = quantize(whole, file, name)
            rows.append([name, *describe(content), *compare(file, ids_CT, reference)])
            print(" ".join(rows[-1]), file=sys.stderr)
            if file != whole:
                file.unlink()
    header = ["type", "bytes", "bits a weight", "fallbacks", "KL, nats", "same top token", "perplexity"]
    print(text_table(header, rows))


@torch.no_grad()
def log_probabilities(decoder: Decoder, ids_T: Tensor) -> Tensor:
    return F.log_softmax(decoder.eval()(ids_T[None])[0].double(), dim=-1)


def describe(content: GGUFContent) -> list[str]:
    fallbacks = sum(content.fallbacks.values())
    return [f"{content.file_bytes:,}", f"{content.bits_per_weight:.2f}", str(fallbacks) if fallbacks else ""]


def compare(file: Path, ids_CT: Tensor, reference: list[Tensor]) -> list[str]:
    """Mean divergence, share of positions with the same likeliest token, and perplexity, all of llama.cpp's logits."""
    llama_cpp = import_llama_cpp()
    divergence, same, nats = [], [], []
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=ids_CT.shape[1],
        n_batch=ids_CT.shape[1],
        logits_all=True,
        verbose=False,
        # Keys and values in float32: the cache's usual float16 would hide how good the larger types are.
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    for ids_T, wanted_TV in zip(ids_CT, reference, strict=True):
        llama.reset()
        llama.eval(ids_T.tolist())
        logits_TV = torch.from_numpy(np.array(llama.scores[: len(ids_T)]))
        found_TV = F.log_softmax(logits_TV.double(), dim=-1)
        divergence.append((wanted_TV.exp() * (wanted_TV - found_TV)).sum(-1).mean().item())
        same.append((wanted_TV.argmax(-1) == found_TV.argmax(-1)).double().mean().item())
        nats.append(F.nll_loss(found_TV[:-1], ids_T[1:]).item())
    llama.close()
    return [f"{np.mean(divergence):.1e}", f"{100 * np.mean(same):.1f} %", f"{np.exp(np.mean(nats)):.2f}"]


if __name__ == "__main__":
    main()
