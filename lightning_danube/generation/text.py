"""Generation of text: token streams decoded piece by piece, ended by stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_danube.generation.token_stream import TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.model import Decoder


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text to continue, begun as documents are in training: with the begin token where the tokenizer has one
    of its own. Text that spells a special token becomes one."""
    bos = tokenizer.bos_token_id
    head = [] if bos is None or bos == tokenizer.eos_token_id else [int(bos)]
    return [*head, *tokenizer(text, add_special_tokens=False).input_ids]


class TextGeneration:
    """Continues a batch of prompts as text: iterating gives (row, piece) as soon as a piece is certain, and `rows` what
    has come of each.

    Args:
        prompts: token ids of each row.
        eos_ids: tokens that end a row.
        stop: strings that end a row; they are no part of its text.
        options: those of TokenStream.
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
        self.tokens = TokenStream(decoder, prompts, max_new_tokens, eos_ids=eos_ids, **options)
        self.rows = [Continuation(tokenizer, prompt, eos_ids, stop) for prompt in prompts]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for ids_B in self.tokens:
            for row, (token, continuation) in enumerate(zip(ids_B.tolist(), self.rows, strict=True)):
                if continuation.finish_reason is None:
                    piece = continuation.add(token)
                    if continuation.finish_reason is not None:
                        self.tokens.finish(row)
                    if piece:
                        yield row, piece
        for row, continuation in enumerate(self.rows):
            if continuation.finish_reason is None and (piece := continuation.end("length")):
                yield row, piece


class Continuation:
    """The text of one row, decoded as its tokens come.

    `text` is what may be shown: it never ends with what may yet become part of a stop string or of a character.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], eos_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        assert all(stop), "an empty string stops nothing"
        self.eos_ids, self.stop = frozenset(eos_ids), stop
        self.text = ""
        self.tokens = 0
        """How many came, the one that ended the text included."""
        self.finish_reason: str | None = None
        """`eos`: a token that ends texts; `stop`: a stop string; `length`: all tokens asked for."""
        self._decode = tokenizer.backend_tokenizer.decode
        # Tokens since the last certain piece, after those of that piece: what a token reads as depends on the one
        # before. The first follows the prompt.
        self._ids, self._certain = list(prompt), len(prompt)
        self._held = ""

    def add(self, token: int) -> str:
        """Take the next token; the text that it made certain."""
        self.tokens += 1
        if token in self.eos_ids:
            return self.end("eos")
        self._ids.append(token)
        return self._show(self._decoded(whole=False))

    def end(self, reason: str) -> str:
        """End the text here; what was held back."""
        shown = self._show(self._decoded(whole=True))
        if self.finish_reason is None:
            self.finish_reason, self.text = reason, self.text + self._held
            shown, self._held = shown + self._held, ""
        return shown

    def _decoded(self, whole: bool) -> str:
        """Text of the tokens since the last piece, or "" while it may end within a character.

        A character of several tokens reads as U+FFFD until the last of them is there. Bytes that never become one stay
        so, and turn certain with the next text or at the end.
        """
        before = self._decode(self._ids[: self._certain], skip_special_tokens=True)
        now = self._decode(self._ids, skip_special_tokens=True)
        if len(now) <= len(before) or (now.endswith("\ufffd") and not whole):
            return ""
        self._ids, self._certain = self._ids[self._certain :], len(self._ids) - self._certain
        return now[len(before) :]

    def _show(self, piece: str) -> str:
        """Hold a piece back as far as it may begin a stop string, and give out the rest, up to a stop string."""
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
    """Length of the longest end of `text` that begins `string` and is not all of it."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
