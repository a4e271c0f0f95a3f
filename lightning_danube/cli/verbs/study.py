"""`study`: runs a controlled experiment, variants × seeds of one configuration, and reports the results."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from lightning_danube.terminal import amount, counted, show


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="NAME", help="the study: its name, such as studies/quickstart, or a file"
    )
    parser.add_argument("--runs", default="runs", metavar="PATH", help="results go to <runs>/studies/<name> (runs)")
    parser.add_argument("--resume", action="store_true", help="continue a study that was begun, or join its workers")
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="where trials are kept: a database that all workers reach, postgresql://… (a file beside the runs)",
    )
    parser.add_argument("--report", action="store_true", help="with --resume: run nothing, show what is known")


def run(arguments: Namespace) -> None:
    for flag in ("retry_failed", "report"):
        if getattr(arguments, flag) and not arguments.resume:
            raise ValueError(f"--{flag.replace('_', '-')} is about a study that was begun: add --resume")
    from functools import partial

    from lightning_danube.cli.configs import runnable_config
    from lightning_danube.extras import need
    from lightning_danube.studies.design import read_design
    from lightning_danube.studies.facts import check_search, check_variants, facts_table

    design = read_design(arguments.config)
    resolve = partial(runnable_config, verb=design.verb)
    need("study", "a study")
    directory = Path(arguments.runs) / "studies" / design.name
    if not arguments.report:
        seeds = f"{len(design.seeds)} seed{'s' if len(design.seeds) > 1 else ''}"
        what = (
            f"{amount(design.settings, 'setting')}" if design.search else f"{amount(len(design.variants), 'variant')}"
        )
        show(f"study {design.name}: {what} × {seeds} of {design.base}")
        if design.variants:
            show(facts_table(check_variants(design, resolve)))
        else:
            check_search(design, resolve)
        if design.equal:
            show(f"equal, as asked: {', '.join(f'{fact} to {share:.2%}' for fact, share in design.equal.items())}")

    from lightning_danube.studies.report import write_report, write_search_report
    from lightning_danube.studies.search import Search
    from lightning_danube.studies.trials import Trials, naming_storage

    with naming_storage(directory, arguments.storage):
        kind = Search if design.search else Trials
        study = kind(design, directory, storage=arguments.storage, resume=arguments.resume)
        if arguments.retry_failed:
            show(f"{counted(study.retry_failed(), 'failed trial waits', 'failed trials wait')} again")
        if not arguments.report:
            study.work(lambda line: show(f"  {line}"))
        command = f"python -m lightning_danube study --config {arguments.config}"
        show(
            write_search_report(study, directory, command)
            if isinstance(study, Search)
            else write_report(design, study.results(), directory, command)
        )
