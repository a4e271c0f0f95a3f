"""The sampling options, shared by all verbs that generate text."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_danube.generation.sampling import Sampling


def add_sampling_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--temperature", type=float, default=0.7, metavar="T", help="0 takes the likeliest token each time (0.7)"
    )
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="sample among the K likeliest tokens, 0: among all (50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the fewest likeliest tokens that have this share of the probability (1)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: make tokens that the text already has less likely, as transformers does (1)",
    )


def sampling_of(arguments: Namespace) -> Sampling:
    from lightning_danube.generation.sampling import Sampling

    return Sampling(
        repetition_penalty=arguments.repetition_penalty,
        temperature=arguments.temperature,
        top_k=arguments.top_k or None,
        top_p=arguments.top_p,
    )
