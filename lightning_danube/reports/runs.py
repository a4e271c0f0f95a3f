"""Reads a run as pandas frames: plan, curves over tokens, held-out losses, text samples. The tables are those of
pre-training.

Everything comes from the run's own files (`config.yaml`, `summary.json`, TensorBoard events or `metrics.csv`); no
model is loaded. A run that is not finished, or was stopped, is read up to its last step.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.files import read_json, read_json_lines
from lightning_danube.options import parse_tokens
from lightning_danube.pretraining.curriculum import tokens_of_stages
from lightning_danube.reports.tags import TAGS, tag_called
from lightning_danube.terminal import as_typed
from lightning_danube.training.trackers import STEPS
from lightning_danube.yaml_files import read_config, way_to_make

PAPER_WEB_SHARES = (0.906, 0.817, 0.516)
"""Share of web text in the three stages of H2O-Danube3 (arXiv 2407.09276)."""


class MissingResult(ValueError):
    """A result is missing. The message names the command that makes it."""

    def _render_traceback_(self) -> list[str]:
        # IPython's hook: a notebook then shows this line instead of the traceback.
        return [f"Missing: {self}"]


@dataclass(frozen=True)
class RecordedRun:
    """The files of one run.

    Args:
        directory: `<runs>/<name>/version_<n>`.
        config: content of `config.yaml`.
        summary: content of `summary.json`; empty before the end of the first stage.
        curves: one column per TensorBoard tag, one row for each number of training tokens at which any tag was logged.
        texts: TensorBoard tag → training tokens → text.
    """

    directory: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    curves: pd.DataFrame
    texts: dict[str, dict[int, str]]
    pictures: dict[str, bytes] = field(default_factory=dict)
    """TensorBoard tag → its last picture, a PNG file."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record of each session: content of `history.jsonl`."""
    problems: list[str] = field(default_factory=list)
    """Files that are missing or cannot be read, one line each."""

    @property
    def is_pretraining(self) -> bool:
        return "stages" in _options_of(self.config, "data")

    @property
    def counts_tokens(self) -> bool:
        """Whether the curves go over training tokens, and not over optimizer steps."""
        return self.curves.index.name == "tokens"

    @property
    def title(self) -> str:
        """Returns the run's path, from its runs directory on."""
        return "/".join(self.directory.absolute().parts[-3:])

    @property
    def data(self) -> dict[str, Any]:
        options: dict[str, Any] = self.config["data"]["init_args"]
        return options

    @property
    def sources(self) -> list[str]:
        return list(self.data["sources"])

    @property
    def batch_tokens(self) -> int:
        return parse_tokens(self.data["batch_tokens"], "batch_tokens")

    @property
    def way_on(self) -> str:
        """Returns the command that continues the run."""
        return f"`{as_typed()} fit --config {self.title}/config.yaml --ckpt_path last`"

    def curve(self, tag: str) -> pd.Series:
        """Returns the values of a tag over the training tokens, or over the optimizer steps of a task that counts no
        tokens.

        Raises:
            MissingResult: the run did not log it.
        """
        if tag not in self.curves:
            raise MissingResult(f"{self.title} logged no {tag}: {way_to_log(tag)}")
        return self.curves[tag].dropna()

    def finished(self, key: str) -> Any:
        """Returns an entry of the summary.

        Raises:
            MissingResult: there is no summary yet, or it has no such entry.
        """
        if not self.summary:
            raise MissingResult(f"{self.title} has no summary.json, for no stage has ended: {self.way_on} continues it")
        if key not in self.summary:
            raise MissingResult(f"summary.json of {self.title} has no {key!r}")
        return self.summary[key]


def way_to_log(tag: str) -> str:
    """Returns how to get a tag, or a group of tags such as "mix/", that a run did not log."""
    callback = tag_called(tag).class_path
    if callback is None:
        return "it stopped before the first step that is logged (trainer.log_every_n_steps)"
    return f"name {callback} in trainer.callbacks and train again"


# --- reading ----------------------------------------------------------------------------------------------------------


