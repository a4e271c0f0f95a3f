"""`export`: writes a trained model as a Hugging Face directory."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from lightning_danube.commands.weights import add_weights_argument, load_model


def add_arguments(parser: ArgumentParser) -> None:
    add_weights_argument(parser)
    parser.add_argument(
        "--format", choices=["hf"], default="hf", help="hf: config.json, safetensors, tokenizer (default)"
    )
    parser.add_argument("--out", required=True, metavar="DIRECTORY", help="directory to create")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory if it exists")


def run(arguments: Namespace) -> None:
    from lightning_danube.model import save_hf

    decoder, tokenizer = load_model(arguments.weights)
    save_hf(
        decoder,
        arguments.out,
        tokenizer=tokenizer,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        overwrite=arguments.overwrite,
    )
    print(f"{decoder.config.parameters:,} parameters written to {arguments.out}", file=sys.stderr)
