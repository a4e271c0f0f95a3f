"""The corpus made of installed documentation, from tiny trees that stand for an environment."""

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.data import docstrings, documentation, made_text
from lightning_danube.data.docstrings import Environment, Seen
from lightning_danube.data.documentation import ROLES
from lightning_danube.data.made_text import Fact

SHARED = """Balance a tree whose leaves carry weights.

The heaviest leaf moves towards the root until no exchange shortens the sum of weighted depths.
"""
TOPICS = {
    "with": 'The "with" statement\n********************\n\nIt wraps a block in the methods of a context manager.\n' * 2,
    "assert": 'The "assert" statement\n**********************\n\nIt inserts debugging assertions.',
}


def module_source(name: str) -> str:
    return f'''"""Tools that {name} things in many ways.

A second sentence about {name} makes this docstring long enough to become a document of its own.
"""

def {name}_all(things, *rest: int, how: str = "fast", **options) -> list:
    """Return all things after they were subjected to {name}.

    The order of the things is kept, and a thing that cannot be subjected to {name} raises an error of its own.
    """

def {name}_one(thing):
    """Compute what {name} makes of one thing."""

class {name.title()}er(Base):
    """An object that can {name} whatever it is given.

    It holds state between its calls; make a new one when the state of {name} must not be shared with others.
    """

    def __init__(self, strength=1.5): pass

    def start(self):
        """Begin to {name}, unless it has been started."""

    def stop(self, force=False):
        """Stop what {name} had begun.

        Whatever was put aside while it ran is returned to those who gave it to {name} in the first place.
        """
'''


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return make_environment(tmp_path / "environment")


def make_environment(root: Path, order: Callable[[list[str]], list[str]] = sorted) -> Environment:
    site, stdlib = root / "site-packages", root / "stdlib"
    for name in order(["bend", "fold", "press", "twist", "turn", "weave"]):
        write(site / "alpha" / f"{name}.py", module_source(name))
        write(site / "numpy" / f"{name}ing.py", module_source(f"re{name}"))
        write(stdlib / f"{name}lib.py", module_source(f"un{name}"))
    write(site / "alpha" / "__init__.py", "")
    readme = (
        "# Alpha\n\nAlpha bends, folds and twists whatever is given to it, and is\nas fast as paper allows it to be.\n"
    )
    write(site / "alpha-1.0.dist-info" / "METADATA", f"Metadata-Version: 2.1\nName: alpha\nVersion: 1.0\n\n{readme}")
    write(stdlib / "pydoc_data" / "topics.py", f"topics = {TOPICS!r}\n")
    return Environment((site,), stdlib)


def collect(environment: Environment, cache_dir: Path, processes: int = 1) -> dict[str, Path]:
    return documentation._collect(environment, cache_dir, processes=processes, progress=False)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def texts_of(files: dict[str, Path]) -> dict[str, str]:
    return {role: "\n\n".join(row["text"] for row in rows_of(file)) for role, file in files.items()}


def manifest_of(files: dict[str, Path]) -> dict[str, Any]:
    return json.loads((files["web"].parent / "manifest.json").read_text("utf-8"))


def test_every_role_gets_what_the_docstring_promises(environment: Environment, tmp_path: Path) -> None:
    files = collect(environment, tmp_path / "cache")
    assert tuple(files) == ROLES
    rows = {role: rows_of(file) for role, file in files.items()}
    origins = {role: {row["origin"] for row in rows[role]} for role in ROLES}
    assert all(set(row) == {"text", "origin"} for role in ROLES for row in rows[role])
    assert {"alpha:README", "alpha:alpha.bend", "alpha:alpha.bend.Bender"} <= origins["web"]
    assert {"python:foldlib", "python:pydoc_data.topics.with"} <= origins["wiki"]
    assert {"numpy:numpy.weaveing", "numpy:numpy.weaveing.Reweaveer"} <= origins["academic"]
    texts = texts_of(files)
    assert all(line.startswith(("Question: ", "Answer: ")) for line in texts["instruct"].split("\n") if line)
    for role, counts in manifest_of(files)["sources"].items():
        assert counts["documents"] == len(rows[role])
        assert counts["characters"] == sum(len(row["text"]) for row in rows[role])


def test_a_class_is_one_document_with_its_methods_under_their_signatures(
    environment: Environment, tmp_path: Path
) -> None:
    rows = {row["origin"]: row["text"] for row in rows_of(collect(environment, tmp_path)["web"])}
    assert rows["alpha:alpha.fold.Folder"] == (
        "Class alpha.fold.Folder(strength=1.5)\n\n"
        "An object that can fold whatever it is given.\n\n"
        "It holds state between its calls; make a new one when the state of fold must not be shared with others.\n\n"
        "Folder.stop(force=False)\n\n"
        "Stop what fold had begun.\n\n"
        "Whatever was put aside while it ran is returned to those who gave it to fold in the first place."
    )
    assert "fold_all(things, *rest, how='fast', **options)\n\nReturn all" in rows["alpha:alpha.fold"]


