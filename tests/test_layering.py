"""Who may import whom. Imports are read from the source, those inside functions too: nothing has to be importable."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_danube"


def rooms_in(contributing: str) -> dict[str, str]:
    """Returns room → its contents, from the table under "Layers" in CONTRIBUTING.md, in the table's order."""
    layers = contributing.partition("\n## Layers\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", layers, flags=re.MULTILINE))


# The table is the only list of the rooms. Each room imports only itself and rooms that stand before it.
ROOMS = rooms_in((ROOT / "CONTRIBUTING.md").read_text("utf-8"))
ORDER = tuple(ROOMS)
# Rooms of single files that every other room may use.
GENERAL = ORDER[ORDER.index("outside") + 1 : ORDER.index("model")]
TASKS = tuple(room for room, contents in ROOMS.items() if contents.startswith("task: "))
TASK_CLASSES = {"LightningModule", "DecoderTask", "TuningTask"}
MOST_MODULES_IN_ROOT, MOST_MODULES_IN_A_FOLDER = 10, 14
MODEL_MAY_IMPORT = frozenset({"torch", "triton", f"{PACKAGE}.model", f"{PACKAGE}.device", f"{PACKAGE}.lazy_attributes"})
# A task's data module takes at most a tokenizer from the weights.
DATA_MAY_IMPORT_OF_WEIGHTS = frozenset({f"{PACKAGE}.weights.tokenizers"})
# Kept apart from the rules: these folders may be absent.
OTHERS = ("benchmarks", "notebooks")
# Libraries that one place of the package deals with, for all others. Most come with an extra (tests/test_extras.py).
IN_ONE_FILE: dict[str, str | tuple[str, ...]] = {
    "bitsandbytes": "lightning_danube/weights/quantized_linear.py",
    "datatrove": "lightning_danube/tokens/engines/datatrove_engine.py",
    "gigatoken": "lightning_danube/tokens/encoding.py",
    "hqq": "lightning_danube/quantization/grouped.py",
    "llama_cpp": "lightning_danube/weights/llama_cpp.py",
    "lm_eval": "lightning_danube/evaluation/harness.py",
    "matplotlib": (
        "lightning_danube/reports/",
        "lightning_danube/quantization/summary.py",
        "lightning_danube/classification/summary.py",
        "lightning_danube/evaluation/report.py",
    ),
    "optuna": "lightning_danube/studies/",
    "pandas": "lightning_danube/reports/",
    "peft": "lightning_danube/weights/adapters.py",
    "ray": "lightning_danube/tokens/engines/datatrove_engine.py",
    "rensa": "lightning_danube/text/quality.py",
    "sqlalchemy": "lightning_danube/studies/",
    "statsmodels": "lightning_danube/studies/",
    "torchao": "lightning_danube/pretraining/float8.py",
    "triton": "lightning_danube/model/fused_softmax.py",
}
TYPE_VARIABLES = ("TypeVar", "ParamSpec", "typing.TypeVar", "typing.ParamSpec")
# Every verb has the first two, every program the third.
NAMES_OF_ENTRIES = frozenset({"add_arguments", "run", "main"})
NAMES_THAT_SAY_NOTHING = frozenset({"utils", "util", "common", "helpers", "helper", "misc"})


