"""Every "Adding …" section of CONTRIBUTING.md is shown by an example: a patch beside this file, of the section's name.

A patch touches the files that its section names, and no others. Each slow test applies a patch to a copy of the
repository, and shows in separate processes that the addition works for a user.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube.checkpoints.runs import read_step
from tests.rows import write_rows

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).parent
MOST_FILES_OF_CODE = 3
"""CONTRIBUTING.md promises it."""
OPTIONAL = "Nothing to write if"
"""A numbered file of a section may be left out if its text has these words."""


def sections() -> dict[str, str]:
    """Returns name → text of the sections. "**A part of an evaluation.**" is called "part-of-an-evaluation"."""
    chapter = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\n## Adding …\n")[2].partition("\n## ")[0]
    _, *parts = re.split(r"^\*\*An? ([\w ]+)\.\*\*", chapter, flags=re.MULTILINE)
    return {name.replace(" ", "-"): text for name, text in zip(parts[::2], parts[1::2], strict=True)}


def paths_in(text: str) -> list[str]:
    """Returns the paths in backticks, such as `configs/<room>/quickstart.yaml`."""
    return re.findall(r"`([\w<>./-]+\.(?:py|yaml|ipynb|md))`", text)


def matches(path: str, named: str) -> dict[str, str] | None:
    """Returns placeholder → its value if a path is the one that a section names, in full or within the package."""
    parts = re.split(r"<(\w+)>", named)
    pattern = ""
    for place, part in enumerate(parts):
        known = f"(?P<{part}>" in pattern
        pattern += re.escape(part) if place % 2 == 0 else f"(?P={part})" if known else f"(?P<{part}>[^/]+)"
    found = re.fullmatch(f"(?:lightning_danube/)?{pattern}", path)
    return None if found is None else found.groupdict()


def files_of_code(paths: Iterable[str]) -> list[str]:
    """Returns the paths of Python files of the package, of which callbacks/ is a part."""
    return sorted(path for path in paths if re.match(r"(lightning_danube|callbacks)/.*\.py$", path))


def touched(patch: Path) -> set[str]:
    """Returns the paths of the files that a patch changes or makes."""
    return set(re.findall(r"^diff --git a/\S+ b/(\S+)$", patch.read_text("utf-8"), flags=re.MULTILINE))


def what_is_wrong(files: set[str], section: str) -> list[str]:
    """Returns how the files of a patch differ from those of a section."""
    wrong: list[str] = []
    values: dict[str, str] = {}
    for path in sorted(files):
        found = [placeholders for named in paths_in(section) if (placeholders := matches(path, named)) is not None]
        if not found:
            wrong.append(f"{path} is not named")
        # A file that is named in full is not a value of a placeholder.
        for name, value in min(found, key=len).items() if found else ():
            if values.setdefault(name, value) != value:
                wrong.append(f"<{name}> is {values[name]} and {value}")
    for item in re.findall(r"^\d+\. (.*?)(?=^\d+\. |^\S|\Z)", section, flags=re.MULTILINE | re.DOTALL):
        named = paths_in(item)
        if OPTIONAL not in item and not any(matches(path, one) is not None for path in files for one in named):
            wrong.append(f"{named[0]} is left out")
    return wrong


# --- the patches ------------------------------------------------------------------------------------------------------


def git_apply(patch: Path, directory: Path, *options: str) -> None:
    # The copy is not a repository, and may lie in one.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    command = ["git", "apply", *options, str(patch)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"tests/adding/{patch.name} no longer fits the code: apply it with `git apply --3way`, fix the conflicts, and "
        f"write it again with `git diff HEAD > {patch.name}`\n{done.stderr}"
    )


def test_every_section_has_a_patch_and_every_patch_a_section() -> None:
    assert len(sections()) > 5
    assert {patch.stem for patch in PATCHES.glob("*.patch")} == set(sections())


@pytest.mark.parametrize("name", sections())
def test_a_patch_touches_what_its_section_names(name: str) -> None:
    patch = PATCHES / f"{name}.patch"
    assert what_is_wrong(touched(patch), sections()[name]) == []
    git_apply(patch, ROOT, "--check")


def test_contributing_promises_three_files_of_code_at_most() -> None:
    chapter = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\n## Adding …\n")[2]
    assert "Each addition changes one to three files of code: the Python files of `lightning_danube` and" in chapter
    assert MOST_FILES_OF_CODE == 3


@pytest.mark.parametrize("name", sections())
def test_an_addition_is_at_most_three_files_of_code(name: str) -> None:
    code = files_of_code(touched(PATCHES / f"{name}.patch"))
    assert len(code) <= MOST_FILES_OF_CODE, code
    # Also with the files that the example does not need.
    numbered = [paths_in(item)[0] for item in re.findall(r"^\d+\. .*", sections()[name], flags=re.MULTILINE)]
    assert len(files_of_code(numbered)) <= MOST_FILES_OF_CODE, numbered


def test_files_of_code_are_those_of_the_package() -> None:
    paths = ["lightning_danube/a/b.py", "callbacks/a.py", "tests/a.py", "configs/a.yaml", "notebooks/execute.py"]
    assert files_of_code(paths) == ["callbacks/a.py", "lightning_danube/a/b.py"]


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"lightning_danube/cli/a.py", "configs/a.yaml"}, []),
        ({"lightning_danube/cli/a.py", "configs/b.yaml"}, ["<name> is b and a"]),
        ({"lightning_danube/cli/a.py"}, ["configs/<name>.yaml is left out"]),
        ({"lightning_danube/cli/a.py", "configs/a.yaml", "docs/a.md"}, ["docs/a.md is not named"]),
    ],
)
def test_a_patch_that_differs_from_its_section_is_found(files: set[str], wrong: list[str]) -> None:
    section = (
        f"\n1. `cli/<name>.py`: this\n   and that.\n2. `configs/<name>.yaml`.\n3. `x.py`: {OPTIONAL} so.\n\nEnd.\n"
    )
    assert what_is_wrong(files, section) == wrong


# --- what a patch adds ------------------------------------------------------------------------------------------------


class Added:
    """A copy of the repository with a patch."""

    def __init__(self, name: str, directory: Path) -> None:
        self.root, self.work = directory / "repository", directory / "work"
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for file in filter(None, names.split("\0")):
            target = self.root / file
            target.parent.mkdir(parents=True, exist_ok=True)
            # The package reaches callbacks/ and configs/ by symbolic links, which are copied as they are.
            if (ROOT / file).exists():
                shutil.copy2(ROOT / file, target, follow_symlinks=False)
        git_apply(PATCHES / f"{name}.patch", self.root)
        self.work.mkdir()

    def python(self, *arguments: object, cwd: Path | None = None, code: int = 0) -> str:
        """Runs Python with the copy's package, and returns both of its outputs."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd or self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def command(self, *arguments: object, code: int = 0) -> str:
        return self.python("-m", "lightning_danube", *arguments, code=code)

    def tests(self, *arguments: object) -> None:
        """Runs tests of the copy. They fail if there are none."""
        self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, cwd=self.root)


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    (file,) = (file for file in run.glob("checkpoints/*.ckpt") if read_step(file) == step)
    found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
