"""The tokenizer of a model, and the tokenizer that a name stands for. All that a data module needs of the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.checkpoints.files import is_sharded
from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.weights.names import SMOLLM2, Located, locate, smollm2_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from lightning_danube.tokens.tokenizer import DocumentTokenizer


def tokenizer_of(name: str) -> tuple[str, PreTrainedTokenizerFast]:
    """The name and the tokenizer that `data.tokenizer` stands for.

    Args:
        name: "mistral", "danube3-chat", "danube-small", a directory, a hub id, or a model: a run, a checkpoint, a GGUF
            file or "smollm2". For a run, the returned name is that of the tokenizer it was trained with.

    Raises:
        ValueError: no tokenizer has this name.
    """
    from lightning_danube.tokens.tokenizer import load_hf_tokenizer

    if not _is_model(name):
        return name, load_hf_tokenizer(name)
    model = locate(name)
    tokenizer = load_tokenizer(model)
    assert model.tokenizer is not None
    return model.tokenizer.name if model.kind == "checkpoint" else name, tokenizer


def document_tokenizer(name: str, new_tokens: Sequence[str] = ()) -> DocumentTokenizer:
    """The tokenizer for pre-training that `data.tokenizer` stands for. The names are those of `tokenizer_of`.

    Args:
        new_tokens: texts that become new tokens.

    Raises:
        ValueError: no tokenizer has this name, it has no token that ends a document, or see `with_new_tokens`.
    """
    from lightning_danube.tokens.tokenizer import DocumentTokenizer, with_new_tokens

    if new_tokens:
        named, tokenizer = tokenizer_of(name)
        return DocumentTokenizer(named, with_new_tokens(tokenizer, name, new_tokens))
    return DocumentTokenizer(*tokenizer_of(name)) if _is_model(name) else DocumentTokenizer(name)


def _is_model(name: str) -> bool:
    """Returns whether a name means a run, a checkpoint or a GGUF file, not a directory of tokenizer files."""
    path = Path(name).expanduser()
    return name == SMOLLM2 or path.is_file() or is_sharded(path) or newest_checkpoint(path) is not None


def not_tuned_for_chat(model: Located, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A sentence that warns of a model that no run tuned for chat; None for a chat model.

    A checkpoint says with which chat template it was tuned. For files of other programs, a chat template of the
    tokenizer is the only sign.
    """
    template = tokenizer.chat_template
    if model.kind == "checkpoint":
        template = None if model.tokenizer is None else model.tokenizer.chat_template
    if template:
        return None
    return (
        f"{model.typed} was not tuned for chat, so it may not answer the question: fine-tune it first, or leave out "
        "--chat to continue the text"
    )


def load_tokenizer(model: Located) -> PreTrainedTokenizerFast:
    """The tokenizer of a model.

    Raises:
        ValueError: the checkpoint names no tokenizer, or the tokenizer of that name is another one now.
    """
    from lightning_danube.tokens.tokenizer import beginning_texts, fingerprint_of, load_hf_tokenizer, with_new_tokens
    from lightning_danube.weights.gguf.tokenizer import load_gguf_tokenizer

    source = model.tokenizer
    if source is None:
        raise ValueError(f"{model.path}: it does not say with which tokenizer it was trained")
    file = smollm2_file() if source.name == SMOLLM2 else Path(source.name).expanduser()
    tokenizer = load_gguf_tokenizer(file) if file.is_file() else load_hf_tokenizer(source.name)
    if source.new_tokens:
        tokenizer = with_new_tokens(tokenizer, source.name, source.new_tokens)
    if source.fingerprint not in (None, fingerprint_of(tokenizer)):
        # A run of an earlier version put every bos token that a tokenizer names before texts. Its fingerprint says so.
        beginning = beginning_texts(tokenizer)
        tokenizer = beginning if source.fingerprint == fingerprint_of(beginning) else tokenizer
    if source.fingerprint not in (None, fingerprint_of(tokenizer)):
        raise ValueError(
            f"{model.path}: the tokenizer {source.name!r} is not the one it was trained with (fingerprint "
            f"{fingerprint_of(tokenizer)}, not {source.fingerprint}): bring that one back under its name"
        )
    if tokenizer.chat_template is None and source.chat_template:
        # A copy, because `load_hf_tokenizer` returns the same object to models that were not tuned for chat.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = source.chat_template
    return tokenizer