def imported_names(path: PurePosixPath, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                package = list(path.parent.parts)
                package = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*package, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def is_within(name: str, modules: frozenset[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def violations(path: PurePosixPath, source: str) -> list[str]:
    """The layering rules that a file at `path`, relative to the repository, breaks."""
    found = []
    for line, name in imported_names(path, ast.parse(source, filename=str(path))):
        broken = broken_rule(path, name)
        if broken:
            found.append(f"{path}:{line}: imports {name}: {broken}")
    return found


def room_of_file(path: PurePosixPath) -> str | None:
    """The room that a file of the package lies in; None for `lightning_danube/__init__.py` and files elsewhere."""
    parts = path.with_suffix("").parts
    if parts[0] == "callbacks":
        return "callbacks"
    return parts[1] if parts[0] == PACKAGE and parts[1] != "__init__" else None


def broken_rule(path: PurePosixPath, name: str) -> str | None:
    room = room_of_file(path)
    if is_within(name, frozenset({"callbacks"})):
        return "the folder callbacks is imported as lightning_danube.callbacks, the name that a wheel has, too"
    only = IN_ONE_FILE.get(name.split(".")[0])
    if only is not None and path.parts[0] in (PACKAGE, "callbacks") and not str(path).startswith(only):
        return f"only {only} imports {name.split('.')[0]}"
    if room == "model":
        if name.split(".")[0] not in sys.stdlib_module_names and not is_within(name, MODEL_MAY_IMPORT):
            return f"the model imports the standard library and {', '.join(sorted(MODEL_MAY_IMPORT))} only"
    elif room == "device" and not is_within(name, frozenset({"torch", *sys.stdlib_module_names})):
        return "what the machine can do is asked with the standard library and torch only"
    if not name.startswith(f"{PACKAGE}."):
        return None
    other = name.split(".")[1]
    if room is None:
        if path.parts[0] in (PACKAGE, "tests") or other not in ("cli", "reports"):
            return None
        if other == "reports" and path.parts[0] == "notebooks":
            return None
        return f"only tests import {other}"
    if other not in ORDER or other == room:
        return None
    if ORDER.index(other) > ORDER.index(room):
        return f"{other} stands after {room} in the order of rooms"
    if other in TASKS and room in TASKS:
        return "no task's room imports that of another"
    of_data_module = room in TASKS and path.name.endswith("data.py")
    if of_data_module and other == "weights" and not is_within(name, DATA_MAY_IMPORT_OF_WEIGHTS):
        return "a data module takes at most a tokenizer from the weights"
    if other == "callbacks" and room != "__main__":
        return "no room imports callbacks: YAML names them"
    if other == "reports" and room not in ("cli", "__main__"):
        return "only the verb report and notebooks import reports"
    return None


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def of_package() -> list[Path]:
    return [*python_files(PACKAGE), *python_files("callbacks")]


@pytest.mark.parametrize("room", ORDER)
def test_every_room_of_the_order_is_there(room: str) -> None:
    place = ROOT / ("" if room == "callbacks" else PACKAGE) / room
    assert place.with_suffix(".py").is_file() or list(place.glob("*.py")), (
        f"no {room}: the rules about it check nothing"
    )


def test_every_room_stands_in_the_order() -> None:
    there = {room_of_file(PurePosixPath(file.relative_to(ROOT).as_posix())) for file in of_package()} - {None}
    assert there == set(ORDER)


def test_the_rooms_are_read_from_the_table_of_layers() -> None:
    table = "## Layers\n\n| room | contents |\n|---|---|\n| `files` | the writer |\n| `chat` | task: rows |\n\n"
    assert rooms_in(f"# A\n| `no` | room |\n{table}## B\n| `no` | room |\n") == {
        "files": "the writer",
        "chat": "task: rows",
    }


def has_task(source: str) -> bool:
    """Returns whether a module has a class that Lightning trains or evaluates."""
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return any(isinstance(base, ast.Name) and base.id in TASK_CLASSES for one in classes for base in one.bases)


def test_rooms_with_a_task_and_no_others_are_tasks_rooms() -> None:
    rooms = {
        room_of_file(PurePosixPath(file.relative_to(ROOT).as_posix()))
        for file in of_package()
        if has_task(file.read_text("utf-8"))
    }
    # `training` has the base classes.
    assert rooms - {"training"} == set(TASKS)


def test_every_import_keeps_to_the_layers() -> None:
    files = [file for folder in (PACKAGE, "callbacks", *OTHERS) for file in python_files(folder)]
    assert files, "no Python file found: the rules check nothing"
    found = [
        violation
        for file in files
        for violation in violations(PurePosixPath(file.relative_to(ROOT).as_posix()), file.read_text("utf-8"))
    ]
    assert not found, "\n".join(found)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


class WithoutTypes(ast.NodeTransformer):
    """Drops imports that are there for the type checker alone."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if is_type_checking(node) else self.generic_visit(node)


def test_no_module_imports_itself_by_way_of_others() -> None:
    sources = {file: WithoutTypes().visit(ast.parse(file.read_text("utf-8"))) for file in of_package()}
    names = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sources}
    modules = {name.removesuffix(".__init__"): file for file, name in names.items()}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        if file.name == "__init__.py":
            continue  # it only names what the others hold
        path = PurePosixPath(file.relative_to(ROOT).as_posix())
        imported = {name for _, name in imported_names(path, sources[file])}
        graph[module] = {
            other for name in imported for other in (name, name.rpartition(".")[0]) if other in modules
        } - {module}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_folders_are_small_enough_to_read() -> None:
    modules: dict[Path, list[str]] = {}
    for file in of_package():
        modules.setdefault(file.parent, []).append(file.name)
    assert {ROOT / PACKAGE, ROOT / "callbacks"} < modules.keys(), "folders are missing: the rule checks too little"
    for folder, names in modules.items():
        most = MOST_MODULES_IN_ROOT if folder == ROOT / PACKAGE else MOST_MODULES_IN_A_FOLDER
        assert len(names) <= most, f"{folder.relative_to(ROOT)} holds {len(names)} modules: {names}"


def test_every_file_is_named_after_what_lives_in_it() -> None:
    files = [file for folder in (PACKAGE, "callbacks", "tests", *OTHERS) for file in python_files(folder)]
    assert files, "no Python file found: the rule checks nothing"
    found = [
        str(file.relative_to(ROOT))
        for file in files
        if NAMES_THAT_SAY_NOTHING.intersection(file.relative_to(ROOT).with_suffix("").parts)
    ]
    assert not found, f"named after nothing: {', '.join(found)}"


def public_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of the public classes, functions, type variables and type aliases of a module."""
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                # Type variables and aliases are written like classes; constants are not.
                is_type_variable = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in TYPE_VARIABLES
                if is_type_variable or (name[0].isupper() and not name.isupper()):
                    yield node.lineno, name


def names_given_twice(sources: dict[str, str]) -> dict[str, list[str]]:
    """Public name → where it is given, if that is in more than one module."""
    places: dict[str, list[str]] = {}
    for path, source in sources.items():
        for line, name in public_names(ast.parse(source)):
            if not name.startswith("_") and name not in NAMES_OF_ENTRIES:
                places.setdefault(name, []).append(f"{path}:{line}")
    return {name: found for name, found in places.items() if len(found) > 1}


def test_a_public_name_is_given_once() -> None:
    found = names_given_twice({str(file.relative_to(ROOT)): file.read_text("utf-8") for file in of_package()})
    assert not found, "\n".join(f"{name}: {', '.join(places)}" for name, places in found.items())


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("class Block: ...", "class Block: ...", "Block"),
        ("def show(): ...", "async def show(): ...", "show"),
        ("class Part: ...", "Part = tuple[int, int]", "Part"),
        ("P = ParamSpec('P')", "P = typing.ParamSpec('P')", "P"),
    ],
)
def test_a_name_that_is_given_twice_is_found(first: str, second: str, name: str) -> None:
    assert names_given_twice({"a.py": first, "b.py": second}) == {name: ["a.py:1", "b.py:1"]}


@pytest.mark.parametrize(
    "source", ["def run(): ...", "def _show(): ...", "MOST = 3", "class _A:\n    def show(self): ..."]
)
def test_names_that_may_be_given_twice(source: str) -> None:
    assert names_given_twice({"a.py": source, "b.py": source}) == {}


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        ("lightning_danube/model/decoder.py", "import lightning", "standard library and"),
        ("lightning_danube/model/decoder.py", "import numpy as np", "standard library and"),
        (
            "lightning_danube/model/decoder.py",
            "def f():\n    from transformers import AutoModel",
            "standard library and",
        ),
        ("lightning_danube/model/decoder.py", "from ..training.optim import schedule", "standard library and"),
        ("lightning_danube/model/deep/er.py", "from ... import text", "standard library and"),
        ("lightning_danube/model/decoder.py", "from ..weights.gguf.header import GGUFHeader", "standard library and"),
        ("lightning_danube/device.py", "import numpy", "what the machine can do"),
        ("lightning_danube/device.py", "from .model import Decoder", "what the machine can do"),
        ("lightning_danube/text/corpora.py", "from lightning_danube.tokens.shards import TokenShards", "stands after"),
        ("lightning_danube/tokens/shards.py", "from lightning_danube import weights", "stands after"),
        (
            "lightning_danube/tokens/shards.py",
            "import importlib\nimportlib.import_module('lightning_danube.chat')",
            "after",
        ),
        (
            "lightning_danube/tokens/shards.py",
            "if TYPE_CHECKING:\n    import lightning_danube.chat.data",
            "stands after",
        ),
        ("lightning_danube/training/optim/muon.py", "from lightning_danube.pretraining import Pretraining", "after"),
        ("lightning_danube/chat/fine_tuning.py", "from ..pretraining.task import Pretraining", "no task's room"),
        ("lightning_danube/evaluation/task.py", "from lightning_danube import chat", "no task's room"),
        (
            "lightning_danube/chat/data.py",
            "from lightning_danube.weights.loading import load_model",
            "at most a tokenizer",
        ),
        (
            "lightning_danube/chat/fine_tuning.py",
            "from peft import LoraConfig",
            "only lightning_danube/weights/adapters",
        ),
        ("lightning_danube/weights/loading.py", "import llama_cpp", "only lightning_danube/weights/llama_cpp.py"),
        (
            "lightning_danube/chat/fine_tuning.py",
            "from matplotlib.figure import Figure",
            "lightning_danube/evaluation/report.py",
        ),
        ("lightning_danube/chat/data.py", "from ..callbacks.curriculum import CurriculumStages", "stands after"),
        ("lightning_danube/cli/configs.py", "from ..callbacks.curriculum import CurriculumStages", "no room imports"),
        ("lightning_danube/chat/data.py", "from lightning_danube.cli.trainer_verbs import main", "stands after"),
        ("callbacks/samples.py", "from lightning_danube.cli.trainer_verbs import main", "stands after"),
        ("callbacks/samples.py", "from callbacks.progress import say", "imported as lightning_danube.callbacks"),
        ("callbacks/samples.py", "from lightning_danube.reports import runs", "only the verb report"),
        ("tests/cli/test_trainer_verbs.py", "import callbacks", "imported as lightning_danube.callbacks"),
        ("benchmarks/loader.py", "from lightning_danube.cli import configs", "only tests import"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, rule: str) -> None:
    (found,) = violations(PurePosixPath(path), source)
    assert rule in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "lightning_danube/model/decoder.py",
            "import math, torch\nfrom torch import nn\nfrom .config import DecoderConfig",
        ),
        ("lightning_danube/model/attention.py", "from ..device import onednn_packs"),
        ("lightning_danube/device.py", "import os\nimport torch"),
        ("lightning_danube/weights/gguf/tokenizer.py", "from lightning_danube.tokens.tokenizer import begin_token"),
        ("lightning_danube/chat/data.py", "from lightning_danube.weights.tokenizers import tokenizer_of"),
        ("lightning_danube/chat/fine_tuning.py", "import lightning\nfrom lightning_danube import model, training"),
        ("lightning_danube/training/optim/muon.py", "from lightning_danube.model.decoder import Block"),
        ("lightning_danube/weights/adapters.py", "import peft"),
        ("benchmarks/speed.py", "import llama_cpp"),
        ("lightning_danube/cli/configs.py", "from ..pretraining import CurriculumData\nfrom ..chat import ChatData"),
        ("lightning_danube/__main__.py", "from lightning_danube.cli.trainer_verbs import main"),
        ("lightning_danube/__init__.py", "from lightning_danube.cli.trainer_verbs import main"),
        ("tests/cli/test_trainer_verbs.py", "from lightning_danube.cli.trainer_verbs import main"),
        ("notebooks/execute.py", "from lightning_danube.reports import runs"),
        ("lightning_danube/reports/figures.py", "import matplotlib\nfrom lightning_danube.reports import runs"),
        ("callbacks/samples.py", "import lightning\nfrom lightning_danube.generation import generate"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(PurePosixPath(path), source) == []
