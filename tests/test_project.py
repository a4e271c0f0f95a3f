"""The files around the code agree with each other (requirements, pins, environment, documents); the fence holds."""

import ast
import pkgutil
import re
import socket
import subprocess
import tomllib
from collections.abc import Collection, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# The stack that the project promises to be built on.
STACK = {
    "bitsandbytes",
    "datasets",
    "lightning",
    "omegaconf",
    "peft",
    "tensorboard",
    "torch",
    "torchmetrics",
    "transformers",
}
FOLDERS = ("lightning_danube", "callbacks", "configs", "notebooks", "benchmarks", "tests", "docs", r"\.ci")


def by_name(requirements: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(requirement) for requirement in requirements]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def declared(without: Collection[str] = ()) -> dict[str, Requirement]:
    """Every requirement of pyproject.toml, extras included; an extra that names the project itself adds nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [
        requirement
        for name, extra in project["optional-dependencies"].items()
        if name not in without
        for requirement in extra
    ]
    requirements = by_name([*project["dependencies"], *extras])
    requirements.pop(canonicalize_name(project["name"]), None)
    return requirements


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return by_name([line for line in lines if line and not line.startswith("#")])


def peers() -> dict[str, Requirement]:
    """Packages that `make benchmark` installs without their requirements."""
    lines = (ROOT / "benchmarks" / "peers.txt").read_text("utf-8").splitlines()
    return by_name([line for line in lines if line and not line.startswith("#")])


def environment_pip_lines() -> list[str]:
    (pip,) = [
        entry["pip"]
        for entry in OmegaConf.load(ROOT / "environment.yml").dependencies
        if "pip" in entry and entry != "pip"
    ]
    return list(pip)


def environment() -> dict[str, Requirement]:
    return by_name([line for line in environment_pip_lines() if not line.startswith("-")])


def test_the_stack_is_required_without_any_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert by_name(project["dependencies"]).keys() >= STACK


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    pins = pinned()
    for name, requirement in declared().items():
        assert name in pins, f"constraints.txt does not pin {name}"
        (pin,) = pins[name].specifier
        assert requirement.specifier.contains(pin.version), f"pyproject.toml asks for {requirement}, the pin is {pin}"


def test_what_the_requirements_require_is_pinned_too() -> None:
    """A new version of one without a pin could break a fresh clone. What torch brings for GPUs follows torch."""
    pins = pinned()
    seen: set[tuple[str, ...]] = set()
    waiting = [Requirement("lightning-danube[test]")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        if name == "triton" or name.startswith(("nvidia-", "cuda-")):
            continue
        assert name in pins or name in ("lightning-danube", "pip"), f"constraints.txt does not pin {name}"
        installed = distribution(name)
        if name in pins and not pins[name].specifier.contains(installed.version):
            continue  # `make test-lowest` and `make test-newest` have other versions, which require other packages
        for line in installed.requires or []:
            needed = Requirement(line)
            extras = [*requirement.extras, ""]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert len(seen) > 20


def test_every_constraint_is_one_exact_version_of_any_build() -> None:
    for name, requirement in pinned().items():
        (pin,) = requirement.specifier
        assert pin.operator == "==", f"{name} is not pinned exactly: {requirement}"
        # torch==2.13.0+cpu would exclude the CUDA build of the same version.
        assert "+" not in pin.version, f"{name} is pinned to one build: {requirement}"


def test_every_package_has_one_pin_in_constraints_or_in_the_benchmarks_peers() -> None:
    """pip refuses two versions of one package, and `make benchmark` gives it both files."""
    pins, found = pinned(), peers()
    assert {"litgpt", "litdata", "boto3"} <= found.keys()
    for name, requirement in found.items():
        if name in pins:
            assert not requirement.specifier, f"peers.txt pins {requirement}, and constraints.txt pins {pins[name]}"
        else:
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"peers.txt does not pin {requirement} exactly"


def test_the_environment_lists_what_pyproject_declares_at_the_pinned_versions() -> None:
    # The first two compile llama.cpp: no environment should take minutes, and a compiler, for what few need. Peers are
    # for one test; object storage, gigatoken and Ray are for large corpora,
    # FP8 for GPUs, and trackers for those who have one.
    large = ("s3", "s3-server", "gigatoken", "ray")
    few = ("llama-cpp", "smollm2", "peers", *large, "float8", "mlflow", "wandb", "trackers")
    pins, listed, wanted = pinned(), environment(), declared(without=few)
    assert listed.keys() >= STACK
    assert listed.keys() == wanted.keys()
    for name, requirement in listed.items():
        assert requirement.specifier == pins[name].specifier, f"environment.yml has {requirement}"
        assert requirement.extras == wanted[name].extras, f"environment.yml has {requirement}"


def test_the_environment_installs_the_project_under_the_constraints() -> None:
    assert {"-c constraints.txt", "-e ."} <= set(environment_pip_lines())


def test_the_environments_python_is_one_that_the_project_supports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dependencies = OmegaConf.load(ROOT / "environment.yml").dependencies
    (python,) = [entry.removeprefix("python=") for entry in dependencies if str(entry).startswith("python=")]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)


def test_version_and_day_are_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    released = re.search(
        r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE
    )
    citation: Any = OmegaConf.load(ROOT / "CITATION.cff")
    assert released is not None and released[1] == version
    assert (citation.version, citation["date-released"]) == (version, released[2])


def mentioned_paths(text: str) -> Iterator[str]:
    """Relative targets of links and images in Markdown or HTML, and paths into our folders, in code or prose."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    targets += re.findall(r"^\s*\[[^\]]+\]:\s*<?([^\s>]+)", text, flags=re.MULTILINE)
    targets += re.findall(r"""(?:href|src|srcset)\s*=\s*["']([^"'\s]+)""", text)
    for target in targets:
        path = unquote(target.split("#")[0])
        if path and not re.match(r"[a-z][a-z0-9+.-]*:|//", path, flags=re.IGNORECASE):
            yield path
    # Not after a slash or a letter: those are parts of addresses and of other paths.
    for path in re.findall(rf"(?<![\w./-])(?:\./)?(?:{'|'.join(FOLDERS)})/[\w./-]*", text):
        # Up to the folder where a placeholder follows, as in configs/<task>/… or notebooks/*.ipynb.
        yield path.rstrip(".")


