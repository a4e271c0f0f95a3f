"""A pre-training corpus without a network: the documentation inside the installed Python packages.

Real English, some ten million tokens of it, lies on every machine that can train: docstrings and READMEs. They are
collected here at run time into five sources that stand in for those of the paper. They play the parts, they are not the
thing: none of this is web crawl, Wikipedia, papers, model-written text or human instructions, and all of it speaks of
programming. What each source is made of:

* `web`: docstrings of every third-party package that `academic` does not take, and the READMEs of all distributions.
* `wiki`: the reference topics of the Python language (`pydoc_data`) and the docstrings of the standard library.
* `academic`: docstrings of the packages and modules in `ACADEMIC`: numerics, algebra, graphs, statistics, optimisation.
* `synthetic`: textbook-like passages about modules, made by templates from signatures and first sentences. In the paper
  a language model wrote this part; here no model did.
* `instruct`: questions and answers made by templates from the same kind of material, as plain text.

No docstring stands in full in two sources. Docstrings of more than one sentence and at least `SHORTEST` characters
go to the first three; the last two see only first sentences and signatures. Each module goes to one of these two, by a
hash of its name, and each sentence is used once.

Packages are read, never imported. The same environment gives the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import re
import secrets
import shutil
import string
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from email import message_from_string
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

ROLES = ("web", "wiki", "academic", "synthetic", "instruct")
FORMAT = 1
"""Raise it with every change that changes the collected bytes: caches of other formats are then left alone."""

ACADEMIC = (
    *("mpmath", "networkx", "numpy", "scipy", "sklearn", "statsmodels", "sympy", "torchmetrics"),
    *("torch._linalg_utils", "torch._lobpcg", "torch._tensor_docs", "torch._torch_docs", "torch.autograd"),
    *("torch.distributions", "torch.fft", "torch.functional", "torch.func", "torch.linalg", "torch.optim"),
    *("torch.nn.functional", "torch.nn.init", "torch.nn.modules", "torch.nn.utils"),
    *("torch.signal", "torch.sparse", "torch.special"),
)
"""Packages and modules of the source `academic`, where installed; what lies below a module belongs to it."""

OURS = ("lightning_danube", "callbacks", "lightning-danube")
"""Left out: this project changes without changing its version, which the cache is keyed by."""

SHORTEST = 80
"""Characters of the shortest docstring that goes to a documents source."""
USUAL_LONGEST = 4000
"""Docstrings are joined up to this length; a longer one is a document of its own."""
LARGEST_FILE = 2_000_000
"""Bytes; larger sources are generated tables."""
UNREADABLE = "..."
"""Stands for default values that are long."""
STANDARD_LIBRARY = "python"
"""Package name in the origins of the standard library."""

_SKIPPED_FOLDERS = frozenset(
    {
        *("__pycache__", "_internal", "_vendor", "_vendored", "_vendored_packages", "dist-packages", "node_modules"),
        *("site-packages", "test", "tests"),
    }
)
_SKIPPED_OF_STDLIB = frozenset({"ensurepip", "idlelib", "lib2to3", "turtledemo", "lib-dynload", "__phello__"})
_HAS_DOCSTRING = re.compile(rb'"""|\'\'\'')
_NO_LETTERS = dict.fromkeys(map(ord, string.ascii_letters))
_LONG_RUN = re.compile(r"\S{241}")
_SPECIAL = re.compile(r"</s>|<\|(?:prompt|answer)\|>")
_PROCESSES_WORTH_STARTING = 16
_FILES_PER_CHUNK = 48

T = TypeVar("T")


# --- What is read from a file -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str  # with its stars
    default: str | None
    annotation: str | None

    @property
    def optional(self) -> bool:
        return self.default is not None or self.name.startswith("*")


