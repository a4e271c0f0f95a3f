"""Every configuration of the tree is a real one, and those of the paper hold the paper's figures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_danube.cli.trainer_verbs import DanubeCLI
from lightning_danube.pretraining.curriculum import Curriculum
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.task import Pretraining
from lightning_danube.studies.design import read_design
from lightning_danube.studies.facts import check_equal, facts_of
from lightning_danube.training.trainer import FastProducts
from lightning_danube.yaml_files import config_file, config_names, description, read_config

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(STUDIES))


class Instantiated(DanubeCLI):
    """The command line up to the point where it would begin to work."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def instantiate(config: Path, *options: str) -> Instantiated:
    with torch.device("meta"):  # 4 B parameters weigh nothing there
        return Instantiated(["fit", "--config", str(config), "--trainer.accelerator", "cpu", *options])


def test_there_are_configs() -> None:
    assert {"quickstart.yaml", "danube3-500m.yaml", "danube3-4b.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.medium
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_is_instantiated(config: Path, tmp_path: Path, tiny_run: Path) -> None:
    # What begins with the result of another run gets one here.
    begins = ["--model.init_args.weights", str(tiny_run)] if "    weights: " in config.read_text() else []
    if begins and config.parent.name == "pretrain":
        begins += ["--data.init_args.context_length", "32"]  # as long as the rows of that run
    cli = instantiate(config, "--runs", str(tmp_path), *begins)
    assert cli.trainer is not None and cli.model is not None
    assert any(isinstance(one, FastProducts) for one in cli.trainer.callbacks)  # type: ignore[attr-defined]


@pytest.mark.medium
@pytest.mark.parametrize("all_variants", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", STUDIES, ids=lambda path: path.stem)
def test_every_study_runs_what_it_says(
    config: Path, all_variants: bool, tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configs of the first and last variant (or all), and both ends of a search, are real ones; what is to be
    equal is."""
    monkeypatch.chdir(tmp_path)
    design = read_design(str(config))
    ends = [{key: ends_of(among)[end] for key, among in design.search.items()} for end in (0, -1)]
    facts = {}
    variants = list((design.variants or {"low": ends[0], "high": ends[1]}).items())
    for name, values in variants if all_variants else [variants[0], variants[-1]]:
        options = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in design.overrides(values, 1).items()
        ]
        if "    weights: " in Path(config_file(design.base)).read_text():
            options.append(f"--model.init_args.weights={tiny_run}")
        cli = instantiate(Path(config_file(design.base)), "--runs", str(tmp_path), *options)
        facts[name] = facts_of(yaml.safe_load(cli._parser("fit").dump(cli.config["fit"], skip_unset=False)))
    check_equal(design, facts)


def ends_of(among: Any) -> list[Any]:
    return among if isinstance(among, list) else [among["low"], among["high"]]


@pytest.mark.parametrize("name", config_names())
def test_every_config_says_in_its_first_line_what_it_is_for(name: str) -> None:
    text = Path(config_file(name)).read_text("utf-8")
    first = text.partition("\n")[0]
    assert first.startswith("# ") and first[-1] in ".:", f"{name}: {first!r} is not a sentence that can stand alone"
    assert 20 < len(description(name)) <= 120
    assert f"lightning-danube {'study' if name.startswith('studies/') else ''}" in text
    # A wheel has neither the clone's folders nor its module paths.
    assert "configs/" not in text and not re.search(r"class_path: (?!lightning_danube\.|lightning\.)", text)


def test_a_decay_is_its_stable_run_with_one_stage_more() -> None:
    stable, decay = (read_config(f"pretrain/{name}") for name in ("wsd", "wsd-decay"))
    *stages, _ = decay["data"]["init_args"].pop("stages")
    assert stages == stable["data"]["init_args"].pop("stages")
    assert stable.pop("name") != decay.pop("name")
    rates = [run["model"]["init_args"].pop("learning_rate") for run in (stable, decay)]
    assert stable == decay
    assert [rate.pop("decay") for rate in rates] == [0, "${data.init_args.stages.2.tokens}"]
    assert rates[0] == rates[1]


def test_there_are_studies() -> None:
    assert {"quickstart", "attention", "curriculum"} <= {path.stem for path in STUDIES}


@pytest.mark.parametrize(
    ("name", "parameters", "stages"),
    [
        ("danube3-500m", 513_590_784, [("2.8T", 90.6), ("1.15T", 81.7), ("0.05T", 51.6)]),
        ("danube3-4b", 3_961_839_360, [("4.6T", 90.6), ("1.35T", 81.7), ("0.05T", 51.6)]),
    ],
)
def test_the_papers_runs_are_the_papers(
    name: str, parameters: int, stages: list[tuple[str, float]], tmp_path: Path
) -> None:
    cli = instantiate(ROOT / "configs" / "pretrain" / f"{name}.yaml", "--runs", str(tmp_path))
    data, task = cli.datamodule, cli.model
    assert isinstance(data, CurriculumData) and isinstance(task, Pretraining)
    assert sum(parameter.numel() for parameter in task.parameters()) == parameters
    assert (data.context_length, data.vocab_size) == (8192, 32_000)
    published = [(float(tokens[:-1]) * 1e12, web) for tokens, web in stages]
    assert [(stage.tokens, stage.mix["web"]) for stage in data.stages] == published
    for stage in data.stages:
        assert sum(stage.mix.values()) == pytest.approx(100)
    # A billion rows a source: the walk through the whole run is arithmetic.
    run = Curriculum(
        data.stages,
        dict.fromkeys(data.sources, 10**9),
        context_length=8192,
        batch_samples=data.batch_samples,
        seed=1,
    )
    assert run.total_tokens == pytest.approx(sum(tokens for tokens, _ in published), rel=1e-6)


def test_the_quickstart_has_the_papers_web_shares_and_a_million_tokens(tmp_path: Path) -> None:
    cli: Any = instantiate(ROOT / "configs" / "quickstart.yaml", "--runs", str(tmp_path))
    assert [stage.mix["web"] for stage in cli.datamodule.stages] == [90.6, 81.7, 51.6]
    assert cli.datamodule.total_tokens >= 1_000_000
    c = cli.model.config
    # So that llama.cpp's types with blocks of 32 apply to every matrix. The K-quants need rows of 256.
    assert c.hidden_size % 32 == c.intermediate_size % 32 == c.num_attention_heads * c.head_dim % 32 == 0
