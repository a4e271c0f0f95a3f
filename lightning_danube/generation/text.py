"""Generation of text: decodes token streams piece by piece, and ends them at stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_danube.generation.token_stream import TokenStream, tokens_on_host
from lightning_danube.tokens.tokenizer import begin_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text to continue.

    They begin as documents do in training: with the token that the tokenizer puts before texts, if there is one. Text
    that spells a special token becomes that token.
    """
    begin = begin_token(tokenizer)
    head = [] if begin is None else [begin]
    return [*head, *tokenizer(text, add_special_tokens=False).input_ids]


def special_stops(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[int]:
    """The ids of those stop strings that are special tokens.

    Raises:
        ValueError: a stop string holds a special token beside other text, which no text of an answer holds.
    """
    special = {str(token): int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    for string in stop:
        if string not in special and (inside := [token for token in special if token in string]):
            raise ValueError(
                f"the stop text {string!r} holds the special token {inside[0]!r}, and a special token is not text: "
                "give the token alone"
            )
    return [special[string] for string in stop if string in special]


class TextGeneration:
    """Continues a batch of prompts as text.

    Iteration yields (row, piece) as soon as a piece of text cannot change any more. `rows` holds each row's text so
    far.

    Args:
        prompts: token ids of each row.
        eos_ids: tokens that end a row.
        stop: strings that end a row; they do not become part of its text. A string may be a special token, which is not
            in the text.
        options: those of `TokenStream`.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        eos_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        **options: Any,
    ) -> None:
        stop_ids = special_stops(tokenizer, stop)
        self.tokens = TokenStream(decoder, prompts, max_new_tokens, eos_ids=[*eos_ids, *stop_ids], **options)
        self.rows = [Continuation(tokenizer, prompt, eos_ids, stop, stop_ids) for prompt in prompts]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for ids in tokens_on_host(self.tokens):
            for row, (token, continuation) in enumerate(zip(ids, self.rows, strict=True)):
                if continuation.finish_reason is None:
                    piece = continuation.add(token)
                    if continuation.finish_reason is not None:
                        self.tokens.finish(row)
                    if piece:
                        yield row, piece
            if all(continuation.finish_reason is not None for continuation in self.rows):
                break
        for row, continuation in enumerate(self.rows):
            if continuation.finish_reason is None and (piece := continuation.end("length")):
                yield row, piece


class Continuation:
    """The text of one row, decoded as its tokens arrive.

    `text` may be shown: it never ends with what can still become part of a stop string or of a character.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        eos_ids: Sequence[int],
        stop: Sequence[str],
        stop_ids: Sequence[int] = (),
    ) -> None:
        assert all(stop), "an empty string stops nothing"
        self.eos_ids, self.stop, self.stop_ids = frozenset(eos_ids), stop, frozenset(stop_ids)
        self.text = ""
        self.tokens = 0
        """The number of tokens, including the one that ended the text."""
        self.finish_reason: str | None = None
        """`eos`: a token that ends texts; `stop`: a stop string, or a special token named as one; `length`: the most
        tokens were reached."""
        self._decode = tokenizer.backend_tokenizer.decode
        # The tokens of the last certain piece, then the tokens after it. The earlier ones are kept because the text of
        # a token depends on the token before it. The prompt counts as the first certain piece.
        self._ids, self._certain = list(prompt), len(prompt)
        self._held = ""

    def add(self, token: int) -> str:
        """Adds the next token, and returns the text that is certain now and was not before."""
        self.tokens += 1
        if token in self.eos_ids:
            return self.end("eos")
        if token in self.stop_ids:
            return self.end("stop")
        self._ids.append(token)
        return self._show(self._decoded(whole=False))

    def end(self, reason: str) -> str:
        """Ends the text here, and returns what was held back."""
        shown = self._show(self._decoded(whole=True))
        if self.finish_reason is None:
            self.finish_reason, self.text = reason, self.text + self._held
            shown, self._held = shown + self._held, ""
        return shown

    def _decoded(self, whole: bool) -> str:
        """The text of the tokens since the last piece, or "" while it may end within a character.

        A character of several tokens decodes to U+FFFD until its last token is there. Bytes that never become a
        character stay U+FFFD, and become certain with the next text or at the end.
        """
        before = self._decode(self._ids[: self._certain], skip_special_tokens=True)
        now = self._decode(self._ids, skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not whole):
            return ""
        self._ids, self._certain = self._ids[self._certain :], len(self._ids) - self._certain
        return now[len(before) :]

    def _show(self, piece: str) -> str:
        """Returns a piece up to a stop string, and holds back the end of it that may begin a stop string."""
        waiting = self._held + piece
        places = [place for string in self.stop if (place := waiting.find(string)) >= 0]
        if places:
            self.finish_reason, self._held, shown = "stop", "", waiting[: min(places)]
        else:
            cut = len(waiting) - max((length_of_begun_stop(waiting, string) for string in self.stop), default=0)
            shown, self._held = waiting[:cut], waiting[cut:]
        self.text += shown
        return shown


def length_of_begun_stop(text: str, string: str) -> int:
    """The length of the longest end of `text` that begins `string`, and is shorter than `string`."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