def test_a_configuration_is_listed_and_instantiated(tmp_path: Path) -> None:
    added = Added("configuration", tmp_path)
    assert "\npretrain/qwen3-shape " in added.command("configs")
    assert "qwen3-shape: 3 layers" in added.command("plan", "--config", "pretrain/qwen3-shape")
    added.tests("tests/test_configs.py", "-k", "qwen3-shape")


@pytest.mark.slow
def test_a_study_is_found_and_its_variants_are_real(tmp_path: Path) -> None:
    added = Added("study", tmp_path)
    assert "\nstudies/tied " in added.command("configs")
    said = added.python(
        "-c",
        "from lightning_danube.studies.design import read_design; d = read_design('studies/tied'); print(*d.variants)",
    )
    assert said.split() == ["tied", "untied"]
    added.tests("tests/test_configs.py", "-m", "", "-k", "tied")


@pytest.mark.slow
def test_a_verb_is_listed_and_runs(tmp_path: Path) -> None:
    added = Added("verb", tmp_path)
    assert "\n  count " in added.command("--help")
    texts = write_rows(tmp_path / "work" / "texts.jsonl", {"text": "The river walks."}, {"text": "Seven stones."})
    from lightning_danube.tokens.tokenizer import load_hf_tokenizer

    tokenizer = load_hf_tokenizer("danube-small")
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in ("The river walks.", "Seven stones.")]
    *_, row = added.command("count", "texts.jsonl").splitlines()
    assert row.split() == [texts.name, "2", str(sum(map(len, ids)))]
    added.tests("tests/test_start.py", "tests/test_signals.py", "-m", "", "-k", "count")


