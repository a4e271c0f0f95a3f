"""Going on with another config: what is refused leaves the run as it was, what is allowed is shown and recorded."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import normalizers

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.runs import read_saved_config
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.training.history import append_history, differences
from lightning_danube.training.optim import LearningRate
from tests.cli.test_trainer_verbs import error_of
from tests.conftest import write_tiny
from tests.pretraining.test_run import scalars

STAGES = """
  - {name: foundation, tokens: 3K, mix: {web: 90.6, wiki: 9.4}}
  - {name: refinement, tokens: 2K, mix: {web: 81.7, wiki: 18.3}}
  - {name: finish, tokens: 1.5K, mix: {web: 51.6, wiki: 48.4}}
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `tiny`, stopped after step 15: the first stage is over, the second has begun."""
    tiny = write_tiny(tmp_path_factory.mktemp("stopped"))
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "15"]) == 0
    hf = copy.deepcopy(DocumentTokenizer("danube-small").hf)  # the original is shared by all that ask for it
    hf.backend_tokenizer.normalizer = normalizers.Lowercase()
    hf.save_pretrained(tiny / "other")
    lines = (tiny / "web.jsonl").read_text().splitlines(keepends=True)
    (tiny / "more.jsonl").write_text("".join([*lines, lines[0].replace("web 0", "web 300")]))
    return tiny


def version(runs: Path) -> Path:
    return runs / "tiny" / "version_0"


def changed(tiny: Path, change: str) -> list[str]:
    """Command line that resumes with a config in which something is different."""
    file = tiny / "change.yaml"
    file.write_text(change.replace("TMP", str(tiny)))
    return ["fit", "--config", str(tiny / "tiny.yaml"), "--config", str(file), "--ckpt_path", "last"]


def stages(old: str, new: str) -> str:
    assert old in STAGES
    return f"data: {{init_args: {{stages: {json.dumps(yaml.safe_load(STAGES.replace(old, new)))}}}}}"


@pytest.mark.medium
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stages("foundation", "base"), "stage 'foundation' (number 1) has begun, the config has 'base' there"),
        (stages("3K", "4K"), "stage 'foundation' (number 1) is over, after 3,072 tokens, the config gives it 4,096"),
        (stages("90.6", "90.5"), "stage 'foundation' (number 1) has begun with the mix {'web': 453, 'wiki': 47}"),
        (stages("81.7", "80"), "stage 'refinement' (number 2) has begun with the mix {'web': 817, 'wiki': 183}"),
        (stages("2K", "0.5K"), "would end 256 tokens before the point where the run resumes: give it at least 768"),
        (
            stages(STAGES[STAGES.index("  - {name: ref") :], ""),  # shorter than what is done
            "stage 'refinement' (number 2) has begun, the config ends after 1",
        ),
        ("seed_everything: 4", "seed_everything is 4, the run began with 3: set it back"),
        ("data: {init_args: {seed: 4}}", "data.seed is 4, the run began with 3: set it back"),
        (
            "data: {init_args: {context_length: 16}}",
            "another decoder than the config: data.context_length 32 (here 16)",
        ),
        ("data: {init_args: {batch_tokens: 512}}", "data.batch_tokens is 512, the run began with 256"),
        ("data: {init_args: {tokenizer: TMP/other}}", "trained with the tokenizer 'danube-small'"),
        (
            "data: {init_args: {sources: {web: {path: TMP/more.jsonl}, wiki: {path: TMP/wiki.jsonl}}}}",
            "data.sources: 'web' now holds ",
        ),
        (
            "data: {init_args: {sources: {wiki: {path: TMP/wiki.jsonl}, web: {path: TMP/web.jsonl}}}}",
            "data.sources: the order of the sources decides the order of samples: keep web, wiki in this order",
        ),
        ("data: {init_args: {held_out: 0.1}}", "data.sources: 'web' now holds "),
        (
            "model: {init_args: {decoder: {hidden_size: 64}}}",
            "the checkpoint holds another decoder than the config: hidden_size 32 (here 64)",
        ),
        (
            "model: {init_args: {optimizer: {class_path: Muon}}}",
            "the run was trained with AdamW, model.optimizer is Muon: set it back",
        ),
    ],
)
def test_what_would_be_another_run_is_refused_and_nothing_is_written(
    stopped: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in version(stopped / "runs").rglob("*.*") if "events" not in path.name}

    before = files()
    assert message in error_of(capsys, *changed(stopped, change))
    assert files() == before
    assert [path.name for path in (stopped / "runs" / "tiny").iterdir()] == ["version_0"]


@pytest.mark.medium
def test_decays_branch_from_one_stable_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decay that begins at the checkpoint of a stable run ends bit by bit where a run with both parts ends."""
    tiny = write_tiny(tmp_path)
    stable, longer = (tmp_path / f"{name}.yaml" for name in ("stable", "longer"))
    foundation, *rest = yaml.safe_load(STAGES)
    rate = {"peak": 0.01, "final": 0.0, "warmup": "1K", "shape": "wsd"}

    def config(file: Path, stages: list[dict[str, Any]], decay: Any) -> list[str]:
        model = {"init_args": {"learning_rate": {**rate, "decay": decay}}}
        file.write_text(json.dumps({"data": {"init_args": {"stages": stages}}, "model": model}))
        return ["fit", "--config", str(tiny / "tiny.yaml"), "--config", str(file)]

    def last(name: str) -> dict[str, Any]:
        (path,) = (tmp_path / "runs" / name / "version_0" / "checkpoints").glob("stage_2_*.ckpt")
        return torch.load(path, weights_only=True)

    assert main(config(stable, [foundation], 0)) == 0
    (checkpoint,) = (tmp_path / "runs" / "tiny" / "version_0" / "checkpoints").glob("stage_1_*.ckpt")
    before = checkpoint.read_bytes()
    # The paper's last stage, whose length is the decay's, and a shorter decay of which the end is told as a share.
    branches = {
        "quality": config(longer, [foundation, rest[1]], "${data.init_args.stages.1.tokens}"),
        "short": config(tmp_path / "short.yaml", [foundation, {**rest[1], "tokens": 1024}], "25 %"),
    }
    for name, command in branches.items():
        capsys.readouterr()
        assert main([*command, "--name", name, "--ckpt_path", str(checkpoint)]) == 0
        said = capsys.readouterr().out
        assert "the config has changed since" in said and "model.learning_rate.decay: 0 → " in said, said
    assert main([*branches["quality"], "--name", "whole"]) == 0
    assert checkpoint.read_bytes() == before
    # 12 stable steps of 256 tokens, 6 of 1,536 tokens, which "1.5K" is rounded up to; or 4 of a quarter of 4,096.
    for name, steps, decay in (("quality", 18, 1500), ("short", 16, 1024)):
        rates = scalars(tmp_path / "runs" / name / "version_0", "optimizer/learning_rate")
        expected = {step: 0.01 * min(1, 256 * (steps - step) / decay) for step in range(13, steps + 1)}
        assert {step: pytest.approx(rate, rel=1e-6) for step, rate in rates.items()} == expected
    stable_rates = scalars(tmp_path / "runs" / "tiny" / "version_0", "optimizer/learning_rate")
    assert stable_rates[12] == pytest.approx(0.01, rel=1e-6)
    branch, whole = last("quality"), last("whole")
    assert all(torch.equal(branch["state_dict"][name], whole["state_dict"][name]) for name in whole["state_dict"])
    mine, theirs = (one["optimizer_states"][0]["state"] for one in (branch, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key][name], theirs[key][name]) for key in theirs for name in theirs[key])


