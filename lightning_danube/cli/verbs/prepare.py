"""`prepare`: makes the token shards of a configuration's data, so that a following `fit` starts at once."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.cli.verbs.configuration import add_configuration
from lightning_danube.files import read_json
from lightning_danube.options import check_processes
from lightning_danube.terminal import amount, counted, show, text_table
from lightning_danube.tokens.engines import ENGINES, EXECUTORS, Executor

if TYPE_CHECKING:
    from lightning_danube.pretraining.data import CurriculumData
    from lightning_danube.tokens.foreign.listing import ForeignTokens


def add_arguments(parser: ArgumentParser) -> None:
    add_configuration(parser)
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="make part I of N, counted from 1: on N machines with one cache directory, the last one joins the parts",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that tokenize (data.processes, all cores)"
    )
    parser.add_argument("--verify", action="store_true", help="read existing shards and compare their checksums")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="own",
        help="own: for what one machine holds. datatrove: for more, on one machine or a cluster",
    )
    parser.add_argument("--executor", choices=EXECUTORS, help="where the tasks of datatrove run (local)")
    parser.add_argument(
        "--tasks", type=int, metavar="N", help="tasks of datatrove for each source, at most one a file (up to 1,000)"
    )
    parser.add_argument(
        "--slurm",
        action="append",
        metavar="KEY=VALUE",
        help="an option of sbatch; partition and time are needed, such as --slurm partition=cpu --slurm time=12:00:00",
    )


def run(arguments: Namespace) -> None:
    part = _part(arguments.shard)
    _check_engine(arguments)
    if arguments.verify and part is not None:
        raise ValueError("--verify checks whole shards: leave out --shard")
    data = _data(arguments.config, arguments.overrides)
    if arguments.processes is not None:
        check_processes(arguments.processes, "--processes", least=1)
        data.processes = arguments.processes
    if arguments.verify:
        _verify(data)
        return
    seconds = data.prepare(part) if arguments.engine == "own" else _with_datatrove(data, arguments)
    reports = []
    for name, directory in data.shards_directories().items():
        if data.sources[name].has_tokens:
            _show_token_files(data, name, directory)
            continue
        if (directory / "report.json").exists():
            reports.append((directory, read_json(directory / "report.json")))
            if seconds[name]:
                data.shard_facts(name).open().verify()
    if reports:
        show(_summary(reports, seconds))


def _check_engine(arguments: Namespace) -> None:
    if arguments.engine == "own":
        for option in ("executor", "tasks", "slurm"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} is for --engine datatrove: add it, or leave --{option} out")
    elif arguments.shard is not None:
        raise ValueError("--shard is for the own engine: datatrove deals out its tasks itself, see --tasks")


def _with_datatrove(data: CurriculumData, arguments: Namespace) -> dict[str, float]:
    from lightning_danube.device import usable_cores
    from lightning_danube.tokens.engines.datatrove_engine import prepare_with_datatrove
    from lightning_danube.tokens.engines.source_work import Cluster

    where: Executor = arguments.executor or "local"
    return prepare_with_datatrove(
        data.sources,
        data.tokenizer,
        held_out=data.held_out,
        quality=data.quality,
        cache_dir=data.cache_dir,
        cluster=Cluster(
            where=where,
            tasks=arguments.tasks,
            workers=data.processes or (usable_cores() if where == "local" else None),
            slurm=dict(map(_key_and_value, arguments.slurm or ())),
        ),
    )


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"--slurm is {text!r}: give an option of sbatch and its value, such as partition=cpu")
    return key.removeprefix("--"), value


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard is {text!r}: give part and parts, counted from 1, such as 2/8")
    return int(match[1]), int(match[2])


def _data(configs: list[str], overrides: list[str]) -> CurriculumData:
    from lightning_danube.cli.configs import configured_data

    data = configured_data("prepare", configs, overrides)
    from lightning_danube.pretraining.data import CurriculumData

    assert isinstance(data, CurriculumData)
    return data


def _open_token_files(data: CurriculumData, name: str, directory: Path) -> ForeignTokens:
    from lightning_danube.tokens.foreign.listing import ForeignTokens

    return ForeignTokens(directory, data.sources[name], data.tokenizer, data.cache_dir)


def _show_token_files(data: CurriculumData, name: str, directory: Path) -> None:
    files = _open_token_files(data, name, directory)
    show(f"{name}: nothing to make, the token files are read where they are: {files.described()}")


def _verify(data: CurriculumData) -> None:
    for name, directory in data.shards_directories().items():
        if data.sources[name].has_tokens:
            data.prepare()
            show(f"{name}: {_open_token_files(data, name, directory).verify()}")
            continue
        if not directory.exists():
            raise ValueError(f"source {name!r} has no shards at {directory}: make them with prepare, without --verify")
        shards = data.shard_facts(name).open()
        shards.verify()
        files = sum(len(split["files"]) for split in shards.meta["splits"].values())
        show(f"{name}: {counted(files, 'file holds', 'files hold')} what was written, in {shards.place}")


def _summary(reports: list[tuple[Path, dict[str, Any]]], seconds: dict[str, float]) -> str:
    rows, notes = [], []
    for directory, report in reports:
        name, duplicates = report["source"], report["duplicates"]
        made = seconds[name]
        rows.append(
            [
                name,
                f"{report['documents']:,}",
                f"{report['tokens']:,}",
                f"{report['bytes_per_token']:.2f}",
                f"{sum(report['rejected'].values()):,}",
                f"{sum(report['filtered'].values()):,}",
                f"{sum(duplicates.values()):,}",
                f"{report['contaminated']:,}",
                f"{report['seconds']:.1f}" if made else "there",
                # Sources are processed in parallel, so a source's speed follows from its processes' own time.
                f"{report['tokens'] / report['seconds_of_all_processes']:,.0f}" if made else "",
            ]
        )
        notes += [f"{name}: {os.path.relpath(directory) if _is_near(directory) else directory}"]
        for what in ("rejected", "filtered"):
            if report[what]:
                notes.append(f"  {what}: " + ", ".join(f"{cause} {n:,}" for cause, n in report[what].items()))
        notes += [f"    {message}" for message in report["first_rejected"]]
        if report["pieces_of_long_documents"]:
            notes.append(f"  long documents were cut: {amount(report['pieces_of_long_documents'], 'more piece')}")
        for file in report["benchmarks"]:
            if file["rows_found"]:
                notes.append(
                    f"  {file['rows_found']:,} of {file['rows']:,} rows of {file['file']} stood in "
                    f"{amount(file['documents'], 'document')}, now removed"
                )
    header = ["source", "documents", "tokens", "bytes/token", "rejected", "filtered", "duplicates", "contaminated"]
    return "\n".join([text_table([*header, "seconds", "tokens/s a process"], rows), *notes])


def _is_near(directory: Path) -> bool:
    return directory.is_relative_to(Path.cwd())
