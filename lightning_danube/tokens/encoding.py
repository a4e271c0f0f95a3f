"""Encodes many texts: with `gigatoken` if it is installed, because it is faster, else with `tokenizers`.

Both read Hugging Face's tokenizer.json and give the same ids. One process of `prepare` with Mistral's tokenizer,
including reading and hashing, makes 2.6 million ids a second with `gigatoken`, and 0.95 million with `tokenizers`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

_PART_CHARACTERS = 2048
_COMPARED_EVERY = 64


class TextEncoder:
    """Encodes texts without bos and eos tokens. Text that spells a special token stays text.

    Args:
        tokenizer_json: content of the tokenizer's tokenizer.json.
        in_parts: the result of `can_encode_in_parts` for this tokenizer.
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
        """Returns the ids of each text.

        Raises:
            ValueError: gigatoken and `tokenizers` give different ids. The first and every 64th batch are compared.
        """
        if self._fast is None:
            return self._encode_slowly(texts)
        ids = self._fast(texts)
        self._batches += 1
        if self._batches % _COMPARED_EVERY == 1:
            for text, one, other in zip(texts, ids, self._encode_slowly(texts), strict=True):
                if one != other:
                    raise ValueError(
                        f"gigatoken encodes a text that begins with {text[:40]!r} differently from tokenizers: "
                        "pip uninstall gigatoken, and continue without it"
                    )
        return ids

    def _encode_slowly(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes with `tokenizers`, long texts in parts.

        The library merges over a whole text at once. Per token, a text of a megabyte takes several times as long as a
        text of a page.
        """
        parts = [_parts(text) if self._in_parts else [text] for text in texts]
        encodings = iter(self._tokenizer.encode_batch_fast(list(chain.from_iterable(parts)), add_special_tokens=False))
        return [list(chain.from_iterable(next(encodings).ids for _ in own)) for own in parts]


def gigatoken_encoder(tokenizer_json: str) -> Callable[[Sequence[str]], list[list[int]]] | None:
    """Returns gigatoken's encoder, or None if gigatoken is not installed or does not support this tokenizer."""
    try:
        import gigatoken
    except ImportError:
        return None
    description = json.loads(tokenizer_json)
    # gigatoken would find special tokens in the text, so they are removed from its description.
    description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
    try:
        tokenizer: Any = gigatoken.Tokenizer.from_json(json.dumps(description))
    except Exception:  # gigatoken has no exception class for unsupported tokenizers
        return None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer.encode_batch_list(list(texts), parallel=False)
        return ids

    return encode


@lru_cache(maxsize=1)
def can_encode_in_parts(tokenizer_json: str) -> bool:
    """Returns whether a text can be cut at spaces and its parts encoded one by one, with the same ids.

    This holds if no piece spans the space between two words. The normalizer gives each part the space before it back,
    as it does at the beginning of a text.
    """
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
    """Cuts a text at some of the spaces that follow a word, and drops these spaces."""
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
