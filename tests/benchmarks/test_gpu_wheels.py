"""A machine that has PyTorch, Lightning, transformers and what these bring needs only the wheels that are carried."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
MACHINE = (
    "lightning",
    "matplotlib",
    "peft",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sentencepiece",
    "statsmodels",
    "tensorboard",
    "torch",
    "torchmetrics",
    "transformers",
)
"""What a machine made for PyTorch has, with all that these packages require."""
# Runs command lines, until one fails, as if no other package were installed.
WITH_THESE_ALONE = """
import json, sys
from packaging.utils import canonicalize_name

modules, packages = set(json.loads(sys.argv[1])), set(json.loads(sys.argv[2]))

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in modules else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        if context.name and canonicalize_name(context.name) in packages:
            return []
        return getattr(self.finder, "find_distributions", lambda context: [])(context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from lightning_danube.__main__ import main
sys.exit(next((code for code in map(main, json.loads(sys.argv[3])) if code), 0))
"""


def carried() -> dict[str, Requirement]:
    lines = (ROOT / "benchmarks" / "gpu-wheels.txt").read_text("utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def brought(names: Iterable[str]) -> set[str]:
    """Returns packages and all that they require, on this machine."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # of another system, such as what torch brings for GPUs
            continue
        waiting += needed(lines, [*requirement.extras, ""])
    return found


def needed(lines: Iterable[str], extras: list[str]) -> Iterator[Requirement]:
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            yield requirement


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def has_another_version(name: str) -> bool:
    """Returns whether a package is here in a version that is not carried."""
    try:
        return name in pins() and distribution(name).version not in pins()[name].specifier
    except PackageNotFoundError:
        return False


@pytest.mark.medium
def test_fit_and_generate_need_nothing_else(tiny: Path) -> None:
    # The carried packages come without what they require. Another version here may require more.
    there = brought(MACHINE) | set(carried()) | brought(name for name in carried() if has_another_version(name))
    modules = {
        module: {canonicalize_name(name) for name in names} for module, names in packages_distributions().items()
    }
    hidden = [module for module, names in modules.items() if not names & there and module != "lightning_danube"]
    packages = {name for module in hidden for name in modules[module]}
    assert {"bitsandbytes", "hqq", "gigatoken", "pytest"} & set(hidden)
    run = str(tiny / "runs" / "tiny" / "version_0")
    commands = [
        ["plan", "--config", str(tiny / "tiny.yaml")],
        [
            "fit",
            "--config",
            str(tiny / "tiny.yaml"),
            "--data.init_args.tokenizer",
            "mistral",
            "--trainer.max_steps",
            "3",
        ],
        ["generate", "--weights", run, "--prompt", "The river", "--max-new-tokens", "4"],
    ]
    command = [sys.executable, "-c", WITH_THESE_ALONE, *map(json.dumps, (sorted(hidden), sorted(packages), commands))]
    done = subprocess.run(command, cwd=tiny, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The river" in done.stdout


def test_what_is_carried_has_one_version() -> None:
    peers = (ROOT / "benchmarks" / "peers.txt").read_text("utf-8").splitlines()
    for name, requirement in carried().items():
        assert (name in pins()) != (str(requirement) in peers), f"{requirement} has no pin, or two"
        assert name in pins() or requirement.specifier


def test_nothing_large_is_carried() -> None:
    assert not {"torch", "transformers", "lightning", "pyarrow", "bitsandbytes"} & carried().keys()
