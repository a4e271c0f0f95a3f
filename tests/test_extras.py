"""What a plain install does without the extras, and what it says where one is needed."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_danube import extras
from lightning_danube.extras import MODULES, install_command, missing_module, need

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OURS = canonicalize_name(PROJECT["name"])
# Packages whose names differ from the names of their modules and may not be installed.
PACKAGES = {"lm_eval": "lm-eval", "llama_cpp": "llama-cpp-python", "mlflow": "mlflow-skinny"}
# A plain install has the last two: datasets asks for pandas.
BLOCKED = sorted({module for modules in MODULES.values() for module in modules} - {"jinja2", "pandas"})
HIDDEN = sorted({PACKAGES.get(module, module) for module in BLOCKED})
# Runs command lines, until one fails, as if the modules of all extras were not installed.
WITHOUT_EXTRAS = f"""
import json, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name in {BLOCKED!r} else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        if context.name in {HIDDEN!r}:
            return []
        return getattr(self.finder, "find_distributions", lambda context: [])(context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from lightning_danube.__main__ import main
sys.exit(next((code for code in map(main, json.loads(sys.argv[1])) if code), 0))
"""


def packages_of(requirements: list[str]) -> set[str]:
    """Names of the packages, those of the project's own extras among them."""
    found = set()
    for line in requirements:
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) == OURS:
            for extra in requirement.extras:
                found |= packages_of(PROJECT["optional-dependencies"][extra])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


BASE = packages_of(PROJECT["dependencies"])


def imported_modules() -> dict[str, str]:
    """Top-level module that the package imports, by whatever statement → one file that does."""
    files = [*(ROOT / "lightning_danube").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    assert len(files) > 100
    found = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                found[name.partition(".")[0]] = str(file.relative_to(ROOT))
    return {name: file for name, file in found.items() if name not in {*sys.stdlib_module_names, "lightning_danube"}}


@cache
def installed_packages() -> Mapping[str, list[str]]:
    """Module → the packages that are installed with it."""
    return packages_distributions()


def packages_with(module: str) -> set[str]:
    installed = installed_packages().get(module, [])
    return {canonicalize_name(name) for name in (*installed, PACKAGES.get(module, module))}


def test_every_import_of_the_package_is_declared() -> None:
    of_extras = {module for modules in MODULES.values() for module in modules}
    of_extras.add("triton")  # comes with PyTorch for CUDA; the loss asks whether it is there
    for module, file in imported_modules().items():
        assert packages_with(module) & BASE or module in of_extras, f"{file} imports {module}: no requirement has it"


@pytest.mark.parametrize("extra", MODULES)
def test_every_extra_brings_the_modules_that_are_said_to_be_its(extra: str) -> None:
    packages = packages_of(PROJECT["optional-dependencies"][extra]) | BASE
    for module in MODULES[extra]:
        assert packages_with(module) & packages, f"the extra {extra} has no package with the module {module}"


def test_no_extra_repeats_what_a_plain_install_brings() -> None:
    for extra, requirements in PROJECT["optional-dependencies"].items():
        again = packages_of(requirements) & BASE
        assert not again, f"the extra {extra} names {', '.join(again)}, which a plain install has"


def without_extras(commands: list[list[str]], cwd: Path) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-c", WITHOUT_EXTRAS, json.dumps(commands)]
    return subprocess.run(script, cwd=cwd, capture_output=True, text=True)


@pytest.mark.medium
def test_a_plain_install_trains_writes_and_exports(tiny: Path) -> None:
    run = str(tiny / "runs" / "tiny" / "version_0")
    commands = [
        ["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.max_steps", "3"],
        ["generate", "--weights", run, "--prompt", "The river", "--max-new-tokens", "4"],
        ["export", "--weights", run, "--format", "hf", "--out", str(tiny / "hf")],
        ["export", "--weights", run, "--format", "gguf", "--out", str(tiny / "model.gguf")],
    ]
    done = without_extras(commands, tiny)
    assert done.returncode == 0, done.stderr
    assert (tiny / "hf" / "model.safetensors").is_file() and (tiny / "model.gguf").is_file()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("command", "said", "extra"),
    [
        (["study", "--config", "studies/quickstart"], "a study needs optuna", "study"),
        (
            ["prepare", "--config", "quickstart", "--data.init_args.deduplicate", "near"],
            "deduplicate: near needs rensa",
            "dedup",
        ),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    command: list[str], said: str, extra: str, tmp_path: Path
) -> None:
    done = without_extras([command], tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert f"{said}, which is not installed; type: " in line
    assert line.endswith(f"'lightning-danube[{extra}]'")


def test_reports_need_their_extra(tmp_path: Path) -> None:
    code = WITHOUT_EXTRAS.partition("from lightning_danube.__main__")[0] + "import lightning_danube.reports"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "lightning_danube.reports needs matplotlib, which is not installed" in done.stderr.splitlines()[-1]


def block(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)


def test_levels_by_hqq_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_danube.quantization.levels import parse_level, why_not

    block(monkeypatch, "hqq")
    for level in ("hqq:4/64", "rounding:4/64"):
        assert "needs hqq, which is not installed" in str(why_not(parse_level(level)))
    assert why_not(parse_level("bitsandbytes:nf4")) is None


def test_academic_benchmarks_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    block(monkeypatch, "lm_eval")
    monkeypatch.delitem(sys.modules, "lightning_danube.evaluation.harness", raising=False)
    with pytest.raises(ValueError, match=r"an academic benchmark needs lm_eval, .*\[evaluation\]'"):
        import lightning_danube.evaluation.harness  # noqa: F401


def test_without_matplotlib_no_figure_is_drawn_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import Trainer

    from lightning_danube.callbacks.progress import can_draw

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert can_draw(trainer)
    block(monkeypatch, "matplotlib")
    capsys.readouterr()
    assert not can_draw(trainer)
    assert capsys.readouterr().out.startswith("no figure is drawn without matplotlib; type: ")


def test_a_broken_package_is_not_called_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "rensa.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rensa", raising=False)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        missing_module("dedup")


def test_what_is_typed_follows_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("study").endswith(" -e '.[study]'") and "-c constraints.txt" in install_command("study")
    monkeypatch.chdir(tmp_path)
    assert install_command("study").endswith(" 'lightning-danube[study]'")
    assert "constraints" not in install_command("study")
    need("study", "a study")


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cpu", "2.11.0+cu130"])
def test_the_installed_torch_is_kept_whatever_its_build(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package index has a version such as 2.11.0+cpu beside the plain one."""
    monkeypatch.setattr(extras.importlib.metadata, "version", lambda name: version)
    assert " torch==2.11.0 " in install_command("study")


def test_a_clone_has_its_constraints_and_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "constraints.txt").touch()
    assert install_command("study").endswith(" 'lightning-danube[study]'")
    (tmp_path / "constraints.txt").unlink()
    (tmp_path / "lightning_danube").mkdir()
    assert install_command("study").endswith(" 'lightning-danube[study]'")
    (tmp_path / "constraints.txt").touch()
    assert install_command("study").endswith(" -e '.[study]'")


def test_every_module_of_an_extra_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "MODULES", {"study": ("json", "csv", "no_module_of_that_name")})
    assert missing_module("study") == "no_module_of_that_name"
    with pytest.raises(ValueError, match="a study needs no_module_of_that_name, which is not installed; type: "):
        need("study", "a study")