@dataclass(frozen=True, slots=True)
class Entry:
    """A docstring and what it documents."""

    kind: str  # module, class, function, method, property
    name: str  # qualified inside its module; empty for the module
    doc: str  # empty if it is no text for a document
    sentence: str | None
    parameters: tuple[Parameter, ...] | None = None  # None: unknown
    returns: str | None = None
    bases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Module:
    package: str
    name: str
    entries: tuple[Entry, ...]
    topics: bool = False  # the language reference, not docstrings


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file to read. The path is not part of what is collected, so that homes do not differ."""

    path: str
    package: str
    module: str


Reading = Module | str
"""A module, or why there is none."""


@dataclass(frozen=True, slots=True)
class Distribution:
    name: str
    version: str
    description: str


@dataclass(frozen=True, slots=True)
class Environment:
    """Where the documentation lies."""

    packages: tuple[Path, ...]
    stdlib: Path | None

    @classmethod
    def running(cls) -> Environment:
        """That of this interpreter; folders it merely has on its path are not its environment."""
        paths = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
        return cls(tuple(dict.fromkeys(paths)), Path(sysconfig.get_path("stdlib")))

    def distributions(self) -> list[Distribution]:
        """In order of name; one of those that share a name, as an interrupted upgrade leaves two."""
        found: dict[str, Distribution] = {}
        for installed in importlib.metadata.distributions(path=[str(path) for path in self.packages]):
            metadata = message_from_string(installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "")
            name, version = metadata.get("Name", ""), metadata.get("Version", "")
            key = re.sub(r"[-_.]+", "-", name).lower()
            if name and key not in OURS and (key not in found or version < found[key].version):
                description = metadata.get("Description") or metadata.get_payload()
                found[key] = Distribution(name, version, str(description or ""))
        return [found[key] for key in sorted(found)]

    def fingerprint(self) -> str:
        """Of everything that decides what is collected."""
        facts = [f"format {FORMAT}", f"python {platform.python_version()}"]
        facts += [f"{distribution.name}=={distribution.version}" for distribution in self.distributions()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def sources(self) -> list[Source]:
        """The Python files, in an order that does not depend on the file system."""
        found: dict[tuple[str, ...], Source] = {}
        for root in self.packages:
            for parts in _python_files(root):
                if parts[0] not in OURS:
                    package = parts[0].removesuffix(".py")
                    found.setdefault(parts, Source(str(root.joinpath(*parts)), package, _module_name(parts)))
        ordered = [found[parts] for parts in sorted(found)]
        if self.stdlib is not None:
            ordered += [
                Source(str(self.stdlib.joinpath(*parts)), STANDARD_LIBRARY, _module_name(parts))
                for parts in sorted(_python_files(self.stdlib))
                if parts[0] not in _SKIPPED_OF_STDLIB and not parts[0].startswith(("config-", "_sysconfigdata"))
            ]
        return ordered


def _python_files(root: Path) -> Iterator[tuple[str, ...]]:
    for folder, subfolders, files in os.walk(root):
        # Names with a dash or a dot are no packages: metadata, libraries, other environments.
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS and re.fullmatch(r"\w+", name)]
        parts = Path(folder).relative_to(root).parts
        for name in files:
            if name.endswith(".py") and not name.startswith("test_") and name != "conftest.py":
                yield (*parts, name)


def _module_name(parts: Sequence[str]) -> str:
    names = [*parts[:-1], parts[-1].removesuffix(".py")]
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


def read_source(source: Source) -> Reading:
    """Documented entries of a file, in its order, or the cause for which it is skipped."""
    try:
        if os.path.getsize(source.path) > LARGEST_FILE:
            return "larger than 2 MB"
        content = Path(source.path).read_bytes()
    except OSError:
        return "unreadable"
    is_topics = source.package == STANDARD_LIBRARY and source.module == "pydoc_data.topics"
    if not is_topics and not _HAS_DOCSTRING.search(content):
        return "no docstring"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not UTF-8"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        entries = tuple(_topics(tree) if is_topics else _entries(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not parsable"
    return Module(source.package, source.module, entries, is_topics) if entries else "no docstring"


def _read_all(sources: Sequence[Source]) -> list[Reading]:
    return [read_source(source) for source in sources]


def _topics(tree: ast.Module) -> Iterator[Entry]:
    """The language reference is a dictionary from title to text. The longest come first: the small ones repeat them."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="topics")], value=ast.Dict() as literal):
                topics = ast.literal_eval(literal)
                for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
                    yield from (Entry("topic", name, part, None) for part in split_at_headings(clean(topics[name])))


def _entries(tree: ast.Module) -> Iterator[Entry]:
    if doc := ast.get_docstring(tree, clean=False):
        yield _entry("module", "", clean(doc))
    yield from _documented(tree.body, "")


def _entry(kind: str, name: str, doc: str) -> Entry:
    sentence = first_sentence(doc)
    # The made sources would repeat all of a docstring that is one sentence: it is left to them.
    is_document = len(doc) >= SHORTEST and (sentence is None or len(doc) > len(sentence) + 40) and is_prose(doc)
    return Entry(kind, name, doc if is_document else "", sentence)


def _documented(body: Iterable[ast.stmt], prefix: str) -> Iterator[Entry]:
    for node in body:
        match node:
            case ast.ClassDef():
                yield from _class(node, prefix)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if doc := ast.get_docstring(node, clean=False):
                    yield _function(node, prefix, clean(doc))
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call):
                yield from _added(call, name)
            case ast.Expr(value=ast.Call() as call):
                yield from _added(call, None)
            case ast.If() | ast.Try():
                for branch in (node.body, node.orelse, getattr(node, "finalbody", [])):
                    yield from _documented(branch, prefix)


def _class(node: ast.ClassDef, prefix: str) -> Iterator[Entry]:
    functions = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    if doc := ast.get_docstring(node, clean=False):
        constructor = next((item for item in functions if item.name == "__init__"), None)
        yield replace(
            _entry("class", prefix + node.name, clean(doc)),
            parameters=_parameters(constructor, bound=True) if constructor else None,
            bases=tuple(ast.unparse(base) for base in node.bases if isinstance(base, ast.Name | ast.Attribute)),
            methods=tuple(dict.fromkeys(item.name for item in functions if not item.name.startswith("_"))),
        )
    yield from _documented(node.body, f"{prefix}{node.name}.")


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str, doc: str) -> Entry:
    decorators = {ast.unparse(decorator).split("(")[0].split(".")[-1] for decorator in node.decorator_list}
    kind = "method" if prefix else "function"
    if decorators & {"property", "cached_property", "setter", "lazyproperty"}:
        kind = "property"
    parameters = _parameters(node, bound=bool(prefix) and "staticmethod" not in decorators)
    return replace(_entry(kind, prefix + node.name, doc), parameters=parameters, returns=_short(node.returns))


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> tuple[Parameter, ...]:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults))
    rows = list(zip(positional, [*defaults, *arguments.defaults], strict=True))[1 if bound else 0 :]
    found = [Parameter(arg.arg, _default(default), _short(arg.annotation)) for arg, default in rows]
    if arguments.vararg:
        found.append(Parameter(f"*{arguments.vararg.arg}", None, None))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [Parameter(arg.arg, _default(default), _short(arg.annotation)) for arg, default in keywords]
    if arguments.kwarg:
        found.append(Parameter(f"**{arguments.kwarg.arg}", None, None))
    return tuple(found)