def test_no_docstring_stands_in_full_in_two_sources(environment: Environment, tmp_path: Path) -> None:
    files = collect(environment, tmp_path / "cache")
    texts = texts_of(files)
    all_docs = [
        docstrings.clean(doc)
        for source in environment.sources()
        for node in ast.walk(ast.parse(Path(source.path).read_bytes()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node))
    ]
    assert len(all_docs) > 50
    made = texts["synthetic"] + texts["instruct"]
    for doc in all_docs:
        found = sum(text.count(doc) for text in texts.values())
        is_one_sentence = "\n" not in doc
        assert found <= 1
        assert found == 1 or is_one_sentence
        if is_one_sentence:
            assert not any(doc in texts[role] for role in ("web", "wiki", "academic"))
    for name in ("bend", "fold", "press", "twist", "turn", "weave"):
        assert f"computes what {name} makes of one thing" in made


def test_the_bytes_do_not_depend_on_processes_place_or_order_of_files(tmp_path: Path) -> None:
    one = collect(make_environment(tmp_path / "a"), tmp_path / "one", processes=1)
    # Enough files for more than one chunk, so that two processes really share the work.
    other = make_environment(tmp_path / "elsewhere" / "b", order=lambda names: sorted(names, reverse=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documentation, "_FILES_PER_CHUNK", 3)
        two = collect(other, tmp_path / "two", processes=2)
    for role in ROLES:
        assert one[role].read_bytes() == two[role].read_bytes()
    assert manifest_of(one) == manifest_of(two)


def test_what_is_repeated_stays_where_it_comes_first(environment: Environment, tmp_path: Path) -> None:
    copy = f'def balance(tree):\n    """{SHARED}"""\n'
    near = copy.replace("Balance a tree", "Balance the tree")
    site = environment.packages[0]
    assert environment.stdlib is not None
    write(environment.stdlib / "balancing.py", copy)
    write(site / "numpy" / "copied.py", copy)
    write(site / "alpha" / "copied.py", near)
    files = collect(environment, tmp_path / "cache")
    marker = "The heaviest leaf moves towards the root"
    counts = {role: text.count(marker) for role, text in texts_of(files).items()}
    assert counts == {"web": 0, "wiki": 1, "academic": 0, "synthetic": 0, "instruct": 0}
    assert manifest_of(files)["repetitions_dropped"] == {"exact": 1, "near": 1}


def test_seen_compares_long_lines_only() -> None:
    seen = Seen()
    assert not seen.repeats("A line which is long enough to count.\nshort line")
    assert not seen.repeats("Another line, also long enough to count.\nshort line")
    assert seen.repeats("A line which is long enough to count.\nanother short one")
    assert (seen.exact, seen.near) == (0, 1)
    assert seen.repeats("Another line,  also long enough to count.\n\nshort line")
    assert (seen.exact, seen.near) == (1, 1)


def test_unreadable_files_are_skipped_and_counted(environment: Environment, tmp_path: Path) -> None:
    bad = environment.packages[0] / "alpha" / "bad"
    text = '"""A docstring of a file that cannot be read to its end, however long it is made to be."""\n'
    write(bad / "syntax.py", text + "def (:\n")
    write(bad / "null.py", text.encode() + b"\x00")
    write(bad / "latin.py", text.replace("docstring", "d\u00f6cstring").encode("latin-1"))
    write(bad / "large.py", text + "#" * docstrings.LARGEST_FILE)
    write(bad / "plain.py", "x = 1\n")
    os.symlink(bad / "nowhere.py", bad / "dangling.py")
    files = collect(environment, tmp_path / "cache")
    skipped = manifest_of(files)["files"]["skipped"]
    # alpha/__init__.py is the second without a docstring.
    expected = {"larger than 2 MB": 1, "no docstring": 2, "not UTF-8": 1, "not parsable": 2, "unreadable": 1}
    assert skipped == expected
    assert "cannot be read to its end" not in "".join(texts_of(files).values())


@pytest.mark.parametrize(
    "file",
    [
        "alpha/tests/cases.py",
        "alpha/test_bend.py",
        "alpha/conftest.py",
        "alpha/_vendor/six.py",
        "alpha/.venv/lib/python3.11/site-packages/beta/it.py",
        "alpha-1.0.data/purelib/it.py",
        "lightning_danube/model.py",
        "callbacks/samples.py",
    ],
)
def test_tests_vendored_copies_and_ourselves_are_left_out(environment: Environment, file: str) -> None:
    before = environment.sources()
    write(environment.packages[0] / file, module_source("smuggle"))
    assert environment.sources() == before


def test_our_own_readme_is_left_out(environment: Environment) -> None:
    before = environment.fingerprint()
    write(
        environment.packages[0] / "lightning_danube-0.1.0.dist-info" / "METADATA",
        "Name: lightning-danube\nVersion: 0.1.0\n\nOurs.",
    )
    assert [distribution.name for distribution in environment.distributions()] == ["alpha"]
    assert environment.fingerprint() == before


def test_an_environment_is_collected_once(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = documentation._collect(environment, tmp_path / "cache", processes=1, progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    start, end = told.err.splitlines()
    assert start.startswith("Collecting the documentation")
    assert f"wiki {len(rows_of(first['wiki'])):,}" in end

    def refuse(*_: Any) -> Any:
        raise AssertionError("a cache hit reads no source")

    monkeypatch.setattr(documentation, "read_sources", refuse)
    monkeypatch.setattr(documentation, "assemble", refuse)
    assert documentation._collect(environment, tmp_path / "cache", processes=1, progress=True) == first
    assert capsys.readouterr() == ("", "")


def test_another_version_or_format_is_another_environment(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = {environment.fingerprint()}
    metadata = environment.packages[0] / "alpha-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    prints.add(environment.fingerprint())
    monkeypatch.setattr(docstrings, "FORMAT", docstrings.FORMAT + 1)
    prints.add(environment.fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("killer", ["json.dumps", "os.replace"])
def test_a_killed_collection_leaves_nothing(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killer: str
) -> None:
    calls = 0

    def die(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 10 or killer == "os.replace":
            raise KeyboardInterrupt
        return "{}"

    with monkeypatch.context() as patch:
        patch.setattr(f"lightning_danube.data.documentation.{killer}", die)
        with pytest.raises(KeyboardInterrupt):
            collect(environment, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert all(rows_of(file) for file in collect(environment, tmp_path / "cache").values())


def test_the_slower_of_two_keeps_what_the_faster_wrote(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def race(partial: Path, folder: Path) -> None:
        shutil.copytree(partial, folder)
        replace(partial, folder)

    monkeypatch.setattr("lightning_danube.data.documentation.os.replace", race)
    files = collect(environment, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [files["web"].parent]
    assert all(rows_of(file) for file in files.values())


def test_a_removed_part_is_collected_again(environment: Environment, tmp_path: Path) -> None:
    files = collect(environment, tmp_path / "cache")
    expected = files["wiki"].read_bytes()
    files["wiki"].unlink()
    assert collect(environment, tmp_path / "cache")["wiki"].read_bytes() == expected


def test_an_environment_without_sources_is_the_users_to_mend(tmp_path: Path) -> None:
    nothing = Environment((tmp_path / "site-packages",), tmp_path / "stdlib")
    with pytest.raises(ValueError, match=r"no documentation was found for the source 'web'.*install the dependencies"):
        collect(nothing, tmp_path / "cache")
    with pytest.raises(ValueError, match="processes is 0: give at least 1"):
        collect(nothing, tmp_path / "cache", processes=0)


def test_documentation_of_functions_in_c_is_found(tmp_path: Path) -> None:
    source = '''
add_docstr(torch.hypot, r"""
hypot(input, other) -> Tensor

Given the legs of a right triangle, return its hypotenuse.

Args:
    {input}

The shapes of both must be {{broadcastable}}, which is described elsewhere at greater length.
""".format(**common_args))
cross = _add_docstr(_linalg.linalg_cross, "Computes the cross product of two vectors of three elements.")
add_newdoc("numpy._core", "ndarray", ("T", """View of the transposed array."""))
'''
    write(tmp_path / "c.py", source)
    module = docstrings.read_source(docstrings.Source(str(tmp_path / "c.py"), "torch", "torch._torch_docs"))
    assert isinstance(module, docstrings.Module)
    hypot, cross, transposed = module.entries
    assert (hypot.name, cross.name, transposed.name) == ("torch.hypot", "cross", "ndarray.T")
    assert hypot.sentence == "Given the legs of a right triangle, return its hypotenuse."
    assert "{broadcastable}" in hypot.doc
    assert "{input}" not in hypot.doc
    assert Fact(hypot, module.name, module.package, hypot.sentence).full == "torch.hypot"


@pytest.mark.parametrize(
    ("module", "package", "role"),
    [
        ("torch.nn.functional", "torch", "academic"),
        ("torch.nn.functional_extra", "torch", "web"),
        ("torch.utils.data", "torch", "web"),
        ("numpy", "numpy", "academic"),
        ("statistics", docstrings.STANDARD_LIBRARY, "wiki"),
    ],
)
def test_roles_go_by_whole_names(module: str, package: str, role: str) -> None:
    assert docstrings.role_of(docstrings.Module(package, module, ())) == role


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return the mean of the given values.", True),
        ("0.1 0.2 0.3 0.4\n0.5 0.6 0.7 0.8 mean", False),
        ("A picture: " + "iVBORw0KGgoAAAANSUhEUgAAAAUA" * 10, False),
        ("Возвращает среднее значение", False),
        ("The end of a text is marked by </s> in this vocabulary.", False),
        ("Wrap the question as <|prompt|> says, then answer it.", False),
    ],
)
def test_prose_is_mostly_words(text: str, expected: bool) -> None:
    assert docstrings.is_prose(text) is expected


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Remove common whitespace\nfrom every line. Tabs count.", "Remove common whitespace from every line."),
        (
            "f(x, *, out=None) -> Tensor\n\nReturn the sine of :attr:`x`, e.g. an\nangle.",
            "Return the sine of `x`, e.g. an angle.",
        ),
        ("Like :class:`~torch.nn.Linear`, but quantised in steps.", None),
        ("Compute the `Fleiss kappa`_ of several raters [1]_.", "Compute the Fleiss kappa of several raters."),
        ("Apply the [`~Trainer.step`] to each ``batch`` given", "Apply the `Trainer.step` to each `batch` given."),
        ("The spherical harmonics are defined as\n\n.. math:: Y_n^m", None),
        (
            "Title of it\n===========\n\nSort the keys in place by their value.",
            "Sort the keys in place by their value.",
        ),
        (">>> print(1 + 1)\n2", None),
        ("Too short.", None),
    ],
)
def test_first_sentences_can_stand_alone(doc: str, sentence: str | None) -> None:
    assert docstrings.first_sentence(doc) == sentence


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Return the mean.", "returns the mean"),
        ("Computes the mean.", "computes the mean"),
        ("Apply it, then push.", "applies it, then push"),
        ("Display the tree.", "displays the tree"),
        ("The mean of values.", None),
        ("Is it a mean?", None),
    ],
)
def test_imperatives_become_predicates(sentence: str, expected: str | None) -> None:
    assert docstrings.predicate(sentence) == expected


def test_a_readme_ends_at_its_change_log_and_has_no_badges() -> None:
    readme = (
        "# Alpha\n\n[![build](https://ci/badge.svg)](https://ci)\n<p align='center'><b>Alpha</b> folds paper.</p>\n\n"
        "Change this freely.\n\n## Changelog\n\n- 1.0: it folds.\n"
    )
    assert docstrings.clean_readme(readme) == "# Alpha\n\nAlpha folds paper.\n\nChange this freely."


def test_long_texts_are_cut_before_headings_only() -> None:
    part = "word " * 500
    text = f"First\n=====\n\n{part}\n\nSecond\n======\n\n{part}\n\n## Third\n\n```\n# no heading\n{part}\n```\n"
    parts = docstrings.split_at_headings(text)
    assert [part.split("\n")[0] for part in parts] == ["First", "Second", "## Third"]
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_variants_are_decided_by_the_key_alone() -> None:
    variants = "a {x}\nb {x}\nc {x}"
    said = {made_text.say(variants, str(key), x="y") for key in range(50)}
    assert said == {"a y", "b y", "c y"}
    assert made_text.say(variants, "key", x="1")[0] == made_text.say(variants, "key", x="2")[0]


def test_this_interpreter_has_the_packages_that_the_sources_name() -> None:
    environment = Environment.running()
    modules = {source.module for source in environment.sources()}
    optional = ("scipy", "sklearn", "statsmodels")
    missing = [name for name in docstrings.ACADEMIC if name not in (*modules, *optional)]
    assert not missing, f"named in ACADEMIC but not installed: {missing}"
    assert {"textwrap", "pydoc_data.topics", "transformers.trainer"} <= modules
    assert not {name for name in modules if ".tests." in name or "._vendor." in name}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measured on Linux")
def test_this_interpreter_has_enough_to_train_on(tmp_path: Path) -> None:
    files = documentation.collect_documentation(tmp_path, progress=False)
    characters = {role: counts["characters"] for role, counts in manifest_of(files)["sources"].items()}
    # Mistral's tokenizer makes a token of about 3 to 3.6 characters here: 250,000 tokens of each, two million of web.
    assert characters["web"] > 7_000_000
    assert min(characters.values()) > 900_000
