"""`requeue`: puts a SLURM job whose run has failed back into the queue, if the run has made progress since its start.

The job's batch script calls it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_danube.cli.verbs.configuration import add_configuration
from lightning_danube.terminal import tell


def add_arguments(parser: ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument("--code", type=int, required=True, metavar="N", help="exit code of srun")
    parser.add_argument("--errors", required=True, metavar="FILE", help="what srun has written to stderr")


def run(arguments: Namespace) -> None:
    from lightning_danube.checkpoints.requeue import requeue_after_failure
    from lightning_danube.cli.configs import place_of_runs
    from lightning_danube.files import read_regular

    directory = place_of_runs(arguments.config, arguments.overrides)
    errors = read_regular(Path(arguments.errors)).decode("utf-8", errors="replace")
    tell(requeue_after_failure(directory, arguments.code, errors))
