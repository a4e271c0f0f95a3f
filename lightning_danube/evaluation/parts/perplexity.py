"""Perplexity of running text, by source and by position.

Shapes: N rows, B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_danube.evaluation.asking import AskedModel, Part
from lightning_danube.evaluation.results import Measured, columns_of, mean_of
from lightning_danube.inspection.shown import ShownExample, ShownSource, shown_tokens
from lightning_danube.text.corpora import Source, read_documents
from lightning_danube.tokens.tokenizer import document_begin, encode_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_BUCKET = 64
"""End of the first bucket of positions, in tokens; each further bucket ends at twice the previous bucket's end."""


@dataclass(frozen=True)
class RunningText(Part):
    """The part of an evaluation for the running text of one source.

    Documents are concatenated as in training and cut into rows without regard to their ends, so every position has the
    same kind of text.

    Args:
        bytes_of_rows: bytes of each row's text in UTF-8, without the first token, which is not predicted.
    """

    source: str
    ids_NT: NDArray[np.int64]
    bytes_of_rows: list[int]

    @property
    def title(self) -> str:
        return f"perplexity of {self.source}"

    def buckets(self) -> list[tuple[int, int]]:
        """Returns ranges of positions, counted from 0, that share a perplexity: up to 64, up to 128, and so on."""
        return position_buckets(self.ids_NT.shape[1])

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        rows, length = self.ids_NT.shape
        shown = ShownSource(self.title, "rows", "", rows, kept=rows, marks="measured", tokens=rows * length)
        shown.marked_tokens = rows * (length - 1)
        for number, row in enumerate(self.ids_NT[:examples].tolist()):
            measured = [place > 0 for place in range(length)]
            shown.examples.append(ShownExample(f"row {number + 1}", shown_tokens(tokenizer, row, measured)))
        return shown

    def measure(self, model: AskedModel) -> list[Measured]:
        ids_NT = torch.from_numpy(self.ids_NT)
        size = max(1, model.places // ids_NT.shape[1])
        nats: list[Tensor] = []
        with torch.no_grad():
            for ids_BT in ids_NT.split(size):
                nats.append(model.nats(ids_BT.to(model.device)))
                model.progress(self.title, sum(map(len, nats)), len(ids_NT))
        nats_NT = torch.cat(nats)
        mean = mean_of(nats_NT.mean(1).tolist())
        row = Measured(
            "perplexity",
            self.source,
            self.source,
            f"rows of {ids_NT.shape[1]:,} tokens",
            # There is no standard error, because the interval of an exponential is not symmetric.
            mean.map(math.exp),
            percent=False,
        )
        row.more = {
            "tokens": nats_NT.numel(),
            "nats_a_token": columns_of(mean),
            "bits_a_byte": float(nats_NT.sum()) / math.log(2) / sum(self.bytes_of_rows),
            # The loss at a position belongs to the next token: a row's first token is not predicted.
            "by_position": [
                {"first": first, "last": last - 1, "perplexity": math.exp(float(nats_NT[:, first:last].mean()))}
                for first, last in self.buckets()
                if first < nats_NT.shape[1]
            ],
        }
        return [row]


def position_buckets(length: int) -> list[tuple[int, int]]:
    ends = [FIRST_BUCKET]
    while ends[-1] < length:
        ends.append(ends[-1] * 2)
    ends[-1] = length
    return list(zip([0, *ends[:-1]], ends, strict=True))


def text_rows(
    name: str, source: Source, rows: int, length: int, tokenizer: PreTrainedTokenizerBase, cache_dir: Path
) -> RunningText:
    """Returns the first rows of a source.

    Raises:
        ValueError: the source cannot be read, or holds less than one row.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("data.tokenizer has no token that ends a text")
    parts: list[NDArray[np.int64]] = []
    count = 0
    for document in read_documents(name, source, cache_dir):
        (ids,) = encode_documents(
            tokenizer.backend_tokenizer, [document.text], document_begin(tokenizer), int(eos), np.dtype(np.int64)
        )
        parts.append(ids)
        count += len(ids)
        if count >= rows * length:
            break
    found = count // length
    if not found:
        raise ValueError(
            f"data.texts.{name}: {source.path} has {count:,} tokens, less than one row of {length:,}: lower "
            "data.context_length"
        )
    ids_NT = np.concatenate(parts)[: min(rows, found) * length].reshape(-1, length)
    return RunningText(name, ids_NT, [len(str(tokenizer.decode(row[1:].tolist())).encode()) for row in ids_NT])
