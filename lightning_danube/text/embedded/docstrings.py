"""Reads docstrings and READMEs of a fixed list of installed distributions. Imports none of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from email import message_from_string
from pathlib import Path

from lightning_danube.text.embedded.prose import SENTENCE_END, SPECIAL, clean, is_mostly_words, prose, readme_prose

FORMAT = 2
"""Increase it with every change of the collected bytes, so that caches of other formats are not used."""

DISTRIBUTIONS = {
    **{"absl-py": "absl", "accelerate": "accelerate", "bitsandbytes": "bitsandbytes", "datasets": "datasets"},
    **{"grpcio": "grpc", "huggingface-hub": "huggingface_hub", "jinja2": "jinja2", "joblib": "joblib"},
    **{"jsonargparse": "jsonargparse", "lightning": "lightning", "mistral-common": "mistral_common"},
    **{"mpmath": "mpmath", "numpy": "numpy", "omegaconf": "omegaconf", "peft": "peft", "pillow": "PIL"},
    **{"pydantic": "pydantic", "rich": "rich", "tensorboard": "tensorboard", "tokenizers": "tokenizers"},
    **{"torch": "torch", "transformers": "transformers", "werkzeug": "werkzeug"},
}
"""The distributions that are read, and the package of each. A plain install of this project includes all of them.

No other distributions are read, so further installs do not change the text. Small packages that an extra may need in
another version (fsspec, urllib3, packaging) are not in the list. Four large packages (pandas, scikit-learn, networkx,
torchmetrics) are not in it either: they would take a third of the time, and the quickstart needs no more text.
"""

ACADEMIC = (
    *("mpmath", "numpy"),
    *("torch._linalg_utils", "torch._lobpcg", "torch._tensor_docs", "torch._torch_docs", "torch.autograd"),
    *("torch.distributions", "torch.fft", "torch.functional", "torch.func", "torch.linalg", "torch.optim"),
    *("torch.nn.functional", "torch.nn.init", "torch.nn.modules", "torch.nn.utils"),
    *("torch.signal", "torch.sparse", "torch.special"),
)
"""Packages and modules of the source `academic`, including their submodules."""

LEFT_OUT = ("torch/_dynamo", "torch/_inductor", "torch/testing", "transformers/models")
"""Folders that are not read, because their documentation is repetitive or about internals."""

SHORTEST = 80
"""Characters of the shortest docstring that becomes a document."""
USUAL_LONGEST = 4000
"""Characters. Docstrings are joined up to this length; a longer docstring is a separate document."""
LARGEST_FILE = 2_000_000
"""Bytes. Larger source files are generated tables."""
LEAST_SHARE = 0.2
"""Files of a distribution with a smaller share of docstrings are not parsed: they take much time and give little text.