@pytest.mark.slow
def test_a_callback_logs_and_is_explained(tiny: Path, tmp_path: Path) -> None:
    added = Added("callback", tmp_path)
    config = tiny / "tiny.yaml"
    first = "    - class_path: lightning_danube.callbacks.Progress\n"
    config.write_text(config.read_text().replace(first, f"{first}{first.replace('Progress', 'WeightNorms')}"))
    added.command("fit", "--config", config, "--trainer.max_steps", 3)
    run = tiny / "runs" / "tiny" / "version_0"
    code = (
        "import pathlib, sys\nfrom lightning_danube.reports import runs, tensorboard\n"
        "run = runs.read_run(pathlib.Path(sys.argv[1]))\n"
        "print(run.curves['weights/norm'].iloc[-1])\nprint(*tensorboard.tags(run).loc['weights/norm'])"
    )
    *_, norm, told = added.python("-c", code, run).splitlines()
    # TensorBoard keeps float32. The head is not tied, so each weight stands once in the checkpoint.
    squares = sum(float(weight.double().square().sum()) for weight in weights_of(run, 3).values())
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-5)
    assert told.startswith("3 ") and told.endswith("lightning_danube.callbacks.WeightNorms")
    added.tests("tests/callbacks/test_hooks.py", "tests/reports/test_tags.py", "tests/test_layering.py")


KEPT_BY_LION = """
import torch
from lightning_danube.model import Decoder, DecoderConfig
from lightning_danube.planning.memory import TrainingMemory
from lightning_danube.training.optim import Lion

config = DecoderConfig(32, 64, 2, 4, 2, vocab_size=64, max_position_embeddings=16)
decoder = Decoder(config)
optimizer = Lion().build(decoder, lr=0.1)
before = [weight.detach().clone() for weight in decoder.parameters()]
for weight in decoder.parameters():
    weight.grad = torch.ones_like(weight)
optimizer.found_inf = torch.tensor(1.0)
optimizer.step()
assert all(map(torch.equal, before, decoder.parameters()))
optimizer.found_inf = torch.tensor(0.0)
optimizer.step()
assert not any(map(torch.equal, before, decoder.parameters()))
kept = sum(value.numel() for state in optimizer.state.values() for value in state.values())
assert TrainingMemory(config, 1, 16, averages=Lion.averages).peak().optimizer == 4 * kept
"""


