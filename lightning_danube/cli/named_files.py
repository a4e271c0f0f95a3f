"""Looks for the local files that a command line and its configurations name.

This module imports neither PyTorch nor Lightning, so a missing file is refused at once.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from os.path import exists, expanduser

from lightning_danube.checkpoints.runs import check_named
from lightning_danube.cli.command_line import Stated, facts_left_to_weights, place_of_run, texts_of
from lightning_danube.cli.options import Path
from lightning_danube.files import looks_like_path
from lightning_danube.text.corpora import pattern_of
from lightning_danube.text.reading import format_of
from lightning_danube.tokens.hub import hint_for

DATA_VERBS = ("inspect", "prepare", "tokenizer")
"""Verbs that read only the data of a configuration."""


def check_files(stated: Stated, verb: str) -> None:
    """Looks for the local files that a command reads: data, tokenizer, weights, and the checkpoint to begin with.

    A reference such as `${model.init_args.weights}` is followed to the place that states the file. Directories of token
    files, addresses and what may be a hub id are left to the data. So are all files of a class of another
    package, which may make them itself.

    Args:
        verb: a verb of the trainer, or one of DATA_VERBS.

    Raises:
        ValueError: a file is missing. The message names the place that states the file.
    """
    # The text of a mapping that a flag states comes before the texts in it.
    texts = {path: text for path, text in texts_of(stated.tree) if text.lstrip()[:1] not in ("{", "[")}
    for path, text in texts.items():
        place, text = _followed(texts, path, text)
        if "${" in text:
            continue
        if path == ("ckpt_path",) and verb not in DATA_VERBS:
            named = f"{text}{stated.tree.get('runs')}{stated.tree.get('name')}"
            if "://" not in named and "${" not in named:
                check_named(place_of_run(stated.tree), text)
        elif _is_model(stated, path, verb) and looks_like_path(text):
            _check_exists(text, "file or directory", stated.place_and_key(place))
        elif _is_data(texts, path, verb) and _means_a_file(text):
            _check_exists(text, "file", stated.place_and_key(place))


def _means_a_file(text: str) -> bool:
    is_local = looks_like_path(text) or format_of(text)
    return bool(is_local) and "://" not in text


def _check_exists(name: str, kind: str, place: str) -> None:
    path = expanduser(name)
    if not exists(path) and not (glob.has_magic(path) and any(glob.iglob(pattern_of(path), recursive=True))):
        raise ValueError(f"{place}: there is no {kind} {name}{hint_for(name)}")


def _followed(texts: Mapping[Path, str], path: Path, text: str) -> tuple[Path, str]:
    """Returns the path and the text that a reference stands for; for other texts, these themselves."""
    for _ in texts:  # references in a circle end, too
        reference = re.fullmatch(r"\$\{([\w.]+)\}", text)
        target = tuple(key for key in reference[1].split(".") if key != "init_args") if reference else ()
        if target not in texts:
            break
        path, text = target, texts[target]
    return path, text


def _is_model(stated: Stated, path: Path, verb: str) -> bool:
    """Returns whether a key names a tokenizer or weights that a verb reads."""
    if path == ("model", "weights"):
        return verb not in DATA_VERBS or bool(facts_left_to_weights(stated))
    return path == ("data", "tokenizer")


def _is_data(texts: Mapping[Path, str], path: Path, verb: str) -> bool:
    """Returns whether a key names texts that a verb reads."""
    package, dot, _ = texts.get(("data", "class_path"), "").partition(".")
    if dot and package != "lightning_danube":
        return False
    match path:
        case ("data", "sources", name, "path"):
            return re.fullmatch(r"[\w-]{1,100}", name) is not None  # the data refuse other names
        case ("data", "train" | "validation" | "test" | "predict" as role, *inner):
            if inner not in ([], ["path"]):
                return False
            if verb == "predict" and any(other[:2] == ("data", "predict") for other in texts):
                return role == "predict"
            return role != "predict" or verb in DATA_VERBS
        case ("data", "decontaminate", _):
            return verb != "tokenizer"
        case (
            ("data", "text", "path")
            | ("data", "texts", _, "path")
            | ("data", "needle", "haystack", "path")
            | ("data", "mt_bench" | "wildbench", "path" | "references")
            | ("data", "retrieval", "path" | "corpus")
        ):
            return True
    return False
