"""The wheel alone: built, installed into an empty environment, and used from an empty directory."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
# No variable leads to the clone: pip, too, would take the project for installed.
# Modules are compiled once, at their first import: pip would compile every file of every package, which takes a minute.
DROPPED = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
CLEAN = {name: value for name, value in os.environ.items() if name not in DROPPED}

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the clone: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "clone", symlinks=True, ignore=NOT_COPIED)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-qq",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(folder / "clone"),
    ]
    subprocess.run(build, check=True, env=CLEAN)
    shutil.rmtree(folder / "clone")
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of an environment that has the wheel at the pinned versions, and nothing else."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    pins = ROOT / "constraints.txt"
    torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", "--no-compile"]
    subprocess.run([*pip, "--disable-pip-version-check", "-c", str(pins), torch, str(wheel)], check=True, env=CLEAN)
    return environment / "bin"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


def run(programs: Path, elsewhere: Path, *command: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command as in an activated environment."""
    environ = CLEAN | {"PATH": f"{programs}{os.pathsep}{CLEAN['PATH']}", "XDG_CACHE_HOME": str(elsewhere / "cache")}
    done = subprocess.run(
        [str(programs / command[0]), *command[1:]], cwd=elsewhere, env=environ, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"lightning_danube", f"lightning_danube-{VERSION}.dist-info"}
    assert {
        "lightning_danube/py.typed",
        "lightning_danube/callbacks/progress.py",
        "lightning_danube/evaluation/paper_scores.json",
        *(f"lightning_danube/configs/{file.relative_to(ROOT / 'configs')}" for file in ROOT.glob("configs/**/*.yaml")),
        *(
            file.relative_to(ROOT).as_posix()
            for file in (ROOT / "lightning_danube").rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        ),
    } <= set(names)


def test_configs_are_listed_and_copied(programs: Path, elsewhere: Path) -> None:
    assert "\nsft/quickstart " in run(programs, elsewhere, "lightning-danube", "configs").stdout
    said = run(programs, elsewhere, "lightning-danube", "configs", "copy", "quickstart", "mine.yaml").stdout
    assert "lightning-danube fit --config mine.yaml" in said
    assert (elsewhere / "mine.yaml").read_text() == (ROOT / "configs" / "quickstart.yaml").read_text()


def test_no_global_package_is_named_callbacks(programs: Path, elsewhere: Path) -> None:
    done = run(programs, elsewhere, "python", "-c", "import callbacks", code=1)
    assert "No module named 'callbacks'" in done.stderr
    where = run(programs, elsewhere, "python", "-c", "import lightning_danube; print(lightning_danube.__file__)").stdout
    assert where.startswith(str(programs.parent))


def test_a_typing_error_and_a_missing_extra_are_one_line(programs: Path, elsewhere: Path) -> None:
    done = run(programs, elsewhere, "lightning-danube", "fit", "--config", "quickstrt", code=2)
    assert done.stderr == "error: there is no config file quickstrt: did you mean quickstart?\n"
    done = run(programs, elsewhere, "lightning-danube", "study", "--config", "studies/quickstart", code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: a study needs optuna") and line.endswith("'lightning-danube[study]'")


def test_plan(programs: Path, elsewhere: Path) -> None:
    said = run(programs, elsewhere, "lightning-danube", "plan", "--config", "pretrain/danube3-500m").stdout
    assert "513,590,784 parameters" in said


def test_the_quickstart_from_prepare_to_gguf(programs: Path, elsewhere: Path) -> None:
    """The README's commands in its order. A copy of the config has the same data as the name."""
    run(programs, elsewhere, "lightning-danube", "configs", "copy", "quickstart", "copy.yaml")
    said = run(programs, elsewhere, "lightning-danube", "prepare", "--config", "copy.yaml", "--processes", "2").stdout
    assert "web" in said
    steps = ["--trainer.max_steps", "2", "--trainer.num_sanity_val_steps", "0"]
    fit = run(programs, elsewhere, "lightning-danube", "fit", "--config", "quickstart", *steps)
    assert "entering stage 1" in fit.stdout
    directory = "runs/quickstart/version_0"
    assert (elsewhere / directory / "config.yaml").is_file()
    words = ["generate", "--weights", directory, "--prompt", "The function returns", "--max-new-tokens", "8"]
    assert run(programs, elsewhere, "lightning-danube", *words).stdout.strip()
    for kind, out, file in (("hf", "exported", "exported/model.safetensors"), ("gguf", "model.gguf", "model.gguf")):
        export = ["export", "--weights", directory, "--format", kind, "--out", out]
        run(programs, elsewhere, "python", "-m", "lightning_danube", *export)
        assert (elsewhere / file).stat().st_size > 100_000
    assert run(programs, elsewhere, "lightning-danube", *words[:2], "exported", *words[3:]).stdout.strip()