@pytest.mark.slow
def test_an_optimizer_trains_and_goes_on_bit_by_bit(tiny: Path, tmp_path: Path) -> None:
    added = Added("optimizer", tmp_path)
    added.python("-c", KEPT_BY_LION)
    lion = tmp_path / "lion.yaml"
    lion.write_text("model: {init_args: {optimizer: {class_path: Lion}, learning_rate: {peak: 1.0e-3}}}")
    fit = ("fit", "--config", tiny / "tiny.yaml", "--config", lion)
    added.command(*fit, "--trainer.max_steps", 5)
    said = added.command(*fit[:3], "--ckpt_path", "last", code=2)
    assert "the run was trained with Lion, model.optimizer is AdamW" in said
    added.command(*fit, "--trainer.max_steps", 10, "--ckpt_path", "last")
    added.command(*fit, "--trainer.max_steps", 10, "--name", "whole")
    runs = tiny / "runs"
    resumed, whole = (weights_of(runs / name / "version_0", 10) for name in ("tiny", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert not all(torch.equal(whole[name], weights_of(runs / "whole" / "version_0", 5)[name]) for name in whole)


@pytest.mark.slow
def test_a_part_of_an_evaluation_has_its_rows_in_the_report(tiny_run: Path, tmp_path: Path) -> None:
    added = Added("part-of-an-evaluation", tmp_path)
    options = {
        "name": "copying",
        "data.class_path": "lightning_danube.evaluation.EvaluationData",
        "data.init_args.tokenizer": tiny_run,
        "data.init_args.copying": "{length: 8, trials: 5}",
        "model.class_path": "lightning_danube.evaluation.Evaluation",
        "model.init_args.weights": tiny_run,
        "trainer.accelerator": "cpu",
        "trainer.callbacks": "[{class_path: lightning_danube.callbacks.EvaluationReport}]",
    }
    added.command("test", *(f"--{key}={value}" for key, value in options.items()))
    run = added.work / "runs" / "copying-test" / "version_0"
    assert "## Copying\n" in (run / "report.md").read_text()
    (row,) = json.loads((run / "summary.json").read_text())["results"]
    assert (row["table"], row["n"]) == ("copying", 5) and 0 <= row["value"] <= 1


@pytest.mark.slow
def test_a_notebook_is_executed_and_found(tiny_run: Path, tmp_path: Path) -> None:
    """The patch has no outputs: they come with the command that the section names."""
    added = Added("notebook", tmp_path)
    shutil.copytree(tiny_run, added.root / "runs" / "quickstart" / "version_0")
    said = added.python("notebooks/execute.py", "notebooks/optimizer.ipynb", cwd=added.root)
    assert "optimizer.ipynb: executed" in said
    added.tests("tests/test_notebooks.py", "-m", "", "-k", "optimizer")


PLANNED_WITH_BIASES = """
import dataclasses, sys
from lightning_danube.model import Decoder
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.weights.gguf.files import read_gguf_config

config = read_gguf_config(sys.argv[1])
assert config.mlp_bias
plain = dataclasses.replace(config, mlp_bias=False)
layers, inner, outer = config.num_hidden_layers, config.intermediate_size, config.hidden_size
for devices in (1, 2):
    layout = Layout(tensor_parallel=devices)
    kept, without = (TrainingMemory(shape, 1, 16, layout=layout).parameters for shape in (config, plain))
    assert kept - without == layers * (2 * inner // devices + outer), "a bias of down is whole everywhere"
assert config.parameters == sum(weight.numel() for weight in Decoder(config).parameters())
"""


@pytest.mark.slow
def test_a_model_variant_trains_is_planned_and_is_in_every_format(tiny: Path, tmp_path: Path) -> None:
    added = Added("model-variant", tmp_path)
    biases = tmp_path / "biases.yaml"
    biases.write_text("model: {init_args: {decoder: {mlp_bias: true}}}")
    configs = ("--config", tiny / "tiny.yaml", "--config", biases)
    added.command("fit", *configs, "--trainer.max_steps", 2)
    run = tiny / "runs" / "tiny" / "version_0"
    trained = weights_of(run, 2)
    assert trained["decoder.model.layers.1.mlp.down_proj.bias"].abs().sum() > 0
    assert f"{sum(weight.numel() for weight in trained.values()):,} parameters" in added.command("plan", *configs)
    for kind, out in (("hf", "exported"), ("gguf", "model.gguf")):
        added.command("export", "--weights", run, "--format", kind, "--out", out)
    assert "| biases of the feed-forward | of gate, up and down |\n" in (added.work / "exported/README.md").read_text()
    added.python("-c", PLANNED_WITH_BIASES, added.work / "model.gguf")
    asked = ("--prompt", "The river", "--max-new-tokens", 4, "--temperature", 0)
    first, *others = (added.command("generate", "--weights", name, *asked) for name in (run, "exported", "model.gguf"))
    assert first.startswith("The river") and others == [first, first]
    files = ("test_architecture.py", "test_variants.py", "../generation/test_compiled_steps.py")
    added.tests(*(f"tests/model/{file}" for file in files), "tests/weights/test_families.py", "-k", "biases")


@pytest.mark.slow
def test_a_task_in_a_room_of_its_own_trains(tiny_run: Path, tmp_path: Path) -> None:
    added = Added("task", tmp_path)
    chats = write_rows(
        added.work / "chats.jsonl",
        *(
            {"messages": [{"role": "user", "content": f"river {n}?"}, {"role": "assistant", "content": "stone"}]}
            for n in range(40)
        ),
    )
    options: dict[str, Any] = {
        "model.init_args.weights": tiny_run,
        "data.init_args.sources": json.dumps({"chats": {"path": str(chats)}}),
        "data.init_args.context_length": 32,
        "data.init_args.held_out": 0.1,
        "data.init_args.batch_rows": 2,
        "data.init_args.micro_batch_size": 2,
        "data.init_args.cache_dir": added.work / "cache",
        "model.init_args.learning_rate.warmup": 0,
        "trainer.max_steps": 2,
    }
    fit = ("fit", "--config", "anchoring/quickstart", *(f"--{key}={value}" for key, value in options.items()))
    for pull in (0, 100):
        added.command(*fit, "--model.init_args.pull", pull)
    begun = weights_of(tiny_run, 26)
    plain, pulled = (weights_of(added.work / "runs" / "anchoring-quickstart" / f"version_{n}", 2) for n in (0, 1))
    assert plain.keys() == begun.keys(), "the initial model is not part of a checkpoint"
    assert not torch.equal(plain["decoder.lm_head.weight"], pulled["decoder.lm_head.weight"])
    files = ("tests/test_layering.py", "tests/test_project.py", "tests/test_configs.py", "tests/docs/test_reference.py")
    added.tests(*files, "-k", "layering or project or anchoring or options_on_the_page")