All of the standard library is parsed, because the source `wiki` has no other text.
"""
UNREADABLE = "..."
"""Replaces long default values."""
STANDARD_LIBRARY = "python"
"""Package name in the origins of the standard library."""

_SKIPPED_FOLDERS = frozenset(
    {
        *("__pycache__", "_internal", "_vendor", "_vendored", "_vendored_packages", "dist-packages", "node_modules"),
        *("site-packages", "test", "tests"),
    }
)
_SKIPPED_OF_STDLIB = frozenset({"ensurepip", "idlelib", "lib2to3", "turtledemo", "lib-dynload", "__phello__"})
_DOCSTRINGS = re.compile(rb'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)


# --- What is read from a file -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str  # with its stars
    default: str | None

    @property
    def optional(self) -> bool:
        return self.default is not None or self.name.startswith("*")


@dataclass(frozen=True, slots=True)
class Entry:
    """A docstring and what it documents."""

    kind: str  # module, class, function, method, property
    name: str  # qualified inside its module; empty for the module
    doc: str  # prose; empty if unsuitable for a document
    sentence: str | None
    parameters: tuple[Parameter, ...] | None = None  # None if unknown
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
class SourceFile:
    """A Python file to read. The collected text omits the path, so it is equal on all machines."""

    path: str
    package: str
    module: str


Reading = Module | str
"""A module, or the reason why a file gives none."""


@dataclass(frozen=True, slots=True)
class Distribution:
    name: str
    version: str
    description: str


@dataclass(frozen=True, slots=True)
class Environment:
    """The folders that contain the documentation."""

    packages: tuple[Path, ...]
    stdlib: Path | None

    @classmethod
    def running(cls) -> Environment:
        """Returns the environment of this interpreter. Further folders on `sys.path` do not belong to it."""
        paths = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
        return cls(tuple(dict.fromkeys(paths)), Path(sysconfig.get_path("stdlib")))

    def distributions(self) -> list[Distribution]:
        """Returns the installed distributions of `DISTRIBUTIONS`, sorted by name.

        If two share a name, as after an interrupted upgrade, the lower version counts.
        """
        paths = [str(path) for path in self.packages]
        found: dict[str, Distribution] = {}
        for key in DISTRIBUTIONS:
            for installed in importlib.metadata.distributions(name=key, path=paths):
                metadata = message_from_string(installed.read_text("METADATA") or installed.read_text("PKG-INFO") or "")
                version = metadata.get("Version", "")
                if version and (key not in found or version < found[key].version):
                    description = metadata.get("Description") or metadata.get_payload()
                    found[key] = Distribution(key, version, str(description or ""))
        return [found[key] for key in sorted(found)]

    def fingerprint(self) -> str:
        """Returns a hash of everything that determines the collected text."""
        facts = [f"format {FORMAT}", f"python {platform.python_version()}"]
        facts += [f"{distribution.name}=={distribution.version}" for distribution in self.distributions()]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]

    def sources(self) -> list[SourceFile]:
        """Returns the Python files, in an order that does not depend on the file system."""
        found: dict[tuple[str, ...], SourceFile] = {}
        for distribution in self.distributions():
            package = DISTRIBUTIONS[distribution.name]
            for root in self.packages:
                for parts in _python_files(root, package):
                    found.setdefault(parts, SourceFile(str(root.joinpath(*parts)), package, _module_name(parts)))
        ordered = [found[parts] for parts in sorted(found)]
        if self.stdlib is not None:
            ordered += [
                SourceFile(str(self.stdlib.joinpath(*parts)), STANDARD_LIBRARY, _module_name(parts))
                for parts in sorted(_python_files(self.stdlib))
                if parts[0] not in _SKIPPED_OF_STDLIB and not parts[0].startswith(("config-", "_sysconfigdata"))
            ]
        return ordered


def _python_files(root: Path, package: str = "") -> Iterator[tuple[str, ...]]:
    for folder, subfolders, files in os.walk(root / package):
        parts = Path(folder).relative_to(root).parts
        # Folders with a dash or a dot in the name are no packages, but metadata, libraries or other environments.
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and re.fullmatch(r"\w+", name) and "/".join((*parts, name)) not in LEFT_OUT
        ]
        for name in files:
            if name.endswith(".py") and not name.startswith("test_") and name != "conftest.py":
                yield (*parts, name)


def _module_name(parts: Sequence[str]) -> str:
    names = [*parts[:-1], parts[-1].removesuffix(".py")]
    return ".".join(names[:-1] if names[-1] == "__init__" and len(names) > 1 else names)


def read_source(source: SourceFile) -> Reading:
    """Returns the documented entries of a file, in file order, or the reason why the file is skipped."""
    try:
        if os.path.getsize(source.path) > LARGEST_FILE:
            return "larger than 2 MB"
        content = Path(source.path).read_bytes()
    except OSError:
        return "unreadable"
    is_topics = source.package == STANDARD_LIBRARY and source.module == "pydoc_data.topics"
    documented = sum(len(found[1] or found[2] or b"") for found in _DOCSTRINGS.finditer(content))
    if not is_topics and not documented:
        return "no docstring"
    if source.package != STANDARD_LIBRARY and documented < LEAST_SHARE * len(content):
        return "mostly code"
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


def read_all(sources: Sequence[SourceFile]) -> list[Reading]:
    return [read_source(source) for source in sources]


def _topics(tree: ast.Module) -> Iterator[Entry]:
    """Yields the topics of the language reference, which is a dictionary from title to text.

    The longest topics come first, because short topics repeat parts of them.
    """
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="topics")], value=ast.Dict() as literal):
                topics = ast.literal_eval(literal)
                for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
                    yield from (
                        Entry("topic", name, part, None) for part in split_at_paragraphs(prose(clean(topics[name])))
                    )


def _entries(tree: ast.Module) -> Iterator[Entry]:
    if doc := ast.get_docstring(tree, clean=False):
        yield _entry("module", "", clean(doc))
    yield from _documented(tree.body, "")


def _entry(kind: str, name: str, doc: str) -> Entry:
    sentence, text = first_sentence(doc), prose(doc)
    # A docstring of one sentence is no document, because the template-made sources already contain that sentence.
    is_document = (
        len(text) >= SHORTEST and (sentence is None or len(text) > len(sentence) + 40) and is_mostly_words(text)
    )
    return Entry(kind, name, text if is_document else "", sentence)


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
    found = [Parameter(arg.arg, _default(default)) for arg, default in rows]
    if arguments.vararg:
        found.append(Parameter(f"*{arguments.vararg.arg}", None))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [Parameter(arg.arg, _default(default)) for arg, default in keywords]
    if arguments.kwarg:
        found.append(Parameter(f"**{arguments.kwarg.arg}", None))
    return tuple(found)


def _default(node: ast.expr | None) -> str | None:
    return None if node is None else _short(node) or UNREADABLE


def _short(node: ast.expr | None) -> str | None:
    """Returns the source code of an expression, or None if it is unsuitable inside a sentence."""
    text = "" if node is None else ast.unparse(node)
    return text if 0 < len(text) <= 40 and "`" not in text and not SPECIAL.search(text) else None


def _added(call: ast.Call, name: str | None) -> Iterator[Entry]:
    """Yields documentation of C functions, from `add_docstr(torch.abs, ...)` of torch or `add_newdoc("numpy", ...)`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if not function.endswith(("add_docstr", "add_newdoc")) or len(call.args) < 2:
        return
    strings = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    doc = max(strings, key=len, default="")
    if name is None and isinstance(call.args[0], ast.Constant):
        name = ".".join(text for text in strings[1:] if text.isidentifier())
    if any(isinstance(node, ast.Attribute) and node.attr == "format" for node in ast.walk(call)):
        # Format fields insert paragraphs about parameters that many functions share.
        doc = re.sub(r"(?m)^[ \t]*\{\w+\}[ \t]*$", "", doc).replace("{{", "{").replace("}}", "}")
    if doc := clean(doc):
        yield _entry("function", name or ast.unparse(call.args[0]), doc)


