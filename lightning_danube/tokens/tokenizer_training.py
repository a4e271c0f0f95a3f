"""Trains a new tokenizer on the texts of a run: byte-level BPE with Danube's special tokens.

Texts are split into words as in Qwen2: a word keeps the space or the mark before it, and each digit is a word.
llama.cpp knows this split by name, so a model with such a tokenizer can be exported to GGUF. All 256 bytes are pieces,
so every text can be encoded.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from lightning_danube.text.corpora import Source, is_streamed, local_files, read_stream
from lightning_danube.text.reading import BadRow, DamagedFile, Document, cut, read_file
from lightning_danube.tokens.chat_template import MARKERS
from lightning_danube.tokens.finished_shards import is_finished
from lightning_danube.tokens.shards import is_held_out
from lightning_danube.tokens.tokenizer import with_danube_tokens
from lightning_danube.tokens.word_splits import WORD_SPLITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", *MARKERS)
"""Special tokens in the order of their ids. The first three have the same ids as in Danube's tokenizer.

The padding token is also id 0.
"""
SMALLEST = len(SPECIAL_TOKENS) + 256
"""Number of pieces of a tokenizer without merges."""
SAMPLE_BYTES = 10**9
"""Bytes of text to learn from, in equal parts of all sources. More text hardly changes the frequent pairs."""
MEASURED_BYTES = 1 << 20
"""Bytes of each source's held-out text that are kept to measure the tokenizer on."""
LONGEST_PIECE = 24
"""Characters. Keeps long lines such as "----------" out of the vocabulary."""
_PASSAGE_BYTES = 1 << 12
_ONE_PASSAGE_IN = 50
_SPLIT = next(split for split in WORD_SPLITS if "qwen2" in split.names)


def train_tokenizer(texts: Iterable[str], pieces: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer with exactly `pieces` pieces. The same texts in any order give the same tokenizer.

    Raises:
        ValueError: `pieces` is too small, or the texts have too few pairs that occur twice.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_pieces(pieces)
    backend = Tokenizer(models.BPE(ignore_merges=_SPLIT.ignore_merges))
    backend.pre_tokenizer = _SPLIT.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        min_frequency=2,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_PIECE,
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found < pieces:
        raise ValueError(
            f"the text gives {found:,} pieces, not {pieces:,}: no other pair of pieces occurs twice in it; give more "
            f"text, or --vocab-size {found}"
        )
    return with_danube_tokens(backend)


def check_pieces(pieces: int) -> None:
    """Checks that a vocabulary has room for the special tokens and the 256 bytes.

    Raises:
        ValueError: it is too small.
    """
    if pieces < SMALLEST:
        raise ValueError(
            f"--vocab-size is {pieces}: the special tokens ({' '.join(SPECIAL_TOKENS)}) and the 256 bytes need "
            f"{SMALLEST}, and each piece of several bytes one more"
        )


@dataclass
class TextSample:
    """The texts that a tokenizer is trained on, streamed once, and some held-out text.

    Args:
        sources: name → source.
        cache_dir: where embedded texts are collected.
        held_out: share of each source's documents that a run holds out. The tokenizer does not learn from the documents
            that the run would hold out. None holds out one passage in 50 of each source instead, which also works for a
            source of one long document.
    """

    sources: Mapping[str, Source]
    cache_dir: Path
    held_out: float | None = None
    learned_bytes: Counter[str] = field(default_factory=Counter)
    skipped_rows: Counter[str] = field(default_factory=Counter)
    measured: dict[str, list[str]] = field(default_factory=dict)
    """Source → held-out texts, filled by `texts`."""

    def texts(self) -> Iterator[str]:
        """Yields the texts to learn from, source after source. Each source gives at most its share of `SAMPLE_BYTES`.

        Raises:
            ValueError: a source cannot be read or has no text to learn from.
        """
        limit = SAMPLE_BYTES // len(self.sources)
        with tqdm(
            desc="Reading text",
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
            file=sys.stderr,
        ) as bar:
            for name, source in self.sources.items():
                for text in self._texts_of(name, source):
                    size = len(text.encode())
                    self.learned_bytes[name] += size
                    bar.update(size)
                    yield text
                    if self.learned_bytes[name] >= limit:
                        break
                if not self.learned_bytes[name]:
                    held_out = ", as all of its documents are held out" if self.measured[name] else ""
                    raise ValueError(f"source {name!r} ({source.path}) holds no text to learn from{held_out}")

    def _texts_of(self, name: str, source: Source) -> Iterator[str]:
        kept = self.measured[name] = []
        kept_bytes = 0
        for text, is_learned in self._dealt(self._documents(name, source)):
            if is_learned:
                yield text
            elif kept_bytes < MEASURED_BYTES:
                kept.append(text)
                kept_bytes += len(text.encode())

    def _dealt(self, documents: Iterator[str]) -> Iterator[tuple[str, bool]]:
        """Yields each text, and whether the tokenizer learns from it."""
        if self.held_out is not None:
            for document in documents:
                yield document, not is_held_out(document, self.held_out)
            return
        passages = (passage for document in documents for passage in cut(document, _PASSAGE_BYTES))
        for number, passage in enumerate(passages, start=1):
            yield passage, number % _ONE_PASSAGE_IN != 0

    def _documents(self, name: str, source: Source) -> Iterator[str]:
        for row in _rows(name, source, self.cache_dir):
            if isinstance(row, Document):
                yield row.text
            elif source.on_bad_row == "skip":
                self.skipped_rows[name] += 1
            else:
                raise DamagedFile(row.message)


def _rows(name: str, source: Source, cache_dir: Path) -> Iterator[Document | BadRow]:
    if source.has_tokens or is_finished(source.path):
        raise ValueError(f"source {name!r}: {source.path} holds token ids, not text: name the texts they were made of")
    if is_streamed(source):
        yield from read_stream(name, source)
        return
    for file in local_files(name, source, cache_dir):
        yield from read_file(file, source.text, source.separator)
