"""Regular expressions by which byte-level tokenizers split a text into words before they merge, by GGUF name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class WordSplit:
    """One way in which byte-level BPE splits a text into words. Merges stay within a word.

    Args:
        names: llama.cpp's names for this split in a GGUF file. An export writes the first name.
        pattern: regular expression for one word, or None for GPT-2's pattern.
        single_digits: whether each digit is split off first.
        ignore_merges: whether a word that is a token is used as that token, whatever the merges say.
        add_bos: whether llama.cpp adds a bos token if the file does not say.
    """

    names: tuple[str, ...]
    pattern: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        from tokenizers import Regex, pre_tokenizers

        steps: list[PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"


_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Only splits for which llama.cpp splits every text like the original tokenizer; "tekken", for example, is inexact.
WORD_SPLITS = (
    WordSplit(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "exaone4", "granite-docling")),
    WordSplit(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        single_digits=True,
    ),
    WordSplit(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
        ignore_merges=True,
        add_bos=True,
    ),
    WordSplit(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo", "solar-open"),
        rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    ),
)
