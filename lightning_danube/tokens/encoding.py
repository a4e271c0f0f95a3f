"""Ids of many texts, as fast as what is installed allows: by `gigatoken` if it is there, else by `tokenizers`.

Both get Hugging Face's description of a tokenizer, and give the same ids. A process of `prepare` with Mistral's
tokenizer, reading and hashing included, makes 2.6 million of them a second with the first, 0.95 with the second.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

_PART_CHARACTERS = 2048
_COMPARED_EVERY = 64


class TextEncoder:
    """Ids of texts by themselves, without a token at either end. Text that spells a special token stays text.

    Args:
        tokenizer_json: the tokenizer.
        in_parts: what `can_encode_in_parts` says of it.
    """

    def __init__(self, tokenizer_json: str, in_parts: bool) -> None:
        from tokenizers import Tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._in_parts = in_parts
        self._fast = gigatoken_encoder(tokenizer_json)
        self._batches = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """
        Raises:
            ValueError: gigatoken's ids are not those of `tokenizers`; the first and each 64th batch are compared.
        """
        if self._fast is None:
            return self._encode_slowly(texts)
        ids = self._fast(texts)
        self._batches += 1
        if self._batches % _COMPARED_EVERY == 1:
            for text, one, other in zip(texts, ids, self._encode_slowly(texts), strict=True):
                if one != other:
                    raise ValueError(
                        f"gigatoken encodes a text that begins with {text[:40]!r} otherwise than tokenizers does: "
                        "pip uninstall gigatoken, and go on without it"
                    )
        return ids

    def _encode_slowly(self, texts: Sequence[str]) -> list[list[int]]:
        """Long texts go to the tokenizer in parts: it merges over a whole text at once, and that takes several times as
        long for a token of a megabyte as for one of a page."""
        parts = [_parts(text) if self._in_parts else [text] for text in texts]
        encodings = iter(self._tokenizer.encode_batch_fast(list(chain.from_iterable(parts)), add_special_tokens=False))
        return [list(chain.from_iterable(next(encodings).ids for _ in own)) for own in parts]


def gigatoken_encoder(tokenizer_json: str) -> Callable[[Sequence[str]], list[list[int]]] | None:
    """The tokenizer by gigatoken, or None: it is not installed, or does not know this kind of tokenizer."""
    try:
        import gigatoken
    except ImportError:
        return None
    description = json.loads(tokenizer_json)
    # It would find special tokens in the text; without them there are none to find.
    description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
    try:
        tokenizer: Any = gigatoken.Tokenizer.from_json(json.dumps(description))
    except Exception:  # it has no class of its own for what it does not support
        return None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer.encode_batch_list(list(texts), parallel=False)
        return ids

    return encode


def can_encode_in_parts(tokenizer_json: str) -> bool:
    """Whether the ids of a text are those of its words one after the other: no piece reaches over the space between
    two words, and each part gets the space before it back from the normalizer, as the beginning of a text does."""
    tokenizer = json.loads(tokenizer_json)
    prepend, replace = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    return (
        tokenizer["model"]["type"] == "BPE"
        and tokenizer["normalizer"] == {"type": "Sequence", "normalizers": [prepend, replace]}
        and tokenizer["pre_tokenizer"] is None
        and all(token["special"] for token in tokenizer["added_tokens"])
        and not any("▁" in piece.lstrip("▁") for piece in tokenizer["model"]["vocab"])
    )


def _parts(text: str) -> list[str]:
    """A text without some of the spaces that follow a word, cut there."""
    parts, at = [], 0
    while len(text) - at > 2 * _PART_CHARACTERS:
        cut = text.find(" ", at + _PART_CHARACTERS)
        while cut >= 0 and text[cut - 1] in " ▁":
            cut = text.find(" ", cut + 1)
        if not 0 <= cut < len(text) - 1:
            break
        parts.append(text[at:cut])
        at = cut + 1
    return [*parts, text[at:]]
