"""The Python examples of the pages can be parsed, and import only names that exist."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from docs.making.pages import FENCE, ROOT, read

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(block[2], id=f"{Path(page).stem} {number}")
    for page in PAGES
    for number, block in enumerate((one for one in FENCE.finditer(read(page)) if one[1] == "python"), start=1)
]
OURS = ("lightning_danube", "callbacks")


def missing_names(code: str) -> list[str]:
    """Returns the modules of this project that code imports and that do not exist, and the names that they lack.

    Raises:
        SyntaxError: the code is not Python.
    """
    wanted: list[tuple[str, str | None]] = []
    aliases: dict[str, str] = {}
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted += [(alias.name, None) for alias in node.names]
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            wanted += [(node.module, alias.name) for alias in node.names]
    # danube.load, after `import lightning_danube as danube`
    wanted += [
        (aliases[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases
    ]
    found = []
    for module, name in wanted:
        if module.partition(".")[0] not in OURS:
            continue
        try:
            there = importlib.import_module(module)
        except ModuleNotFoundError:
            found.append(module)
            continue
        is_module = name is not None and hasattr(there, "__path__") and importlib.util.find_spec(f"{module}.{name}")
        if name is not None and not hasattr(there, name) and not is_module:
            found.append(f"{module}.{name}")
    return found


def test_the_pages_have_examples() -> None:
    assert len(EXAMPLES) > 4


@pytest.mark.parametrize("code", EXAMPLES)
def test_an_example_imports_names_that_exist(code: str) -> None:
    assert missing_names(code) == []


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from lightning_danube.model import DecoderConfig, TokenStream", ["lightning_danube.model.TokenStream"]),
        ("from lightning_danube.models import Decoder", ["lightning_danube.models"]),
        ("import lightning_danube.models", ["lightning_danube.models"]),
        ("import lightning_danube as danube\ndanube.load(x)\ndanube.lode(x)", ["lightning_danube.lode"]),
        ("from lightning_danube.model import decoder\nimport mine", []),
    ],
)
def test_a_name_that_does_not_exist_is_found(code: str, missing: list[str]) -> None:
    assert missing_names(code) == missing


def test_an_example_that_is_not_python_is_found() -> None:
    with pytest.raises(SyntaxError):
        missing_names("def f(:")