def newest_run(runs: str | Path, name: str) -> Path:
    """Returns the directory of the newest version under `<runs>/<name>`.

    A relative `runs` is searched here and then one level up, because Jupyter starts a notebook in its own folder.

    Raises:
        MissingResult: there is no version.
    """
    for directory in (Path(runs) / name, Path("..") / runs / name):
        versions = {int(match[1]): path for path in directory.glob("*/") if (match := VERSION.fullmatch(path.name))}
        begun = [number for number, path in versions.items() if (path / "config.yaml").is_file()]
        if begun:
            return versions[max(begun)]
    way = way_to_make(runs, name) or f"`{as_typed()} fit --config … --name {name}` makes one"
    raise MissingResult(f"there is no run under {Path(runs) / name}: {way}")


TABLE = "metrics.csv"
"""The file of Lightning's CSVLogger."""
VERSION = re.compile(r"version_(\d+)")
RESULTS = Path("benchmarks") / "results"
"""Measurements that come with a clone, from its root."""


def committed_result(file: str) -> Path:
    """Returns the path of a measurement that comes with a clone: a file below RESULTS, here or one level up.

    Raises:
        MissingResult: neither this directory nor the one above it is a clone.
    """
    for root in (Path(), Path("..")):
        if (root / RESULTS / file).is_file():
            return root / RESULTS / file
    raise MissingResult(f"there is no {RESULTS / file} here: start in a clone of the repository, or in its notebooks/")


def read_run(directory: Path) -> RecordedRun:
    """Reads the files of a pre-training run.

    Raises:
        ValueError: the run is not a pre-training run, or a file is damaged.
    """
    run = read_run_of_any_task(directory)
    if not run.is_pretraining:
        raise ValueError(f"{directory} is not a pre-training run: data.stages is missing in its config.yaml")
    if damaged := [problem for problem in run.problems if "damaged" in problem]:
        raise ValueError(damaged[0])
    return run


def read_run_of_any_task(directory: Path) -> RecordedRun:
    """Reads the files of a run, as far as they are there. `problems` names the others.

    Raises:
        ValueError: there is no readable `config.yaml`.
    """
    config = read_config(str(directory / "config.yaml"))
    problems: list[str] = []
    summary, history = {}, []
    try:
        summary = read_json(directory / "summary.json")
    except FileNotFoundError:
        problems.append("there is no summary.json: the run has not come to the point where it is written")
    except ValueError as error:
        problems.append(f"summary.json is damaged ({error})")
    try:
        history = read_json_lines(directory / "history.jsonl")
    except FileNotFoundError:
        pass  # only fit writes it
    except ValueError as error:
        problems.append(f"history.jsonl is damaged ({error})")
    events = _events(directory)
    tags = events.Tags()
    unit, counted = _unit_of(config, tags["scalars"])
    curves = {tag: {unit * e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): {
            unit * e.step: e.tensor_proto.string_val[0].decode("utf-8") for e in events.Tensors(tag)
        }
        for tag in tags["tensors"]
        if tag.endswith("/text_summary")
    }
    pictures = {tag: events.Images(tag)[-1].encoded_image_string for tag in tags["images"]}
    frame = pd.DataFrame({tag: pd.Series(values, dtype=float) for tag, values in curves.items()}).sort_index()
    frame.index.name = counted
    if frame.empty and (directory / TABLE).is_file():
        try:
            frame = _table_of_curves(directory / TABLE)
        except (KeyError, ValueError) as error:
            problems.append(f"{TABLE} is damaged ({error})")
    return RecordedRun(directory, config, summary, frame, texts, pictures, history, problems)


def _table_of_curves(file: Path) -> pd.DataFrame:
    """Returns the curves of a run that logged to a CSV table, over tokens, or over steps if it counted no tokens."""
    rows = pd.read_csv(file)
    counted = "tokens" if "tokens" in rows else "step"
    # Lightning writes a row for each step, and one more if values of a validation belong to the same step.
    return rows.drop(columns={"epoch", "step"} - {counted}, errors="ignore").groupby(counted).last()