def missing_paths(text: str) -> list[str]:
    return sorted({path for path in mentioned_paths(text) if not (ROOT / path).exists()})


def missing_targets(text: str) -> list[str]:
    """`make` targets that a text tells its reader to run and that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    asked = re.findall(r"(?:`|^\s*\$?\s*|&& )make ([a-z][\w-]*)", text, flags=re.MULTILINE)
    return sorted(target for target in set(asked) if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_what_a_document_mentions_exists(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert missing_paths(text) == []
    assert missing_targets(text) == []


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_in_the_package_exists(page: Path) -> None:
    """Dotted names of modules, classes and functions, and links between pages."""
    text = page.read_text("utf-8")
    for name in sorted(set(re.findall(r"(?<![\w./])lightning_danube(?:\.\w+)+", text))):
        pkgutil.resolve_name(name)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "text",
    [
        "see [this](nowhere.md)",
        "see [this](nowhere.md#part)",
        "![figure](docs/nowhere.png)",
        "see [this]\n\n[this]: nowhere.md",
        '<img width="400" src="nowhere.png">',
        "run it with `--config configs/nowhere.yaml`",
        "the class lives in tests/nowhere.py.",
    ],
)
def test_a_mention_of_nothing_is_found(text: str) -> None:
    (missing,) = missing_paths(text)
    assert "nowhere" in missing


def test_a_mention_of_something_passes() -> None:
    text = (
        "[a](LICENSE) [b](https://example.org/nowhere) [c](#part) `tests/conftest.py` `tests/…/nowhere` [d](./tests/)"
    )
    assert missing_paths(text) == []


# Documented although they begin with an underscore: named tuples, os._exit, and stubs for the type checker.
NOT_PRIVATE = {"_asdict", "_fields", "_make", "_replace", "_exit", "_typeshed"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NOT_PRIVATE


def private_names_of_others(trees: Collection[ast.Module]) -> set[str]:
    """Returns the private attributes and modules that some code uses and does not define."""
    used, defined = set(), set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                used |= {part for name in names for part in f"{module}.{name.name}".split(".")}
    return set(filter(is_private, used - defined))


def test_private_parts_of_other_libraries_stand_in_the_table_of_contributing() -> None:
    files = [*(ROOT / "lightning_danube").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    used = private_names_of_others([ast.parse(file.read_text("utf-8")) for file in files])
    assert {"_launcher", "_select_auto_accelerator", "_yaml_loader"} <= used
    assert sorted(used - set(re.findall(r"\w+", table_of_private_parts()))) == []


def table_of_private_parts() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Private parts of other libraries")[2]


def test_every_private_part_has_a_file_and_a_test() -> None:
    rows = re.findall(
        r"^\| [\w -]+ \| .+ \| (.+) \| `(tests/[\w/]+\.py)::(\w+)` \|$", table_of_private_parts(), re.MULTILINE
    )
    assert len(rows) > 25 and len(rows) == table_of_private_parts().count("\n|") - 2
    for files, test_file, test in rows:
        for file in re.findall(r"`([^`]+)`", files):
            assert any((folder / file).is_file() for folder in (ROOT, ROOT / "lightning_danube")), f"there is no {file}"
        assert f"\ndef {test}(" in (ROOT / test_file).read_text("utf-8"), f"{test_file} has no {test}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("trainer._launcher", {"_launcher"}),
        ("from library._inside import part", {"_inside"}),
        ("from library import _part", {"_part"}),
        ("self._mine = 1\nother._mine", set()),
        ("def _mine(): ...\nmodule._mine", set()),
        ("row._asdict()\nos._exit(1)\nobject.__dict__", set()),
    ],
)
def test_private_names_are_found(source: str, found: set[str]) -> None:
    assert private_names_of_others([ast.parse(source)]) == found


def test_a_make_target_of_nothing_is_found() -> None:
    assert missing_targets("`make nowhere`, then\n    make test\nand make peace") == ["nowhere"]


def test_the_network_is_out_of_reach() -> None:
    # 192.0.2.0/24 is set aside for documentation (RFC 5737): nothing answers there, should the fence be down.
    with socket.socket() as sock, pytest.raises(RuntimeError, match=r"tests have no network: '192\.0\.2\.1'"):
        sock.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match=r"tests have no network: 'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=1)


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"here")
        assert right.recv(4) == b"here"


def test_no_function_takes_more_than_seven_positional_arguments() -> None:
    """Long lists of options are given by name. Lightning and torch fix the arguments of the hooks and of `forward`.

    A kernel of Triton has positional arguments only.
    """
    fixed = {"forward", "write_on_batch_end", "statistics_kernel", "derivative_kernel"}
    found = []
    for file in [*(ROOT / "lightning_danube").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name not in fixed and len(node.args.args) > 8:
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} takes {len(node.args.args)}")
    assert not found, "\n".join(found)


def test_make_finds_the_files_of_each_marker() -> None:
    """A target imports only the files that name its marker, so no other module may set one."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    markers = set(re.findall(r"\$\(call (?:test_)?marked,(\w+)", makefile))
    named = {
        line.partition(":")[0]
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"][
            "markers"
        ]
    }
    assert markers == named - {"slow", "kernels"}  # those of Triton need what other tests import
    pattern = re.compile(rf"\bmark\.({'|'.join(markers)})\b")
    elsewhere = [file for file in (ROOT / "tests").rglob("*.py") if not file.name.startswith("test_")]
    assert [file.name for file in elsewhere if pattern.search(file.read_text("utf-8"))] == []


def test_make_lists_every_target_that_says_what_it_does() -> None:
    """Names may hold digits and hyphens, such as `smollm2` and `test-s3`."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    described = re.findall(r"^([^\s:#]+):.*## ", makefile, re.MULTILINE)
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^  make (\S+)", listed, re.MULTILINE) == described and {"smollm2", "test-s3"} <= {*described}