def _default(node: ast.expr | None) -> str | None:
    return None if node is None else _short(node) or UNREADABLE


def _short(node: ast.expr | None) -> str | None:
    """The source of an expression, if it can stand in a sentence."""
    text = "" if node is None else ast.unparse(node)
    return text if 0 < len(text) <= 40 and "`" not in text and not _SPECIAL.search(text) else None


def _added(call: ast.Call, name: str | None) -> Iterator[Entry]:
    """Documentation of what is written in C: `add_docstr(torch.abs, ...)` of torch, `add_newdoc("numpy", ...)`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if not function.endswith(("add_docstr", "add_newdoc")) or len(call.args) < 2:
        return
    strings = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    doc = max(strings, key=len, default="")
    if name is None and isinstance(call.args[0], ast.Constant):
        name = ".".join(text for text in strings[1:] if text.isidentifier())
    if any(isinstance(node, ast.Attribute) and node.attr == "format" for node in ast.walk(call)):
        # Fields stand for paragraphs about parameters that many functions share.
        doc = re.sub(r"(?m)^[ \t]*\{\w+\}[ \t]*$", "", doc).replace("{{", "{").replace("}}", "}")
    if doc := clean(doc):
        yield _entry("function", name or ast.unparse(call.args[0]), doc)


# --- Text ---------------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Indentation, trailing blanks, blank lines in a row, control characters and halves of surrogate pairs removed."""
    text = inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8")
    text = re.sub(r"[^\S\n]+$", "", text.replace("\r\n", "\n").replace("\xa0", " "), flags=re.MULTILINE)
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def is_prose(text: str) -> bool:
    """Whether a text is mostly words. Base64, tables of numbers and other scripts are not, nor is template markup.

    Of the characters that are not blank, more than half are ASCII letters and 95 % are ASCII; no unbroken run is longer
    than 240 characters; and no chat template's marker is spelled out, as those belong to fine-tuning alone.
    """
    size = len("".join(text.split()))
    return (
        len(text.translate(_NO_LETTERS)) < len(text) - 0.5 * size
        and len(text.encode("ascii", "ignore")) >= len(text) - 0.05 * size
        and not _LONG_RUN.search(text)
        and not _SPECIAL.search(text)
    )


_HEADING = re.compile(r"\n(?=#{1,4} \S)|\n(?=[^\n]{3,}\n([=*~^-])\1{3,}\n)")
_LAST_HEADING = re.compile(
    r"\n(?:#{1,4} *|(?=[^\n]+\n[=*~^-]{4}))[^\w\n]*"
    r"(?:change ?log|changes|history|release|what's new|news|contribut|licen[sc]e|copyright|sponsor|credits|citation)",
    re.IGNORECASE,
)


def split_at_headings(text: str) -> list[str]:
    """Parts of a long text, cut before Markdown or underlined headings, joined again up to the usual length."""
    # In a code block, # begins a comment.
    headings = [match.start() for match in _HEADING.finditer(text) if text.count("```", 0, match.start()) % 2 == 0]
    cuts = [0, *headings, len(text)]
    parts: list[str] = []
    for start, end in pairwise(cuts):
        piece = text[start:end]
        if parts and len(parts[-1]) + len(piece) <= USUAL_LONGEST:
            parts[-1] += piece
        else:
            parts.append(piece)
    return [part.strip() for part in parts if part.strip()]


def clean_readme(text: str) -> str:
    """A README up to its change log, without badges, pictures and HTML."""
    if found := _LAST_HEADING.search(text):
        text = text[: found.start()]
    text = re.sub(r"<!--.*?-->", "", text.replace("\r\n", "\n"), flags=re.DOTALL)
    text = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", "", text)
    text = re.sub(r"</?[a-zA-Z][^<>\n]*>", "", text)
    text = re.sub(r"(?m)^\.\. (image|\||_[^\n]*:|figure|raw|contents)[^\n]*(\n[ \t]+[^\n]+)*$", "", text)
    text = re.sub(r"(?m)^[ \t]*(\|[\w -]+\|[ \t]*)+$|^[\s|•·*>-]*$|^\[[^\]]+\]: [^\n]*$", "", text)
    return clean(text)


_VERBS = """
accept accumulate add adjust aggregate allow append apply ask assert assign attempt bind build calculate call cancel
cast change check choose clean clear close collect combine compare compile compute concatenate configure construct
convert copy count create decide decode decompose decorate define delete destroy detect determine differentiate disable
dispatch display divide download draw drop dump emit enable encode ensure escape estimate evaluate execute expand export
extend extract factor fetch fill filter find flatten flush form format fuse gather generate get give group guess handle
identify implement import indicate infer initialize insert install instantiate integrate invoke iterate join list load
locate log look make map mark match measure merge modify move multiply negate normalize obtain open pack pad parse
partition perform permute pick plot pop populate prepare prevent print process produce provide push put query raise read
rebuild receive recognize reconstruct record reduce register release reload remove rename render reorder replace report
represent reset reshape resize resolve restore retrieve return reverse rewrite rotate round run sample save scale search
select send serialize set shift show shuffle simplify slice solve sort specify split start stop store subtract sum swap
switch take test track transform translate transpose traverse trim truncate try turn undo unpack update upload use
validate verify visit wait walk warn wrap write yield
"""


