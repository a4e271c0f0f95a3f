"""`generate`: continues a prompt; the text goes to stdout and nothing else does."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from lightning_danube.weights import add_weights_arguments, load_model


def add_arguments(parser: ArgumentParser) -> None:
    add_weights_arguments(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="length of the continuation (64)")
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token each time (0.7)"
    )
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="sample among the K likeliest tokens (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")


def run(arguments: Namespace) -> None:
    import torch

    from lightning_danube.model import generate

    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}: it must be at least 1")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature is {arguments.temperature}: it must not be negative")
    decoder, tokenizer = load_model(arguments.weights)
    ids = tokenizer(arguments.prompt, add_special_tokens=False).input_ids
    if tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("--prompt is empty: give at least one word")
    with torch.inference_mode():
        out = generate(
            decoder.eval(),
            torch.tensor([ids]),
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            eos_id=tokenizer.eos_token_id,
            generator=torch.Generator().manual_seed(arguments.seed),
        )
    print(tokenizer.decode(out[0], skip_special_tokens=True))
