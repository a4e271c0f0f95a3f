"""The sampling options of the command line."""

from argparse import ArgumentParser

import pytest

from lightning_danube.cli.verbs.sampling import add_sampling_arguments, sampling_of
from lightning_danube.generation.sampling import Sampling


@pytest.mark.parametrize(
    ("typed", "sampling"),
    [
        ("", Sampling(temperature=0.7, top_k=50, top_p=1.0)),
        ("--temperature 0", Sampling(temperature=0.0, top_k=50, top_p=1.0)),
        ("--top-k 0", Sampling(temperature=0.7, top_k=None, top_p=1.0)),
        ("--top-k 3 --top-p 0.8", Sampling(temperature=0.7, top_k=3, top_p=0.8)),
        ("--repetition-penalty 1.3", Sampling(1.3, 0.7, 50, 1.0)),
    ],
)
def test_each_option_reaches_the_sampling(typed: str, sampling: Sampling) -> None:
    parser = ArgumentParser()
    add_sampling_arguments(parser)
    assert sampling_of(parser.parse_args(typed.split())) == sampling