def _third_person(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


_PREDICATES = {form: _third_person(verb) for verb in _VERBS.split() for form in (verb, _third_person(verb))}
_SIGNATURE = re.compile(r"[\w.\[\], =]+\(.*\)(\s*(->|=)\s*.*)?(\s*# .*)?", re.DOTALL)
_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)(?<![ .]\w)[.!?](?=\s+[A-Z`*:\"'(\[]|\s*$)"
)


def first_sentence(doc: str) -> str | None:
    """The sentence that a docstring opens with, without markup, if it has one that can stand alone."""
    for paragraph in doc.split("\n\n"):
        lines = [line.strip() for line in paragraph.split("\n")]
        text = " ".join(lines)
        if _SIGNATURE.fullmatch(text) or re.match(r"(\.\. |[=*~^-]{3})", text):
            continue
        if len(lines) > 1 and re.fullmatch(r"[=*~^-]{3,}", lines[1]):
            continue
        text = re.sub(r":\w+(?::\w+)*:`[~!]?([^`<]+?)(?:\s*<[^`]*>)?`", r"`\1`", text)
        text = re.sub(r"\[`+~?([^`\]]+)`+\](\([^)]*\))?", r"`\1`", text).replace("``", "`")
        text = re.sub(r"\s*\[\d+\]_", "", re.sub(r"`([^`]+)`__?(?!\w)", r"\1", text))
        end = _SENTENCE_END.search(text)
        text = " ".join((text[: end.end()] if end else text).split())
        text = text if text.endswith((".", "!", "?")) else f"{text}."
        return text if _stands_alone(text) else None
    return None


_CANNOT_STAND_ALONE = re.compile(
    r"^(See|Alias|Same|Like|Note|TODO|Args|Parameters|Internal)\b|^\w+:|>>>|::|@|\\\\|\$|https?:|\S/\S+/\S|:(param|return|type)"
    r"|\b(an?|and|as|at|by|e\.g|etc|follows?|following|for|form|from|i\.e|in|is|of|or|that|the|thus|to|where|with)[.:]$|[,:]\.$"
)


def _stands_alone(sentence: str) -> bool:
    return (
        20 <= len(sentence) <= 280
        and len(sentence.split()) >= 4
        and sentence[0].isupper()
        and sentence.count("`") % 2 == 0
        and sentence.count("(") == sentence.count(")")
        and not _CANNOT_STAND_ALONE.search(sentence)
        and is_prose(sentence)
    )


def predicate(sentence: str) -> str | None:
    """What something does, to follow its name: "Return the mean." → "returns the mean"."""
    first, _, rest = sentence.partition(" ")
    verb = _PREDICATES.get(first.lower())
    return f"{verb} {rest[:-1]}" if verb and sentence.endswith(".") else None


# --- Documents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    package: str
    origin: str  # after the package


class Seen:
    """Tells repetition: a docstring met before, or one of which most lines were.

    Packages copy from each other and from themselves, with a name or a number changed here and there. Only lines of at
    least 30 characters are compared, as short ones repeat by nature.
    """

    def __init__(self) -> None:
        self._docs: set[bytes] = set()
        self._lines: set[bytes] = set()
        self.exact = self.near = 0

    def repeats(self, doc: str) -> bool:
        """Whether the text repeats earlier ones; remembers it if it does not."""
        if (key := _digest(" ".join(doc.split()))) in self._docs:
            self.exact += 1
            return True
        self._docs.add(key)
        lines = [(len(line), _digest(line)) for line in map(str.strip, doc.split("\n")) if len(line) >= 30]
        known = sum(length for length, line in lines if line in self._lines)
        if 2 * known > sum(length for length, _ in lines):
            self.near += 1
            return True
        self._lines.update(line for _, line in lines)
        return False


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def signature(entry: Entry, longest: int = 120) -> str:
    """The entry as it is called; parameters that do not fit become an ellipsis."""
    if entry.parameters is None or entry.kind == "property":
        return entry.name
    written = [p.name if p.default is None else f"{p.name}={p.default}" for p in entry.parameters]
    shown: list[str] = []
    for text in written:
        if len(entry.name) + sum(len(part) + 2 for part in [*shown, text]) > longest:
            shown.append("...")
            break
        shown.append(text)
    return f"{entry.name}({', '.join(shown)})"


def role_of(module: Module) -> str:
    """The documents source that a module's docstrings belong to."""
    if module.package == STANDARD_LIBRARY:
        return "wiki"
    dotted = f"{module.name}."
    return "academic" if any(dotted.startswith(f"{name}.") for name in ACADEMIC) else "web"


def documents_of(module: Module, seen: Seen) -> Iterator[Document]:
    """A class with its methods is a document, and so are a module's opening and the functions that follow one another.

    Each starts anew where it would grow beyond the usual length.
    """
    group, title, blocks, origin = "", "", [""], ""
    for entry in module.entries:
        if not entry.doc or seen.repeats(entry.doc):
            continue
        if module.topics:
            yield Document(entry.doc, module.package, f"{module.name}.{entry.name}")
            continue
        own_group = entry.name if entry.kind == "class" else ""
        if entry.kind in ("method", "property"):
            own_group = entry.name.rpartition(".")[0]
        is_title = entry.kind in ("class", "module")
        block = entry.doc if is_title else f"{signature(entry)}\n\n{entry.doc}"
        length = sum(len(part) + 2 for part in blocks)
        if not blocks[0] or own_group != group or length + len(block) > USUAL_LONGEST:
            if blocks[0]:
                yield Document("\n\n".join(blocks), module.package, origin)
            group = own_group
            title = f"Class {module.name}.{own_group}" if own_group else f"Module {module.name}"
            if entry.kind == "class":
                title = f"Class {module.name}.{signature(entry)}"
            blocks, origin = [title, block], f"{module.name}.{entry.name}".rstrip(".")
        else:
            blocks.append(block)
    if blocks[0]:
        yield Document("\n\n".join(blocks), module.package, origin)


def readmes(environment: Environment) -> Iterator[Document]:
    """Parts of the long descriptions of the installed distributions."""
    for distribution in environment.distributions():
        for part in split_at_headings(clean_readme(distribution.description)):
            if len(part) >= SHORTEST and is_prose(part):
                yield Document(part, distribution.name, "README")


# --- Made text: what both kinds share -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fact:
    """A public entry with a first sentence that no other has."""

    entry: Entry
    module: str
    package: str
    sentence: str

    @property
    def name(self) -> str:
        return self.entry.name or self.module

    @property
    def full(self) -> str:
        # Functions added from C are named after where they are found, which includes the package.
        inside = self.entry.name and not self.entry.name.startswith(f"{self.package}.")
        return f"{self.module}.{self.entry.name}" if inside else self.name

    @property
    def home(self) -> str:
        return "the standard library" if self.package == STANDARD_LIBRARY else f"the package `{self.package}`"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.entry.parameters or ()

    @property
    def is_callable(self) -> bool:
        return self.entry.parameters is not None and self.entry.kind != "property" and len(self.parameters) <= 10

    def fields(self) -> dict[str, str]:
        """What templates may speak of."""
        does = predicate(self.sentence) or ""
        kind, call = self.entry.kind, signature(self.entry)
        return {
            **{"name": self.name, "full": self.full, "kind": kind, "module": self.module, "home": self.home},
            **{"sentence": self.sentence, "does": does, "call": call, "returns": self.entry.returns or ""},
        }


def facts_of(module: Module, used: set[bytes]) -> list[Fact]:
    """What made text may say of a module; remembers the sentences."""
    facts = []
    for entry in module.entries:
        if entry.sentence is None or any(part.startswith("_") for part in entry.name.split(".")):
            continue
        key = _digest(entry.sentence.lower())
        if key not in used:
            used.add(key)
            facts.append(Fact(entry, module.name, module.package, entry.sentence))
    return facts


def pick(options: Sequence[T], *key: str) -> T:
    """One of the options, decided by the key alone."""
    return options[int.from_bytes(_digest("\0".join(key)), "big") % len(options)]


def say(variants: str, key: str, **fields: str) -> str:
    """One line of the variants, filled in. Other variants for the same key are picked independently."""
    return pick(variants.strip().split("\n"), key, variants).strip().format(**fields)


def enumerate_in_prose(items: Sequence[str], last: str = "and") -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def quoted(names: Sequence[str], last: str = "and") -> str:
    """`a`, `b` and `c`"""
    return enumerate_in_prose([f"`{name}`" for name in names], last)


# --- Questions and answers ----------------------------------------------------------------------------------------


def _ask(fact: Fact, questions: str, answers: str, **more: str) -> str:
    fields = {**fact.fields(), **more}
    return f"Question: {say(questions, fact.full, **fields)}\nAnswer: {say(answers, fact.full, **fields)}"


def _what(fact: Fact) -> str:
    if predicate(fact.sentence):
        questions = """
            What does `{full}` do?
            What does the {kind} `{full}` do?
            What is `{full}` for?
            Explain in one sentence what `{full}` does.
            I came across `{full}`. What does it do?
            Summarize the {kind} `{full}`."""
        return _ask(fact, questions, "`{name}` {does}.\nIt {does}.\nThe {kind} `{name}` {does}.")
    questions = """
        What is `{full}`?
        What does the documentation say about `{full}`?
        Describe the {kind} `{full}` in one sentence.
        How would you introduce the {kind} `{full}`?
        Tell me about `{full}`."""
    return _ask(fact, questions, "{sentence}")


def _which(fact: Fact) -> str | None:
    """The other way round: from what it does to its name, unless the sentence gives that away."""
    does = predicate(fact.sentence)
    if not does or len(does) > 160 or not fact.entry.name or fact.name.rpartition(".")[2].lower() in does.lower():
        return None
    questions = """
        Which {kind} of `{module}` {does}?
        Which {kind} in the module `{module}` {does}?
        Name the {kind} of `{module}` that {does}.
        I need a {kind} from `{module}` that {does}. Which one is it?"""
    return _ask(fact, questions, "`{full}`.\nThat is `{name}`.\nYou can use `{full}`.\nThe {kind} `{name}`.")


def _parameters_of(fact: Fact) -> str | None:
    if not fact.is_callable:
        return None
    questions = """
        Which parameters does `{name}` take?
        What are the parameters of `{name}`?
        List the arguments of `{name}`.
        With which arguments can `{name}` be called?"""
    if not fact.parameters:
        return _ask(fact, questions, "`{name}` takes no arguments.\nIt takes none.\nNone.")
    told = [f"`{p.name}`" + (f" (default `{p.default}`)" if p.default else "") for p in fact.parameters]
    return _ask(fact, questions, "It takes {told}.\n`{name}` takes {told}.\n{told}.", told=enumerate_in_prose(told))


def _required(fact: Fact) -> str | None:
    needed = [p.name for p in fact.parameters if not p.optional]
    rest = [p.name for p in fact.parameters if p.optional]
    if not fact.is_callable or not rest:
        return None
    questions = """
        Which arguments of `{name}` are required?
        What must be given when `{name}` is called?
        Which parameters of `{name}` cannot be left out?"""
    if not needed:
        return _ask(fact, questions, "None, as {rest} can be left out.\nNone.\nNone of {rest}.", rest=quoted(rest))
    answers = """
        Only {needed}.
        {needed}. What can be left out: {rest}.
        {needed} must be given, while {rest} may be left out."""
    return _ask(fact, questions, answers, needed=quoted(needed), rest=quoted(rest))


def _default_of(fact: Fact) -> str | None:
    having = [p for p in fact.parameters if p.default not in (None, UNREADABLE)]
    if not having or fact.entry.kind == "property":
        return None
    parameter = pick(having, fact.full)
    questions = """
        What is the default of `{parameter}` in `{name}`?
        What is `{parameter}` of `{name}` by default?
        Which value does `{parameter}` of `{name}` have if I leave it out?"""
    answers = "It is `{value}`.\nIts default is `{value}`.\n`{parameter}` is `{value}` by default.\n`{value}`."
    return _ask(fact, questions, answers, parameter=parameter.name, value=parameter.default or "")


def _type_of(fact: Fact) -> str | None:
    typed = [p for p in fact.parameters if p.annotation]
    if not typed:
        return None
    parameter = pick(typed, fact.full)
    questions = """
        What type should `{parameter}` of `{name}` have?
        Of which type is the parameter `{parameter}` of `{name}`?"""
    answers = "It is annotated as `{type}`.\n`{type}`."
    return _ask(fact, questions, answers, parameter=parameter.name, type=parameter.annotation or "")


def _where(fact: Fact) -> str | None:
    if fact.full == fact.name:
        return None
    questions = """
        In which module is `{name}` defined?
        Where is the {kind} `{name}` of {home} defined?
        Which module holds the {kind} `{name}`?"""
    return _ask(fact, questions, "In `{module}`.\nIt is defined in `{module}`.\nThe module `{module}` defines it.")


def _call_of(fact: Fact) -> str | None:
    if not fact.is_callable:
        return None
    questions = """
        What is the signature of `{name}`?
        How is `{name}` called?
        Show me how `{name}` is declared."""
    if fact.entry.returns:
        return _ask(fact, questions, "`{call}`, which returns `{returns}`.\n`{call}`; the result is `{returns}`.")
    return _ask(fact, questions, "`{call}`.\nLike this: `{call}`.\nIt reads `{call}`.")


def _methods_of(fact: Fact) -> str | None:
    if len(fact.entry.methods) < 2:
        return None
    questions = """
        Name some methods of the class `{name}`.
        Which methods does `{name}` define?
        What can be done with an object of the class `{name}`?"""
    more = ", among others" if len(fact.entry.methods) > 6 else ""
    return _ask(fact, questions, "It has the methods {methods}.", methods=quoted(fact.entry.methods[:6]) + more)


def _bases_of(fact: Fact) -> str | None:
    if not fact.entry.bases:
        return None
    questions = "What does the class `{name}` inherit from?\nWhich base classes does `{name}` have?"
    return _ask(fact, questions, "It inherits from {bases}.\n{bases}.", bases=quoted(fact.entry.bases))


_DETAILS = (_parameters_of, _required, _default_of, _type_of, _where, _call_of, _methods_of, _bases_of)


def questions_about(facts: Sequence[Fact]) -> Iterator[Document]:
    """Plain text, some pairs in a row that belong together: what a thing does and one detail of it, or its name."""
    pairs: list[str] = []
    first = facts[0]
    for fact in facts:
        first = first if pairs else fact
        name_asked = _which(fact)
        if name_asked and pick(range(3), fact.full, "which") == 0:
            pairs.append(name_asked)
        else:
            details = [pair for detail in _DETAILS if (pair := detail(fact))]
            pairs += [_what(fact), *([pick(details, fact.full, "detail")] if details else [])]
        if sum(map(len, pairs)) > pick([500, 900, 1300, 1700], first.full, "length") or fact is facts[-1]:
            yield Document("\n\n".join(pairs), first.package, first.full)
            pairs = []


# --- Textbook passages --------------------------------------------------------------------------------------------

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PLURALS = {"class": "classes", "property": "properties", "function": "functions", "method": "methods"}


def passages_about(facts: Sequence[Fact]) -> Iterator[Document]:
    """Sections on two to six facts of one module each; a module with a single one is not worth a section."""
    opening = facts[0] if not facts[0].entry.name else None
    rest = list(facts[1:] if opening else facts)
    part = 1
    while len(rest) > 1:
        size = pick([3, 4, 5], rest[0].full, "size")
        size = len(rest) if len(rest) - size < 2 else size
        yield Document(_passage(rest[:size], opening if part == 1 else None, part), rest[0].package, rest[0].full)
        rest = rest[size:]
        part += 1


def _passage(facts: Sequence[Fact], opening: Fact | None, part: int) -> str:
    kinds = {fact.entry.kind for fact in facts}
    names = [fact.name for fact in facts]
    about = ""
    if opening:
        about = say(
            " The module {does}." if predicate(opening.sentence) else " Its authors describe it so: {sentence}",
            *(opening.full,),
            **opening.fields(),
        )
    fields = {
        **facts[0].fields(),
        **{"about": f" {about}" if about else "", "count": _NUMBERS[len(facts)], "part": str(part)},
        **{"things": _PLURALS[kinds.pop()] if len(kinds) == 1 else "items"},
        **{"names": quoted(names), "first": names[0], "second": names[1]},
    }
    title = say(
        """
        The module `{module}`, part {part}
        Working with `{first}` and `{second}`
        `{first}`, `{second}` and their neighbours
        A closer look at `{module}`, section {part}
        What {home} offers in `{module}`
        Notes on {names}""",
        facts[0].full,
        **fields,
    )
    intro = say(
        """
        In this section we look at {count} {things} of the module `{module}`, which belongs to {home}.{about}
        The module `{module}` is a part of {home}.{about} We shall meet {count} of its {things}.
        Whoever uses {home} may one day need `{module}`.{about} Here are {count} of its {things}, one by one.
        Let us turn to `{module}`.{about} This section explains {count} {things} of it: {names}.
        There are a number of tools in `{module}`.{about} The following {count} {things} are among them.""",
        facts[0].full,
        **fields,
    )
    paragraphs = [_paragraph(fact, number, len(facts)) for number, fact in enumerate(facts)]
    return "\n\n".join([title, intro, *paragraphs, _closing(facts, fields)])


def _paragraph(fact: Fact, number: int, count: int) -> str:
    if number == 0:
        leads = "We begin with\nThe first to know is\nConsider first\nA good place to start is\nFirst comes"
    elif number < count - 1:
        leads = "Next comes\nThen there is\nClosely related is\nWe go on with\nConsider now\nAnother one is"
    else:
        leads = "Finally, there is\nLast comes\nIt remains to speak of\nThe last one here is\nWe end with"
    if predicate(fact.sentence):
        purposes = """
            It {does}.
            In short, it {does}.
            Its purpose is quickly told: it {does}.
            What does it do? It {does}.
            This {kind} {does}."""
    else:
        purposes = """
            {sentence}
            The documentation introduces it with these words: {sentence}
            In one sentence: {sentence}
            A short description would be this. {sentence}"""
    lead = f"{say(leads, fact.full)} the {fact.entry.kind} `{fact.name}`."
    return " ".join([lead, say(purposes, fact.full, **fact.fields()), *_remarks(fact)])


def _remarks(fact: Fact) -> Iterator[str]:
    """What the signature tells."""
    key, fields = fact.full, fact.fields()
    if fact.entry.bases:
        bases = "It is built upon {bases}.\nIt is derived from {bases}.\nIt inherits from {bases}."
        yield say(bases, key, bases=quoted(fact.entry.bases))
    if fact.is_callable:
        if fact.entry.kind == "class":
            calls = (
                "An object is made by `{call}`.\nOne writes `{call}` to create an object.\nIt is created as `{call}`."
            )
        else:
            calls = (
                "It is called as `{call}`.\nA call has the form `{call}`.\nOne writes `{call}`.\nDeclared: `{call}`."
            )
        yield say(calls, key, **fields)
        yield from _parameter_remarks(fact)
    if fact.entry.returns not in (None, "None"):
        returns = "The result is of type `{returns}`.\nWhat comes back is a `{returns}`.\nIt gives back `{returns}`."
        yield say(returns, key, **fields)
    if len(fact.entry.methods) > 1:
        methods = "Its methods include {methods}.\nSuch an object has, among others, the methods {methods}."
        yield say(methods, key, methods=quoted(fact.entry.methods[:5]))


def _parameter_remarks(fact: Fact) -> Iterator[str]:
    needed = [p.name for p in fact.parameters if not p.optional]
    defaults = [f"`{p.name}` is `{p.default}`" for p in fact.parameters if p.default not in (None, UNREADABLE)]
    typed = [p for p in fact.parameters if p.annotation]
    if not fact.parameters:
        yield say("It needs no arguments.\nNo arguments are needed.\nThere is nothing to pass to it.", fact.full)
    if needed:
        needs = """
            The caller has to give {all}.
            Without {any} the call fails.
            What it cannot do without: {all}.
            {all} must be given."""
        yield say(needs, fact.full, all=quoted(needed), any=quoted(needed, "or"))
    if defaults:
        told = "Unless told otherwise, {defaults}.\nBy default {defaults}.\nIf nothing else is said, {defaults}."
        yield say(told, fact.full, defaults=enumerate_in_prose(defaults[:3]))
    if typed and pick(range(2), fact.full, "typed") == 0:
        parameter = pick(typed, fact.full)
        yield f"The parameter `{parameter.name}` is declared as `{parameter.annotation}`."


def _closing(facts: Sequence[Fact], fields: dict[str, str]) -> str:
    calls = [fact for fact in facts if fact.is_callable and fact.parameters]
    told = [f"`{fact.name}` {does}" for fact in facts if (does := predicate(fact.sentence)) and len(does) < 90]
    more = {
        **{"last": facts[-1].name, "any": pick(facts, facts[0].full).name, "told": "; ".join(told[:3])},
        **{"callable": pick(calls, facts[0].full).name if calls else ""},
    }
    closings = """
        Summary: this section treated {names}, all from `{module}`.
        Exercise: Say in your own words how `{first}` differs from `{last}`.
        Exercise: Look up `{any}` and find out what it does with unusual input."""
    if calls:
        closings += """
        Exercise: Write a call of `{callable}` that gives only what must be given.
        Exercises: 1. Write a call of `{callable}`. 2. Say in your own words how `{first}` differs from `{last}`.
        Questions for review: When would you use `{first}`, and when `{last}`? What does one pass to `{callable}`?"""
    if len(told) > 1:
        closings += """
        To sum up: {told}.
        Remember: {told}.
        In this section we have seen that {told}."""
    return say(closings, facts[0].full, **{**fields, **more})


# --- Collecting ---------------------------------------------------------------------------------------------------


def collect_documentation(cache_dir: Path, *, processes: int | None = None, progress: bool = True) -> dict[str, Path]:
    """The documentation of the running environment: for each role a JSONL file of {"text", "origin"} rows.

    Collected once for each environment (distributions and their versions, Python) and kept in `cache_dir`, with a
    `manifest.json` beside the files; later calls read nothing else.

    Args:
        cache_dir: made if missing.
        processes: that read files; default as many as cores. They are spawned, so a script that calls this needs the
            usual `if __name__ == "__main__"`, unless it asks for one.
        progress: say on stderr what goes on, when something does.

    Raises:
        ValueError: a source would be empty, as the interpreter comes without sources or documentation.
    """
    return _collect(Environment.running(), cache_dir, processes=processes, progress=progress)


def _collect(environment: Environment, cache_dir: Path, *, processes: int | None, progress: bool) -> dict[str, Path]:
    fingerprint = environment.fingerprint()
    folder = cache_dir / f"documentation-{fingerprint}"
    files = {role: folder / f"{role}.jsonl" for role in ROLES}
    if _is_complete(files):
        return files

    start = time.monotonic()
    lively = progress and sys.stderr.isatty()
    if progress and not lively:
        print("Collecting the documentation of the installed packages (once for this environment) ...", file=sys.stderr)
    sources = environment.sources()
    readings = read_sources(sources, processes, lively)
    documents, manifest = assemble(environment, readings)
    for role in ROLES:
        if not documents[role]:
            raise ValueError(
                f"no documentation was found for the source {role!r} under {', '.join(map(str, environment.packages))} "
                f"and {environment.stdlib}: install the dependencies there as source files, or use data of your own"
            )
    manifest = {"format": FORMAT, "fingerprint": fingerprint, "python": platform.python_version(), **manifest}
    _write(folder, files, documents, manifest)
    if progress:
        counts = ", ".join(f"{role} {len(documents[role]):,}" for role in ROLES)
        print(f"Collected documents: {counts}, in {time.monotonic() - start:.0f} s.", file=sys.stderr)
    return files


def read_sources(sources: Sequence[Source], processes: int | None, lively: bool) -> list[Reading]:
    """All files, in the order given."""
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}: give at least 1, or None for one per core")
    # Neighbours are alike (one package's large files), so chunks are dealt out across the whole list.
    n_chunks = max(1, -(-len(sources) // _FILES_PER_CHUNK))
    chunks = [sources[number::n_chunks] for number in range(n_chunks)]
    processes = min(processes or min(os.cpu_count() or 1, _PROCESSES_WORTH_STARTING), n_chunks)
    readings: list[Reading] = [""] * len(sources)
    with tqdm(total=len(sources), desc="Reading documentation", unit=" files", disable=not lively, leave=False) as bar:

        def keep(results: Iterable[list[Reading]]) -> None:
            for number, result in enumerate(results):
                readings[number::n_chunks] = result
                bar.update(len(result))

        if processes == 1:
            keep(map(_read_all, chunks))
        else:
            # Trees have no cycles; looking for some takes a fifth of the time.
            with ProcessPoolExecutor(processes, get_context("spawn"), initializer=gc.disable) as pool:
                keep(pool.map(_read_all, chunks))
    return readings


def assemble(environment: Environment, readings: Sequence[Reading]) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """Documents of every role, and what the manifest says of them."""
    modules = [reading for reading in readings if isinstance(reading, Module)]
    skipped = Counter(reading for reading in readings if isinstance(reading, str))
    documents: dict[str, list[Document]] = {role: [] for role in ROLES}

    # Who comes first keeps what others repeat: the reference before the mathematics, both before the rest. Of one role,
    # topics come before docstrings.
    seen = Seen()
    for role in ("wiki", "academic", "web"):
        if role == "web":
            documents[role] += [document for document in readmes(environment) if not seen.repeats(document.text)]
        for module in sorted((m for m in modules if role_of(m) == role), key=lambda m: not m.topics):
            documents[role] += documents_of(module, seen)

    used: set[bytes] = set()
    for module in modules:
        facts = facts_of(module, used)
        if facts:
            role = pick(("synthetic", "instruct"), module.name)
            documents[role] += passages_about(facts) if role == "synthetic" else questions_about(facts)

    counts = {
        role: {
            "documents": len(documents[role]),
            "characters": sum(len(document.text) for document in documents[role]),
            "packages": len({document.package for document in documents[role]}),
        }
        for role in ROLES
    }
    manifest = {
        "sources": counts,
        "files": {"found": len(readings), "read": len(modules), "skipped": dict(sorted(skipped.items()))},
        "repetitions_dropped": {"exact": seen.exact, "near": seen.near},
        "distributions": [
            f"{distribution.name}=={distribution.version}" for distribution in environment.distributions()
        ],
    }
    return documents, manifest


def _write(
    folder: Path, files: dict[str, Path], documents: dict[str, list[Document]], manifest: dict[str, Any]
) -> None:
    """All files at once or none: under another name first, then renamed."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        for role, file in files.items():
            with open(partial / file.name, "w", encoding="utf-8", newline="\n") as stream:
                for document in documents[role]:
                    row = {"text": document.text, "origin": f"{document.package}:{document.origin}"}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(partial / "manifest.json", "w", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        if folder.is_dir() and not _is_complete(files):
            shutil.rmtree(folder)  # somebody removed a part
        try:
            os.replace(partial, folder)
        except OSError:
            # Another process was faster; its files are the same.
            if not _is_complete(files):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(files: dict[str, Path]) -> bool:
    return all(file.is_file() for file in files.values())
