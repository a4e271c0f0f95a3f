"""What a pre-training run takes over from trained weights: the decoder's shape, its tokens, its longest context."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_danube.model.config import DecoderConfig, DecoderShape
from lightning_danube.tokens.tokenizer import tokens_beyond
from lightning_danube.weights.shapes import shape_of
from lightning_danube.weights.tokenizers import tokenizer_of

if TYPE_CHECKING:
    from lightning_danube.model import Decoder
    from lightning_danube.tokens.tokenizer import DocumentTokenizer

NOT_IN_WEIGHTS = ("initializer_range", "attention_dropout")
"""Fields of a stated shape that say nothing about trained weights."""


@dataclass(frozen=True)
class ContinuedWeights:
    """The decoder that continues trained weights.

    Args:
        config: the weights' config, with room for the new tokens and for the data's context.
        pieces: id of a new token → ids of the pieces into which the weights' own tokenizer cuts its text.
    """

    config: DecoderConfig
    pieces: dict[int, list[int]]

    @classmethod
    def of(
        cls, weights: str, stated: DecoderShape | None, tokenizer: DocumentTokenizer | None, context_length: int
    ) -> ContinuedWeights:
        """Reads the shape and the tokenizer of the weights, not the weights.

        Args:
            stated: the shape that the configuration states beside the weights.
            tokenizer: the data's tokenizer; None: that of the weights.

        Raises:
            ValueError: the weights have another shape or another tokenizer, or their rotary base does not support the
                context.
        """
        own = shape_of(weights)
        if stated is not None:
            _check_shape(weights, own, stated)
        length = max(own.max_position_embeddings, _checked_context(weights, own, context_length))
        pieces = {} if tokenizer is None else _pieces(weights, tokenizer)
        vocabulary = max([own.vocab_size, *(token + 1 for token in pieces)])
        return cls(dataclasses.replace(own, vocab_size=vocabulary, max_position_embeddings=length), pieces)

    def apply(self, decoder: Decoder) -> None:
        """Gives the decoder of the weights the new tokens and the longest context, in place."""
        from lightning_danube.weights.new_tokens import grow_vocabulary, set_rows

        grow_vocabulary(decoder, self.config.vocab_size)
        set_rows(decoder, self.pieces)
        decoder.config = self.config


def _check_shape(weights: str, own: DecoderConfig, stated: DecoderShape) -> None:
    names = [field.name for field in dataclasses.fields(DecoderShape) if field.name not in NOT_IN_WEIGHTS]
    different = [
        f"{name} {getattr(stated, name)} (there {getattr(own, name)})"
        for name in names
        if getattr(stated, name) != getattr(own, name)
    ]
    if different:
        raise ValueError(
            f"model.decoder is not the shape of {weights}: {', '.join(different)}: leave it out (null), because the "
            "weights say it"
        )


def _checked_context(weights: str, own: DecoderConfig, context_length: int) -> int:
    most = own.max_position_embeddings
    if context_length <= most:
        return context_length
    from lightning_danube.model.attention import longest_context

    assert own.head_dim is not None  # resolved by the config
    reach = longest_context(own.head_dim, own.rope_theta, own.rope_scaling)
    # With a window, no token sees another one that is further away than the window.
    if min(context_length, own.sliding_window or context_length) <= reach:
        return context_length
    raise ValueError(
        f"data.context_length is {context_length:,}, the model of {weights} was made for {most:,}, and its rotary base "
        f"({own.rope_theta:,.0f}) does not support more than {max(most, reach):,}: lower it"
    )


def _pieces(weights: str, tokenizer: DocumentTokenizer) -> dict[int, list[int]]:
    _, own = tokenizer_of(weights)
    beyond = tokens_beyond(own, tokenizer.hf)
    if beyond is None:
        raise ValueError(
            f"data.tokenizer {tokenizer.name!r} gives other ids than the tokenizer of {weights}: leave it out, or name "
            f"{weights} there"
        )
    texts = {token: str(tokenizer.hf.convert_ids_to_tokens(token)) for token in beyond}
    return {token: own.backend_tokenizer.encode(text, add_special_tokens=False).ids for token, text in texts.items()}