@pytest.mark.medium
def test_what_lies_ahead_may_change_and_is_shown_and_recorded(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    run = version(tmp_path / "runs")
    change = yaml.safe_load(stages("finish, tokens: 1.5K", "end, tokens: 3K"))
    change["data"]["init_args"] |= {"micro_batch_size": 4, "workers": 1}
    rate = {"peak": 0.02, "final": 0.001, "warmup": "1K"}
    change["model"] = {"init_args": {"learning_rate": rate, "optimizer": {"betas": [0.9, 0.99]}}}
    change["trainer"] = {"log_every_n_steps": 2}
    change["runs"] = str(tmp_path / "runs")
    capsys.readouterr()
    assert main(changed(stopped, json.dumps(change))) == 0
    checkpoint = run / "checkpoints" / "step_00000015.ckpt"
    said = capsys.readouterr().out
    lines = said[: said.index("model: ")].splitlines()
    block = [line for line in lines if not line.startswith("precision ")]
    assert "the learning rate of step 16 is " in said
    assert block.pop(0) == f"--ckpt_path last: {checkpoint}; the run continues in the same version"
    assert block[0] == f"the config has changed since {checkpoint}, step 15:"
    assert block[-1] == "  the run now has 8,192 tokens; from here on the learning rate follows that length"
    assert set(block[1:-1]) == {
        f"  runs: {stopped}/runs → {tmp_path}/runs",
        "  data.micro_batch_size: 8 → 4",
        "  data.workers: 0 → 1",
        "  data.stages.finish.name: finish → not set",
        "  data.stages.finish.tokens: 1.5K → not set",
        "  data.stages.finish.mix.web: 51.6 → not set",
        "  data.stages.finish.mix.wiki: 48.4 → not set",
        "  data.stages.end.name: not set → end",
        "  data.stages.end.tokens: not set → 3K",
        "  data.stages.end.mix.web: not set → 51.6",
        "  data.stages.end.mix.wiki: not set → 48.4",
        "  model.learning_rate.peak: 0.01 → 0.02",
        "  model.optimizer.betas: [0.9, 0.95] → [0.9, 0.99]",
        "  trainer.log_every_n_steps: 1 → 2",
        "  trainer.max_steps: 15 → -1",
    }
    first, second = (json.loads(line) for line in (run / "history.jsonl").read_text().splitlines())
    assert (first["step"], first["checkpoint"], first["devices"], first["differences"]) == (0, None, 1, {})
    assert (second["step"], second["checkpoint"], second["devices"]) == (15, str(checkpoint), 1)
    assert second["differences"]["model.learning_rate.peak"] == [0.01, 0.02]
    assert len(second["differences"]) == len(block) - 2
    assert second["versions"]["torch"] and "commit" in second
    # config.yaml is the one that continues from here.
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["learning_rate"]["peak"] == 0.02
    rates = scalars(run, "optimizer/learning_rate")
    new = LearningRate(peak=0.02, final=0.001, warmup="1K")
    assert rates[15] == pytest.approx(LearningRate(0.01, 0.001, "1K").at(15 * 256, 6656), rel=1e-6)  # float32
    assert rates[16] == pytest.approx(new.at(16 * 256, 8192), rel=1e-6)
    assert rates[32] == pytest.approx(0.001, rel=1e-6)
    last = torch.load(run / "checkpoints" / "stage_3_end_step_00000032.ckpt", weights_only=True)
    (optimizer,) = last["optimizer_states"]
    assert {tuple(group["betas"]) for group in optimizer["param_groups"]} == {(0.9, 0.99)}
    assert {int(state["step"]) for state in optimizer["state"].values()} == {32}  # the moments have gone on
    summary = json.loads((run / "summary.json").read_text())
    assert [(stage["name"], stage["tokens"]) for stage in summary["stages"]] == [
        ("foundation", 3072),
        ("refinement", 2048),
        ("end", 3072),
    ]


@pytest.mark.medium
def test_the_same_config_shows_nothing(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path)]
    command = ["fit", "--config", str(stopped / "tiny.yaml"), *runs, "--trainer.log_every_n_steps", "2"]
    assert main([*command, "--trainer.max_steps", "7"]) == 0
    config = str(version(tmp_path) / "config.yaml")
    for checkpoint in (version(tmp_path) / "checkpoints").iterdir():
        if checkpoint.name != "step_00000005.ckpt":
            checkpoint.unlink()
    capsys.readouterr()
    assert main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_steps", "7"]) == 0
    assert "changed" not in capsys.readouterr().out
    second = json.loads((version(tmp_path) / "history.jsonl").read_text().splitlines()[1])
    assert second["differences"] == {} and second["step"] == 5
    Path(config).write_text("a: &a [*a]")
    assert main([*command, "--ckpt_path", "last", "--trainer.max_steps", "7"]) == 0
    assert f"{config} cannot be read, so what has changed since is not known" in capsys.readouterr().err


