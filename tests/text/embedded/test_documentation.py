"""The corpus made of installed documentation, from tiny trees that stand for an environment."""

import ast
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lightning_danube.cli.configs import resolved_config
from lightning_danube.files import locked
from lightning_danube.studies.facts import facts_of
from lightning_danube.text.embedded import docstrings, documentation, made_text, prose
from lightning_danube.text.embedded.docstrings import Environment, Seen
from lightning_danube.text.embedded.documentation import ROLES
from lightning_danube.text.embedded.made_text import Fact

SHARED = """Balance a tree whose leaves carry weights.

The heaviest leaf moves towards the root until no exchange shortens the sum of weighted depths.
"""
TOPICS = {
    "with": 'The "with" statement\n********************\n\nIt wraps a block in the methods of a context manager.\n',
    "assert": 'The "assert" statement\n**********************\n\nIt inserts debugging assertions into a program.',
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


def install(site: Path, name: str, readme: str = "", version: str = "1.0") -> None:
    """Writes the metadata of a distribution."""
    file = site / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    write(file, f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\n{readme}")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return make_environment(tmp_path / "environment")


def make_environment(root: Path, order: Callable[[list[str]], list[str]] = sorted) -> Environment:
    site, stdlib = root / "site-packages", root / "stdlib"
    for name in order(["bend", "fold", "press", "twist", "turn", "weave"]):
        write(site / "rich" / f"{name}.py", module_source(name))
        write(site / "numpy" / f"{name}ing.py", module_source(f"re{name}"))
        write(stdlib / f"{name}lib.py", module_source(f"un{name}"))
    write(site / "rich" / "__init__.py", "")
    readme = (
        "# Rich\n\nRich bends, folds and twists whatever is given to it, and is\nas fast as paper allows it to be.\n"
    )
    install(site, "rich", readme)
    install(site, "numpy")
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
    assert {"rich:README", "rich:rich.bend", "rich:rich.bend.Bender"} <= origins["web"]
    assert {"python:foldlib", "python:pydoc_data.topics.with"} <= origins["wiki"]
    assert {"numpy:numpy.weaveing", "numpy:numpy.weaveing.Reweaveer"} <= origins["academic"]
    texts = texts_of(files)
    assert all(line.startswith(("Question: ", "Answer: ")) for line in texts["instruct"].split("\n") if line)
    for role, counts in manifest_of(files)["sources"].items():
        assert counts["documents"] == len(rows[role])
        assert counts["characters"] == sum(len(row["text"]) for row in rows[role])


def test_a_class_is_one_document_with_its_methods_under_their_names(environment: Environment, tmp_path: Path) -> None:
    rows = {row["origin"]: row["text"] for row in rows_of(collect(environment, tmp_path)["web"])}
    assert rows["rich:rich.fold.Folder"] == (
        "The class Folder of rich.fold\n\n"
        "An object that can fold whatever it is given.\n\n"
        "It holds state between its calls; make a new one when the state of fold must not be shared with others.\n\n"
        "The method stop\n\n"
        "Stop what fold had begun.\n\n"
        "Whatever was put aside while it ran is returned to those who gave it to fold in the first place."
    )
    assert "The function fold_all\n\nReturn all things after" in rows["rich:rich.fold"]


def test_no_docstring_stands_in_full_in_two_sources(environment: Environment, tmp_path: Path) -> None:
    files = collect(environment, tmp_path / "cache")
    texts = texts_of(files)
    all_docs = [
        prose.prose(prose.clean(doc))
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
    write(site / "rich" / "copied.py", near)
    files = collect(environment, tmp_path / "cache")
    marker = "The heaviest leaf moves towards the root"
    counts = {role: text.count(marker) for role, text in texts_of(files).items()}
    assert counts == {"web": 0, "wiki": 1, "academic": 0, "synthetic": 0, "instruct": 0}
    assert manifest_of(files)["repetitions_dropped"] == {"exact": 1, "near": 1}


def test_seen_compares_long_sentences_only() -> None:
    seen = Seen()
    assert not seen.repeats("A sentence which is long enough to count. It is short.")
    assert not seen.repeats("Another sentence, also long enough to count. It is short.")
    assert seen.repeats("A sentence which is long enough to count. It is also short.")
    assert (seen.exact, seen.near) == (0, 1)
    assert seen.repeats("Another sentence, also long enough to count. It is short.")
    assert (seen.exact, seen.near) == (1, 1)


def test_unreadable_files_are_skipped_and_counted(environment: Environment, tmp_path: Path) -> None:
    bad = environment.packages[0] / "rich" / "bad"
    text = '"""A docstring of a file that cannot be read to its end, however long it is made to be."""\n'
    write(bad / "syntax.py", text + "def (:\n")
    write(bad / "null.py", text.encode() + b"\x00")
    write(bad / "latin.py", text.replace("docstring", "d\u00f6cstring").encode("latin-1"))
    write(bad / "large.py", text + "#" * docstrings.LARGEST_FILE)
    write(bad / "code.py", text + "x = 1\n" * 200)
    write(bad / "plain.py", "x = 1\n")
    os.symlink(bad / "nowhere.py", bad / "dangling.py")
    files = collect(environment, tmp_path / "cache")
    skipped = manifest_of(files)["files"]["skipped"]
    # rich/__init__.py is the second without a docstring.
    expected = {"larger than 2 MB": 1, "mostly code": 1, "no docstring": 2, "not UTF-8": 1, "not parsable": 2}
    assert skipped == {**expected, "unreadable": 1}
    assert "cannot be read to its end" not in "".join(texts_of(files).values())


@pytest.mark.parametrize(
    "file",
    [
        "rich/tests/cases.py",
        "rich/test_bend.py",
        "rich/conftest.py",
        "rich/_vendor/six.py",
        "rich/.venv/lib/python3.11/site-packages/beta/it.py",
        "rich-1.0.data/purelib/it.py",
        "transformers/models/it.py",
        "lightning_danube/model.py",
        "callbacks/samples.py",
    ],
)
def test_tests_vendored_copies_and_ourselves_are_left_out(environment: Environment, file: str) -> None:
    install(environment.packages[0], "transformers")
    write(environment.packages[0] / "transformers" / "trainer.py", module_source("train"))
    before = environment.sources()
    assert "transformers.trainer" in {source.module for source in before}
    write(environment.packages[0] / file, module_source("smuggle"))
    assert environment.sources() == before


@pytest.mark.parametrize("name", ["llama-cpp-python", "trl", "matplotlib", "lightning-danube"])
def test_what_is_installed_beside_the_fixed_list_changes_nothing(
    environment: Environment, tmp_path: Path, name: str
) -> None:
    before, fingerprint = collect(environment, tmp_path / "before"), environment.fingerprint()
    site = environment.packages[0]
    install(site, name, "# Beside\n\nIt is installed beside the others, and says a lot of itself in its own words.")
    write(site / name.replace("-", "_") / "__init__.py", module_source("smuggle"))
    assert environment.fingerprint() == fingerprint
    after = collect(environment, tmp_path / "after")
    assert texts_of(after) == texts_of(before)
    assert manifest_of(after)["distributions"] == ["numpy==1.0", "rich==1.0"]


def test_a_package_without_its_distribution_is_not_read(environment: Environment) -> None:
    before = environment.sources()
    write(environment.packages[0] / "datasets" / "__init__.py", module_source("frame"))
    assert environment.sources() == before
    install(environment.packages[0], "datasets")
    assert {source.package for source in environment.sources()} - {source.package for source in before} == {"datasets"}


def test_an_environment_is_collected_once(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = documentation._collect(environment, tmp_path / "cache", processes=1, progress=True)
    told = capsys.readouterr()
    assert told.out == ""
    start, end = told.err.splitlines()
    assert start.startswith("Collecting text from the installed packages")
    assert f"wiki {len(rows_of(first['wiki'])):,}" in end

    def refuse(*_: Any) -> Any:
        raise AssertionError("a cache hit reads no source")

    monkeypatch.setattr(documentation, "read_sources", refuse)
    monkeypatch.setattr(documentation, "collected_sources", refuse)
    assert documentation._collect(environment, tmp_path / "cache", processes=1, progress=True) == first
    assert capsys.readouterr() == ("", "")


def test_another_version_or_format_is_another_environment(
    environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = {environment.fingerprint()}
    metadata = environment.packages[0] / "rich-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    prints.add(environment.fingerprint())
    monkeypatch.setattr(docstrings, "FORMAT", docstrings.FORMAT + 1)
    prints.add(environment.fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("whole", [0, 1, 2, 3])
def test_a_stopped_collection_goes_on_after_the_last_package(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    """`whole`: packages (numpy, rich, the standard library) that are read before the stop; 3: all that is written."""
    expected = {role: file.read_bytes() for role, file in collect(environment, tmp_path / "never stopped").items()}
    packages = ["numpy", "rich", docstrings.STANDARD_LIBRARY]
    read: list[str] = []
    read_all = documentation.read_all

    def read_until(sources: list[docstrings.SourceFile]) -> list[docstrings.Reading]:
        if sources[0].package in packages[whole:]:
            raise KeyboardInterrupt
        return read_all(sources)

    def read_again(sources: list[docstrings.SourceFile]) -> list[docstrings.Reading]:
        read.extend(source.package for source in sources)
        return read_all(sources)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(documentation, "read_all", read_until)
        patch.setattr(documentation, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(environment, tmp_path / "cache")
    assert len(list((tmp_path / "cache").rglob("*.json"))) == whole
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    monkeypatch.setattr(documentation, "read_all", read_again)
    files = collect(environment, tmp_path / "cache")
    assert sorted(set(read), key=packages.index) == packages[whole:]
    assert {role: file.read_bytes() for role, file in files.items()} == expected
    assert list((tmp_path / "cache").iterdir()) == [files["web"].parent]


def test_what_was_read_is_kept_as_it_is(environment: Environment, tmp_path: Path) -> None:
    readings = [*docstrings.read_all(environment.sources()), "no docstring"]
    modules = [reading for reading in readings if isinstance(reading, docstrings.Module)]
    assert any(entry.parameters and entry.bases and entry.methods for module in modules for entry in module.entries)
    documentation._keep(tmp_path / "part.json", readings)
    assert documentation._kept(tmp_path / "part.json") == readings


def test_a_package_that_has_other_files_than_were_read_is_read_again(environment: Environment, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    documentation.read_sources(environment.sources(), 1, False, parts)
    write(environment.packages[0] / "numpy" / "zipping.py", module_source("zip"))
    readings = documentation.read_sources(environment.sources(), 1, False, parts)
    assert "numpy.zipping" in [reading.name for reading in readings if isinstance(reading, docstrings.Module)]


def test_a_damaged_part_is_named(environment: Environment, tmp_path: Path) -> None:
    documentation.read_sources(environment.sources(), 1, False, tmp_path)
    (tmp_path / "rich.json").write_text('{"readings": [{}]}')
    with pytest.raises(ValueError, match=r"rich\.json is damaged .*: remove it, and it is made again"):
        documentation.read_sources(environment.sources(), 1, False, tmp_path)


def test_two_processes_do_not_collect_at_once(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    first = collect(environment, tmp_path / "first")["web"].parent
    lock = cache / f".{first.name}.lock"

    def meanwhile(_: float) -> None:
        """The other process writes its files and ends."""
        shutil.copytree(first, cache / first.name)
        other.__exit__(None, None, None)

    other = locked(lock, "")
    other.__enter__()
    monkeypatch.setattr("lightning_danube.files.time.sleep", meanwhile)
    monkeypatch.setattr(documentation, "read_sources", None)  # it is not called
    assert collect(environment, cache)["web"].read_bytes() == (first / "web.jsonl").read_bytes()
    assert f"the collected documentation ({cache / first.name}) is in use by" in capsys.readouterr().err


@pytest.mark.medium
def test_ctrl_c_ends_a_collection_and_its_processes_and_warns_of_nothing(tmp_path: Path) -> None:
    make_environment(tmp_path / "environment")
    script = tmp_path / "collect.py"
    # Each file takes a second, so that the signal comes while processes read.
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lightning_danube.text.embedded import docstrings, documentation\n"
        "def slowly(sources):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(1)\n"
        "    return [''] * len(sources)\n"
        "documentation.read_all = slowly\n"
        "documentation._FILES_PER_CHUNK = 1\n"
        "if __name__ == '__main__':\n"
        "    root = Path(sys.argv[1])\n"
        "    environment = docstrings.Environment((root / 'site-packages',), root / 'stdlib')\n"
        "    documentation._collect(environment, root / 'cache', processes=2, progress=False)\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "environment")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline().startswith("reading")
    os.killpg(run.pid, signal.SIGINT)
    # The pipes close when the last process has ended.
    _, told = run.communicate(timeout=20)
    assert run.returncode == -signal.SIGINT
    assert "leaked" not in told
    assert told.count("Traceback") == 1


def test_a_process_that_is_killed_is_told(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documentation, "read_all", _die)
    with pytest.raises(ValueError, match=r"a process that collects text was ended from outside .* continues where it"):
        documentation.read_sources(environment.sources(), processes=2, lively=False, parts=tmp_path / "parts")


def _die(_: Any) -> None:
    os._exit(1)


def test_the_slower_of_two_keeps_what_the_faster_wrote(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def race(partial: Path, folder: Path) -> None:
        if Path(partial).is_dir():
            shutil.copytree(partial, folder)
        replace(partial, folder)

    monkeypatch.setattr("os.replace", race)
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

The shapes of both must be the same or broadcastable, which is described elsewhere at greater length.
""".format(**common_args))
cross = _add_docstr(_linalg.linalg_cross, "Computes the cross product of two vectors of three elements.")
add_newdoc("numpy._core", "ndarray", ("T", """View of the transposed array."""))
'''
    write(tmp_path / "c.py", source)
    module = docstrings.read_source(docstrings.SourceFile(str(tmp_path / "c.py"), "torch", "torch._torch_docs"))
    assert isinstance(module, docstrings.Module)
    hypot, cross, transposed = module.entries
    assert (hypot.name, cross.name, transposed.name) == ("torch.hypot", "cross", "ndarray.T")
    assert hypot.sentence == "Given the legs of a right triangle, return its hypotenuse."
    assert hypot.doc.startswith("Given the legs of a right triangle, return its hypotenuse.\n\nThe shapes of both must")
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
    assert prose.is_mostly_words(text) is expected


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
        "# Rich\n\n[![build](https://ci/badge.svg)](https://ci)\n<p align='center'><b>Rich</b> folds paper.</p>\n\n"
        "Change this freely.\n\n```\npip install rich\n```\n\n## Changelog\n\n- 1.0: it folds.\n"
    )
    assert prose.readme_prose(readme) == "Rich folds paper.\n\nChange this freely."


def test_long_texts_are_cut_between_paragraphs() -> None:
    paragraph = "word " * 300 + "end."
    parts = docstrings.split_at_paragraphs("\n\n".join([paragraph] * 5))
    assert [part.count("end.") for part in parts] == [2, 2, 1]
    assert docstrings.split_at_paragraphs(paragraph * 4) == [paragraph * 4]


def test_variants_are_decided_by_the_key_alone() -> None:
    variants = "a {x}\nb {x}\nc {x}"
    said = {made_text.worded(variants, str(key), x="y") for key in range(50)}
    assert said == {"a y", "b y", "c y"}
    assert made_text.worded(variants, "key", x="1")[0] == made_text.worded(variants, "key", x="2")[0]


def test_this_interpreter_has_the_packages_that_the_sources_name() -> None:
    environment = Environment.running()
    installed = {distribution.name for distribution in environment.distributions()}
    assert set(docstrings.DISTRIBUTIONS) <= installed
    modules = {source.module for source in environment.sources()}
    assert set(docstrings.DISTRIBUTIONS.values()) <= modules
    missing = [name for name in docstrings.ACADEMIC if name not in modules]
    assert not missing, f"named in ACADEMIC but not installed: {missing}"
    assert {"textwrap", "pydoc_data.topics", "transformers.trainer"} <= modules
    assert not {name for name in modules if ".tests." in name or "._vendor." in name}


def test_the_distributions_come_with_a_plain_install() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    found: set[str] = set()
    waiting = list(map(Requirement, project["dependencies"]))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, importlib.metadata.requires(name) or ())
    assert set(docstrings.DISTRIBUTIONS) <= found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measured on Linux")
def test_this_interpreter_has_enough_to_train_on(tmp_path: Path) -> None:
    files = documentation.collect_documentation(tmp_path, progress=False)
    characters = {role: counts["characters"] for role, counts in manifest_of(files)["sources"].items()}
    # No configuration may read a source more often than max_epochs allows: `fit` would refuse it. With the paper's
    # tokenizer a token has 4.0 characters of these texts.
    laptop = resolved_config(["--config", "pretrain/laptop"])
    taken = facts_of(laptop)["tokens_by_source"]
    most = laptop["data"]["init_args"]["max_epochs"]
    for role, count in characters.items():
        assert taken[role] < 0.95 * most * count / 4.2, role


def test_another_python_is_another_environment(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment.fingerprint()
    monkeypatch.setattr(docstrings.platform, "python_version", lambda: "3.99.0")
    assert environment.fingerprint() != before


def fact(**more: Any) -> Fact:
    entry = docstrings.Entry("function", "Bender.bend", "", "Bend a thing until it breaks.", **more)
    return Fact(entry, "rich.bend", "rich", "Bend a thing until it breaks.")


def test_a_default_that_is_not_shown_is_neither_asked_for_nor_told() -> None:
    hidden = docstrings.Parameter("table", docstrings.UNREADABLE)
    assert made_text._default_of(fact(parameters=(hidden,))) is None
    shown = docstrings.Parameter("speed", "'fast'")
    question = made_text._default_of(fact(parameters=(hidden, shown)))
    assert question is not None and "`speed`" in question and "'fast'" in question and "table" not in question
    remarks = " ".join(made_text._parameter_remarks(fact(parameters=(hidden, shown))))
    assert "`speed` is `'fast'`" in remarks and "table" not in remarks


def test_what_must_be_given_is_told_apart_from_what_may_be_left_out() -> None:
    names = ("thing", "*rest", "how", "**options")
    parameters = tuple(docstrings.Parameter(name, "1" if name == "how" else None) for name in names)
    question = made_text._required(fact(parameters=parameters))
    assert question is not None
    answer = question.partition("\nAnswer: ")[2]
    needed, _, rest = answer.partition("`thing`")
    assert needed in ("", "Only ") and not {"`*rest`", "`how`", "`**options`"} & set(needed.split())
    remarks = " ".join(made_text._parameter_remarks(fact(parameters=parameters)))
    assert "`thing`" in remarks and "`*rest`" not in remarks
    assert rest == "." or all(f"`{name}`" in rest for name in names[1:])


@pytest.mark.parametrize(("count", "shown", "others"), [(2, 2, False), (6, 6, False), (7, 6, True)])
def test_more_methods_than_are_named_are_hinted_at(count: int, shown: int, others: bool) -> None:
    question = made_text._methods_of(fact(methods=tuple(f"m{number}" for number in range(count))))
    assert question is not None and question.count("`m") == shown
    assert question.endswith(", among others.") is others


def test_no_marker_of_a_chat_template_is_prose() -> None:
    from lightning_danube.tokens.chat_template import MARKERS

    for marker in (*MARKERS, "</s>"):
        assert not prose.is_mostly_words(f"Wrap the question as {marker} says, then answer it.")


@pytest.mark.parametrize(("length", "expected"), [(240, True), (241, False)])
def test_a_run_without_blanks_ends_prose(length: int, expected: bool) -> None:
    assert prose.is_mostly_words("Some words stand before the run. " + "a" * length) is expected


def test_a_module_belongs_to_one_made_source_and_facts_are_used_once() -> None:
    entry = docstrings.Entry("function", "bend", "", "Bend a thing until it breaks.")
    other = docstrings.Entry("function", "BEND", "", "Bend a Thing until it breaks.")
    private = docstrings.Entry("function", "_fold", "", "Fold a thing until it is small.")
    used: set[bytes] = set()
    module = docstrings.Module("rich", "rich.bend", (entry, other, private))
    assert [one.name for one in made_text.facts_about_module(module, used)] == ["bend"]
    assert made_text.facts_about_module(module, used) == []


def test_a_text_repeats_others_if_more_than_half_of_it_is_known() -> None:
    one, two, three, four = (f"Sentence number {number} is long enough to be compared" for number in range(4))
    seen = Seen()
    assert not seen.repeats(f"{one}. {two}")
    assert not seen.repeats(f"{one}. {three}")
    assert not seen.repeats(
        f"{two}. {three}. And this is the new part of it, which has twice the length of the others, {four}"
    )
    assert seen.repeats(f"{one}. {two}. This sentence alone is a new one in this text")
