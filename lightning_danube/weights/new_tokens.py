"""Embeddings of tokens that a trained model does not know yet.

A new token begins with the mean of the embeddings of the pieces that the model's own tokenizer cuts its text into. A
head that is not tied to the embedding gets the mean of its own rows. The model then treats the token about as it
treated its pieces, while a random row would add noise to each prediction (Hewitt 2021 compares with the mean of all
rows).

Shapes: V vocabulary, D hidden size, N new tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_danube.model import Decoder

ROWS = "parametrizations.weight.0.rows"
"""Name of the trainable rows in the module of the embedding or of the head."""


def grow_vocabulary(decoder: Decoder, vocab_size: int) -> None:
    """Gives a decoder further tokens, in place. Their rows are 0 until `set_rows`. Does nothing if there is room."""
    missing = vocab_size - decoder.config.vocab_size
    if missing <= 0:
        return
    for layer in _matrices(decoder):
        old_VD = layer.weight
        grown_VD = torch.cat([old_VD.detach(), old_VD.new_zeros(missing, old_VD.shape[1])])
        layer.weight = nn.Parameter(grown_VD, requires_grad=old_VD.requires_grad)
    decoder.model.embed_tokens.num_embeddings = decoder.lm_head.out_features = vocab_size
    decoder.config = dataclasses.replace(decoder.config, vocab_size=vocab_size)
    decoder.tie_weights()


@torch.no_grad()
def set_rows(decoder: Decoder, pieces: Mapping[int, Sequence[int]]) -> None:
    """Sets the rows of new tokens, in place.

    Args:
        pieces: id of a new token → ids of the pieces that its text had until now.
    """
    for layer in _matrices(decoder):
        for token, parts in pieces.items():
            layer.weight[token] = layer.weight[list(parts)].mean(0)


class NewRows(nn.Module):
    """Rows of a frozen matrix that train, as a parametrization: the other rows have no gradients and no moments."""

    def __init__(self, weight_VD: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids_N: Tensor
        self.register_buffer("ids_N", torch.tensor(ids, device=weight_VD.device), persistent=False)
        self.rows = nn.Parameter(weight_VD.detach()[self.ids_N].clone())

    def forward(self, weight_VD: Tensor) -> Tensor:
        return weight_VD.index_copy(0, self.ids_N, self.rows.to(weight_VD.dtype))


def train_rows(decoder: Decoder, ids: Sequence[int]) -> None:
    """Lets some rows of a frozen decoder's embedding and head train, in place. A tied head shares the rows."""
    layers = _matrices(decoder)
    new = [NewRows(layer.weight, ids) for layer in layers]
    if decoder.config.tie_word_embeddings:
        layers, new = [*layers, decoder.lm_head], [*new, *new]
    for layer, rows in zip(layers, new, strict=True):
        parametrize.register_parametrization(layer, "weight", rows)


def trained_rows(decoder: Decoder) -> dict[str, Tensor]:
    """Returns the rows that `train_rows` lets train, (N, D), by the name of their module; nothing without such rows."""
    return {
        name.removesuffix(f".{ROWS}"): parameter
        for name, parameter in decoder.named_parameters()
        if name.endswith(f".{ROWS}")
    }


def trained_ids(decoder: Decoder) -> list[int]:
    """Returns the tokens whose rows train, beside an adapter."""
    rows = [module for module in decoder.modules() if isinstance(module, NewRows)]
    return rows[0].ids_N.tolist() if rows else []


def merge_rows(decoder: Decoder) -> None:
    """Writes the trained rows into the matrices, in place. The decoder is plain again."""
    for layer in (decoder.model.embed_tokens, decoder.lm_head):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    decoder.tie_weights()


def _matrices(decoder: Decoder) -> list[nn.Embedding | nn.Linear]:
    """Returns the embedding, and the head if it has its own weight."""
    embedding, head = decoder.model.embed_tokens, decoder.lm_head
    return [embedding] if decoder.config.tie_word_embeddings else [embedding, head]