def test_differences_are_keyed_as_a_person_would() -> None:
    """By the names of stages and classes, so that one more in front does not change the keys of all that follow."""
    old: dict[str, Any] = {
        "stages": [{"name": "a", "tokens": 1}, {"name": "b", "tokens": 2}],
        "callbacks": [{"class_path": "x.One", "init_args": {"n": 1}}, {"class_path": "x.Two"}, {"class_path": "x.Two"}],
        "list": [1, 2],
        "ckpt_path": None,
    }
    new = copy.deepcopy(old)
    new["stages"].insert(0, {"name": "c", "tokens": 2})
    new["callbacks"][0]["init_args"]["n"] = 2
    new["callbacks"][2]["class_path"] = "x.Three"
    new |= {"list": [1], "ckpt_path": "last", "new": {"key": None, "other": 0}}
    assert differences(old, new) == {
        "stages.c.name": (None, "c"),
        "stages.c.tokens": (None, 2),
        "callbacks.One.n": (1, 2),
        "callbacks.1.class_path": ("x.Two", None),
        "callbacks.2.class_path": ("x.Two", None),
        "callbacks.Two.class_path": (None, "x.Two"),
        "callbacks.Three.class_path": (None, "x.Three"),
        "list": ([1, 2], [1]),
        "new.other": (None, 0),
    }


def test_without_a_saved_config_there_is_nothing_to_compare(tmp_path: Path) -> None:
    assert read_saved_config(tmp_path / "config.yaml") is None
    (tmp_path / "config.yaml").write_text("a: [")
    assert read_saved_config(tmp_path / "config.yaml") is None


def test_the_history_only_grows(tmp_path: Path) -> None:
    for step in (0, 5):
        append_history(tmp_path / "run" / "history.jsonl", step=step)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5]
    assert lines[0].keys() == {"time", "step", "versions", "commit"}