# --- Text ---------------------------------------------------------------------------------------------------------


def split_at_paragraphs(text: str) -> list[str]:
    """Splits a long text between paragraphs into parts of at most `USUAL_LONGEST` characters.

    A longer paragraph is a part of its own.
    """
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        if parts and len(parts[-1]) + len(paragraph) + 2 <= USUAL_LONGEST:
            parts[-1] += f"\n\n{paragraph}"
        else:
            parts.append(paragraph)
    return parts


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


def first_sentence(doc: str) -> str | None:
    """Returns the first sentence of a docstring without markup, or None if it cannot stand alone."""
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
        end = SENTENCE_END.search(text)
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
        and is_mostly_words(sentence)
    )


def predicate(sentence: str) -> str | None:
    """Returns the predicate of a sentence, to follow a name: "Return the mean." → "returns the mean"."""
    first, _, rest = sentence.partition(" ")
    verb = _PREDICATES.get(first.lower())
    return f"{verb} {rest[:-1]}" if verb and sentence.endswith(".") else None


# --- Documents ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CollectedDocument:
    text: str
    package: str
    origin: str  # path of the entry, without the package


class Seen:
    """Detects repeated texts: a text that was seen before, or a text with mostly sentences that were seen before.

    Packages copy from each other and from themselves, with small changes of names or numbers. Only sentences of at
    least 30 characters are compared, because short sentences often repeat by chance.
    """

    def __init__(self) -> None:
        self._docs: set[bytes] = set()
        self._sentences: set[bytes] = set()
        self.exact = self.near = 0

    def repeats(self, doc: str) -> bool:
        """Returns whether the text repeats earlier texts. If not, remembers the text."""
        if (key := digest(doc)) in self._docs:
            self.exact += 1
            return True
        self._docs.add(key)
        sentences = [
            (len(part), digest(part)) for line in doc.split("\n") for part in line.split(". ") if len(part) >= 30
        ]
        known = sum(length for length, sentence in sentences if sentence in self._sentences)
        if 2 * known > sum(length for length, _ in sentences):
            self.near += 1
            return True
        self._sentences.update(sentence for _, sentence in sentences)
        return False


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def role_of(module: Module) -> str:
    """Returns the source that a module's docstrings belong to: "wiki", "academic" or "web"."""
    if module.package == STANDARD_LIBRARY:
        return "wiki"
    dotted = f"{module.name}."
    return "academic" if any(dotted.startswith(f"{name}.") for name in ACADEMIC) else "web"


def collected_documents(module: Module, seen: Seen) -> Iterator[CollectedDocument]:
    """Yields a module's documents: one for each class with its methods, and one for each run of other docstrings.

    Each docstring has a heading, such as "The function mean". A document that would exceed the usual length continues
    in another document.
    """
    group, blocks, origin = "", [""], ""
    for entry in module.entries:
        if not entry.doc or seen.repeats(entry.doc):
            continue
        if module.topics:
            yield CollectedDocument(entry.doc, module.package, f"{module.name}.{entry.name}")
            continue
        own_group = entry.name if entry.kind == "class" else ""
        if entry.kind in ("method", "property"):
            own_group = entry.name.rpartition(".")[0]
        name = entry.name.rpartition(".")[2]
        block = entry.doc if entry.kind in ("class", "module") else f"The {entry.kind} {name}\n\n{entry.doc}"
        length = sum(len(part) + 2 for part in blocks)
        if not blocks[0] or own_group != group or length + len(block) > USUAL_LONGEST:
            if blocks[0]:
                yield CollectedDocument("\n\n".join(blocks), module.package, origin)
            group = own_group
            title = f"The class {own_group} of {module.name}" if own_group else f"The module {module.name}"
            blocks, origin = [title, block], f"{module.name}.{entry.name}".rstrip(".")
        else:
            blocks.append(block)
    if blocks[0]:
        yield CollectedDocument("\n\n".join(blocks), module.package, origin)


def readmes(environment: Environment) -> Iterator[CollectedDocument]:
    """Yields parts of the distributions' long descriptions."""
    for distribution in environment.distributions():
        for part in split_at_paragraphs(readme_prose(distribution.description)):
            if len(part) >= SHORTEST and is_mostly_words(part):
                yield CollectedDocument(part, DISTRIBUTIONS[distribution.name], "README")