def _events(directory: Path) -> EventAccumulator:
    # 0 keeps all points; TensorBoard's own default samples a long curve randomly.
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0, "images": 1})
    # After a resume, TensorBoard drops the points that the stopped session logged after its checkpoint. This is
    # correct, so its warning is hidden.
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        events.Reload()
    finally:
        logger.setLevel(level)
    return events


def _unit_of(config: Mapping[str, Any], tags: Collection[str]) -> tuple[int, str]:
    """Returns what one step of the events is: a number, and of what.

    Runs of pre-training that log no optimizer steps were made when the horizontal axis counted those.
    """
    if STEPS in tags:
        return 1, "tokens"
    batch_tokens = _options_of(config, "data").get("batch_tokens")
    return (1, "step") if batch_tokens is None else (parse_tokens(batch_tokens, "batch_tokens"), "tokens")


def _options_of(config: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Returns the options of a class that a section of a configuration names."""
    found = config.get(section)
    options = found.get("init_args") if isinstance(found, Mapping) else None
    return options if isinstance(options, dict) else {}


# --- tables -----------------------------------------------------------------------------------------------------------


def overview(run: RecordedRun) -> pd.DataFrame:
    """Returns a table of what was trained, and of the time and tokens it took."""
    decoder = run.config["model"]["init_args"]["decoder"]
    shape = decoder
    if not isinstance(decoder, str):
        shape = f"{decoder['num_hidden_layers']} layers × {decoder['hidden_size']} hidden"
    rate = run.finished("tokens_per_second")
    facts = {
        "run": run.title,
        "decoder": shape,
        "parameters": f"{run.finished('parameters'):,}",
        "tokens": f"{run.finished('tokens'):,}",
        "optimizer steps": f"{run.finished('steps'):,}",
        "minutes": f"{run.finished('seconds') / 60:.1f}",
        "tokens/s, in training": "–" if rate is None else f"{rate:,.0f}",
        "accelerator, precision": f"{run.config['trainer']['accelerator']}, {run.config['trainer']['precision']}",
    }
    return pd.DataFrame({"": facts})


def stage_spans(run: RecordedRun) -> pd.DataFrame:
    """Returns the begun stages with begin and end in tokens. The last stage ends at the run's last step."""
    numbers = run.curve("mix/stage").astype(int)
    # A resumed run logs its stage once more. The first entry counts.
    begins = {k: int(numbers.index[numbers == k].min()) for k in sorted(set(numbers))}
    reached = max(int(run.curves.index.max()), run.summary.get("tokens", 0))
    names = [run.data["stages"][k - 1]["name"] for k in begins]
    ends = [*list(begins.values())[1:], reached]
    return pd.DataFrame({"begin": list(begins.values()), "end": ends}, index=pd.Index(names, name="stage"))


def planned_mix(run: RecordedRun) -> pd.DataFrame:
    """Returns the configured share of each source in each stage."""
    rows = {}
    for stage in run.data["stages"]:
        total = sum(stage["mix"].values())
        rows[stage["name"]] = {source: stage["mix"].get(source, 0.0) / total for source in run.sources}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


def seen_mix(run: RecordedRun) -> pd.DataFrame:
    """Returns the share of each source in the training tokens of each stage; NaN for a stage not begun."""
    rows = {
        stage["name"]: {source: stage["mix"][source] if stage["tokens"] else float("nan") for source in run.sources}
        for stage in run.finished("stages")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


def web_shares(run: RecordedRun) -> pd.DataFrame:
    """Returns tokens and share of the source `web` in each stage, planned and seen, beside the paper's share."""
    planned, seen = planned_mix(run), seen_mix(run)
    stages = run.data["stages"]
    paper = [*PAPER_WEB_SHARES, *[float("nan")] * len(stages)][: len(stages)]
    if "web" not in run.sources:
        raise MissingResult(f"{run.title} has no source named web, whose share the paper publishes")
    return pd.DataFrame(
        {
            "tokens planned": tokens_of_stages(run.data),
            "tokens seen": [stage["tokens"] for stage in run.finished("stages")],
            "web %, paper": [100 * share for share in paper],
            "web %, planned": 100 * planned["web"],
            "web %, seen": 100 * seen["web"],
        },
        index=planned.index,
    )


def mix_table(run: RecordedRun) -> pd.DataFrame:
    """Returns the share of each source in the tokens since the previous row.

    Rows are the logged steps and the ends of the stages in `summary.json`, so no row averages over two stages. Without
    a summary, a row that would is NaN.
    """
    seen = pd.DataFrame({source: run.curve(f"tokens_seen/{source}") for source in run.sources})
    ends = _tokens_at_stage_ends(run)
    seen = pd.concat([seen, ends[~ends.index.isin(seen.index)]]).sort_index()
    news = seen.diff()
    news.iloc[0] = seen.iloc[0]
    mix = news.div(news.sum(axis=1), axis=0)
    if "mix/stage" in run.curves:
        for border in stage_spans(run)["begin"].iloc[1:]:
            if border not in mix.index:
                mix.loc[mix.index[mix.index > border][:1]] = float("nan")
    return mix


def _tokens_at_stage_ends(run: RecordedRun) -> pd.DataFrame:
    """Returns the tokens of each source since the run began, at the end of each stage that `summary.json` counts."""
    counts, rows = dict.fromkeys(run.sources, 0.0), {}
    for stage in run.summary.get("stages", []):
        counts = {name: count + stage["tokens"] * stage["mix"].get(name, 0.0) for name, count in counts.items()}
        if stage["tokens"]:
            rows[round(sum(counts.values()))] = counts
    return pd.DataFrame.from_dict(rows, orient="index", columns=run.sources, dtype=float)


def held_out_loss_table(run: RecordedRun) -> pd.DataFrame:
    """Returns held-out loss by source in nats/token: the unigram baseline, the loss before training of a run that
    began with trained weights, and the loss after each ended stage.
    """
    rows = {"unigram baseline": run.finished("unigram_loss")}
    if before := run.summary.get("val_loss_before"):
        rows["before training"] = before
    for stage in run.finished("stages"):
        if stage["val_loss"]:
            rows[f"after {stage['name']}"] = stage["val_loss"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=run.sources)


def text_samples(run: RecordedRun) -> pd.DataFrame:
    """Returns one row per validation and prompt: prompt, stage, training tokens, text.

    Raises:
        MissingResult: the run wrote no samples.
    """
    if not any(tag.startswith("samples/") for tag in run.texts):
        asked = TAGS["samples/"].class_path in {entry["class_path"] for entry in run.config["trainer"]["callbacks"]}
        why = "no stage has ended" if asked else way_to_log("samples/1")
        raise MissingResult(f"{run.title} holds no text samples: {why}")
    spans = stage_spans(run)
    callbacks = {entry["class_path"]: entry.get("init_args", {}) for entry in run.config["trainer"]["callbacks"]}
    rows = []
    for number, prompt in enumerate(callbacks[TAGS["samples/"].class_path]["prompts"], start=1):
        tag = next((tag for tag in run.texts if re.fullmatch(rf"samples/{number}(_.*)?", tag)), "")
        for tokens, text in run.texts.get(tag, {}).items():
            stage = next((name for name, end in spans["end"].items() if tokens <= end), spans.index[-1])
            # TextSamples indents by four spaces, so that TensorBoard shows a block of code.
            lines = [line.removeprefix("    ") for line in text.splitlines()]
            rows.append({"prompt": prompt, "stage": stage, "tokens": tokens, "text": "\n".join(lines)})
    return pd.DataFrame(rows).sort_values("tokens", kind="stable", ignore_index=True)


def samples_markdown(samples: pd.DataFrame) -> str:
    """Returns samples as Markdown. Nothing in a sample's text can close its block of code."""
    parts = []
    for row in samples.itertuples():
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", str(row.text))), default=0))
        head = f"**{row.stage}**, after {row.tokens:,} tokens; prompt: *{row.prompt}*"
        parts.append(f"{head}\n\n{fence}text\n{row.text}\n{fence}")
    return "\n\n".join(parts)
