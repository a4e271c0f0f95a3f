"""What forgetting costs: nats/token beyond a window, by two ways to continue when it is full.

    python benchmarks/windows.py --weights smollm2 --text wiki.test.raw

* reread: what `--window` does: all but the last half is dropped, and that half is read again;
* rolling: every token attends to the last `window` tokens, whose keys and values stay as they are (a ring buffer);
* whole: nothing is forgotten.

All predict the same tokens, those of a text of 4,096 tokens that lie beyond the first window.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from machine import described, write_result
from torch import Tensor

from lightning_danube.model import Decoder, token_losses
from lightning_danube.weights.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    decoder, tokenizer = load_model(arguments.weights, dtype="float32")
    text = arguments.text.read_text("utf-8")[: 16 * arguments.tokens]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)[: arguments.tokens + 1]
    assert len(ids) == arguments.tokens + 1, "the text is too short"
    rows = []
    with torch.inference_mode():
        whole = attending(decoder.eval(), ids, len(ids))
        for window in arguments.windows:
            losses = [reread(decoder, ids, window), attending(decoder, ids, window), whole]
            means = " | ".join(f"{loss[window:].mean():.3f}" for loss in losses)
            rows.append(f"| {window:,} | {len(whole) - window:,} | {means} |")
    lines = [
        described("torch"),
        f"{arguments.weights} on {arguments.text.name}, float32",
        "",
        "| window | tokens measured | reread | rolling | whole |",
        "|---|---|---|---|---|",
        *rows,
    ]
    write_result("windows", "\n".join(lines))


def reread(decoder: Decoder, ids: Tensor, window: int) -> Tensor:
    """Nats of each token from what `TokenStream` would read before it."""
    tokens = len(ids) - 1
    nats = torch.zeros(tokens)
    start = done = 0
    while done < tokens:
        end = min(start + window, tokens)
        nats[done:end] = attending(decoder, ids[start : end + 1], window)[done - start :]
        start, done = end + 1 - window // 2, end
    return nats


def attending(decoder: Decoder, ids: Tensor, window: int) -> Tensor:
    """Nats of each token when each attends to so many before it."""
    T = len(ids) - 1
    mask = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - window)[None, None]
    hidden = decoder.model.embed_tokens(ids[None, :-1])
    cos, sin = decoder.model.rotary_emb(torch.arange(T)[None], hidden.dtype)
    for block in decoder.model.layers:
        hidden = block(hidden, cos, sin, mask)
    return token_losses(decoder.model.norm(hidden), decoder.lm_head.weight, ids[None, 1:])[0]


if __name__ == "__main__":
    main()
