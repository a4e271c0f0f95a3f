"""Reads and writes tokenizers in GGUF files, with equal ids here and in llama.cpp.

llama.cpp implements two kinds of tokenizers. "llama" is SentencePiece's BPE, driven by a score per piece. "gpt2" is
byte-level BPE, driven by a list of merges, after a split of the text into words. The file holds only the name of the
split; its definition is only in llama.cpp's source.

A file states in `add_bos_token` whether texts begin with the bos token. Where that is false, the token is only named,
and a chat template may still write it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_danube.tokens.chat_template import ChatEncoder
from lightning_danube.tokens.tokenizer import (
    BEGINS_TEXTS,
    SIZE_OF_A_TOKEN,
    begin_token,
    check_room_for_tokenizer,
    sentencepiece_backend,
    set_model_ends,
)
from lightning_danube.tokens.word_splits import WORD_SPLITS, WordSplit
from lightning_danube.weights.gguf.header import read_gguf_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

KEY = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
# llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# This project's names of special tokens → GGUF's keys that hold their ids.
SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # the format's own spelling
    "mask_token": "mask_token_id",
}
# llama.cpp also ends a text at the end of a turn and at a call of a tool.
END_IDS = ("eot_token_id", "eom_token_id")
# Runs of up to this many equal characters are compared when merges are in another order than SentencePiece's.
LONGEST_COMPARED_RUN = 100
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


# A text that distinguishes the word splits: it contains everything that two splits treat differently.
PROBE = (
    "Hello I've told HE'S, y'all'Ll  two   spaces\n\nnew \n line\r\n\ttab 3 33 333 3333 33333 3.3 a1b22 caf\u00e9 "
    "cafe\u0301 camelCase XMLFile 我想在apple工作1314151天～ កាន់តែ нещо на Български \U0001f469\u200d\U0001f467 ?! "
    "...\n//\n/ ''' \u00a0x ₂½Ⅷ "
)
# A text that shows SentencePiece's treatment of prefix and spaces. No space at its start: see gguf_tokenizer_fields.
SENTENCEPIECE_PROBE = "a b  c\td\n e"


def load_gguf_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads the tokenizer in a GGUF file, with its special tokens, chat template, and the model's context length.

    Raises:
        ValueError: the file has no tokenizer, or a tokenizer of an unknown kind.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    header = read_gguf_header(path)
    fields = header.fields
    tokens, types = _tokens(fields, header.path)
    kind = fields[f"{KEY}model"]
    if kind == "llama":
        backend = _sentencepiece(fields, tokens, types, header.path)
    elif kind == "gpt2":
        backend = _byte_level(fields, tokens, header.path)
    else:
        raise ValueError(f"{header.path}: its tokenizer is of the kind {kind!r}; only 'llama' and 'gpt2' can be loaded")
    apart = [index for index, token_type in enumerate(types) if token_type in (CONTROL, UNKNOWN, USER_DEFINED)]
    backend.add_tokens(
        [AddedToken(tokens[index], normalized=False, special=types[index] != USER_DEFINED) for index in apart]
    )
    special: dict[str, str | None] = {}
    for name, key in SPECIAL_IDS.items():
        index = fields.get(KEY + key)
        # Some files have ids beyond the vocabulary. llama.cpp ignores them, too.
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[name] = tokens[index]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=fields.get(f"{fields.get('general.architecture')}.context_length"),
        **{BEGINS_TEXTS: _adds_bos(fields, kind)},
        **special,
    )
    set_model_ends(tokenizer, [fields.get(KEY + key) for key in END_IDS])
    template = fields.get(CHAT_TEMPLATE)
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def gguf_tokenizer_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Returns the fields of a tokenizer in a GGUF file.

    A SentencePiece tokenizer's treatment of leading spaces is not stored. llama.cpp treats them as SentencePiece does,
    and transformers often treats them differently for such vocabularies.

    Raises:
        ValueError: no tokenizer of llama.cpp gives equal ids.
    """
    backend = tokenizer.backend_tokenizer
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if (
        model["type"] != "BPE"
        or model["continuing_subword_prefix"]
        or model["end_of_word_suffix"]
        or model["dropout"]
        or (model["byte_fallback"] and model["ignore_merges"])
    ):
        raise ValueError("the tokenizer is not plain BPE, which is all that a GGUF file can hold here")
    tokens = _tokens_by_id(backend)
    added = {token["id"]: token for token in parts["added_tokens"]}
    for token in added.values():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(
                f"the token {token['content']!r} includes the spaces around it, which llama.cpp does not do"
            )
    types = [_type(index, token, added, model, tokenizer.unk_token_id) for index, token in enumerate(tokens)]
    fields: dict[str, Any] = {}
    if model["byte_fallback"]:
        add_space_prefix = _adds_space_prefix(backend)
        fields[f"{KEY}model"], fields[f"{KEY}pre"] = "llama", "default"
        fields[f"{KEY}scores"] = _scores(tokens, types, [tuple(pair) for pair in model["merges"]])
    else:
        add_space_prefix = False
        fields[f"{KEY}model"], fields[f"{KEY}pre"] = "gpt2", _word_split(backend, model).names[0]
        fields[f"{KEY}merges"] = [" ".join(pair) for pair in model["merges"]]
    fields[f"{KEY}tokens"], fields[f"{KEY}token_type"] = tokens, types
    for name, key in SPECIAL_IDS.items():
        index = getattr(tokenizer, f"{name}_id")
        if index is not None:
            fields[KEY + key] = int(index)
    turn_end = None if tokenizer.chat_template is None else ChatEncoder(tokenizer).turn_end()
    if turn_end not in (None, tokenizer.eos_token_id):
        fields[f"{KEY}eot_token_id"] = turn_end
    fields[f"{KEY}add_space_prefix"] = add_space_prefix
    fields[f"{KEY}add_bos_token"] = begin_token(tokenizer) is not None
    # Documents end with eos in training, but a prompt must not.
    fields[f"{KEY}add_eos_token"] = False
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        fields[CHAT_TEMPLATE] = template
    return fields


def _tokens(fields: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    """Returns all tokens and their types by id, without the fillers at the end that only match the embedding's size."""
    if fields.get(f"{KEY}model", "none") in ("none", "no_vocab"):
        raise ValueError(f"{path}: holds no tokenizer; name one")
    tokens = _list(fields, "tokens", str, path)
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: the token {repeated[0]!r} appears twice")
    types = (
        _list(fields, "token_type", int, path, len(tokens)) if f"{KEY}token_type" in fields else [NORMAL] * len(tokens)
    )
    count = len(tokens)
    while count > 1 and types[count - 1] == UNUSED:
        count -= 1
    return tokens[:count], types[:count]


def _list(fields: Mapping[str, Any], key: str, kind: type, path: Path, count: int | None = None) -> list[Any]:
    value = fields.get(KEY + key)
    if not isinstance(value, list | array) or not value or not isinstance(value[0], kind):
        raise ValueError(f"{path}: {KEY}{key} is not a list of type {kind.__name__}")
    if count is not None and len(value) != count:
        raise ValueError(f"{path}: {KEY}{key} has {len(value)} values for {count} tokens")
    return list(value)


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], types: list[int], path: Path) -> Tokenizer:
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN]
    return sentencepiece_backend(
        {token: index for index, token in enumerate(tokens)},
        _list(fields, "scores", float, path, len(fields[f"{KEY}tokens"])),
        unknown=unknown[0] if unknown else None,
        add_space_prefix=bool(fields.get(f"{KEY}add_space_prefix", True)),
        never_merged=[token for token, kind in zip(tokens, types, strict=True) if kind != NORMAL],
    )


def _byte_level(fields: Mapping[str, Any], tokens: list[str], path: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    check_room_for_tokenizer(SIZE_OF_A_TOKEN * len(tokens))
    split = _named_split(fields, path)
    merges = _list(fields, "merges", str, path)
    # The two parts of a pair are separated by the first space after the first character.
    pairs = [(merge[: merge.find(" ", 1)], merge[merge.find(" ", 1) + 1 :]) for merge in merges if " " in merge[1:]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for left, right in pairs:
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(f"{path}: {KEY}merges joins {left!r} and {right!r}, which are not all tokens")
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def _named_split(fields: Mapping[str, Any], path: Path) -> WordSplit:
    name = fields.get(f"{KEY}pre")
    for split in WORD_SPLITS:
        if name in split.names:
            return split
    known = ", ".join(split.names[0] for split in WORD_SPLITS)
    raise ValueError(f"{path}: {KEY}pre is {name!r}, a split into words that is not known here; known are {known}")


def _adds_bos(fields: Mapping[str, Any], kind: str) -> bool:
    default = kind == "llama" or any(split.add_bos for split in WORD_SPLITS if fields.get(f"{KEY}pre") in split.names)
    return bool(fields.get(f"{KEY}add_bos_token", default))


def _tokens_by_id(backend: Tokenizer) -> list[str]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    by_id = {index: token for token, index in vocabulary.items()}
    # A reduced vocabulary has ids without a token. llama.cpp needs a unique text for each id.
    return [by_id.get(index, f"[PAD{index}]") for index in range(max(by_id) + 1)]


def _type(
    index: int, token: str, added: Mapping[int, Mapping[str, Any]], model: Mapping[str, Any], unknown: int | None
) -> int:
    if index in added:
        if not added[index]["special"]:
            return USER_DEFINED
        return UNKNOWN if index == unknown and model["byte_fallback"] else CONTROL
    if token not in model["vocab"]:
        return UNUSED
    return BYTE if model["byte_fallback"] and BYTE_PIECE.fullmatch(token) else NORMAL


def _adds_space_prefix(backend: Tokenizer) -> bool:
    """Returns whether a SentencePiece tokenizer puts a space before a text, from its result on a sample text."""
    text = backend.normalizer.normalize_str(SENTENCEPIECE_PROBE) if backend.normalizer else SENTENCEPIECE_PROBE
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    plain = SENTENCEPIECE_PROBE.replace(" ", "▁")
    if words == [plain] or words == ["▁" + plain]:
        return words != [plain]
    raise ValueError("the tokenizer changes texts in other ways than SentencePiece with spaces as '▁' does")


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Returns a score per piece with which llama.cpp merges in the order of the list.

    llama.cpp prefers the merged piece with the highest score, whatever its two parts are, and at equal scores the
    leftmost. llama.cpp's own converter writes -1000 for every piece in this case, and so gets other ids.
    """
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs, ranks = set(merges), dict[str, int]()
    mixed = set[str]()
    previous = None
    for left, right in merges:
        piece = left + right
        if piece != previous and piece in ranks:
            mixed.add(piece)
        ranks.setdefault(piece, len(ranks))
        previous = piece
    if mixed:
        _check_mixed_merges(mixed, merges, ranks)
    for piece in pieces:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair[0] in pieces and pair[1] in pieces and pair not in pairs:
                raise ValueError(
                    f"the tokenizer never merges {pair[0]!r} and {pair[1]!r}, as no SentencePiece model does: "
                    "llama.cpp would merge them"
                )
    # Pieces that no merge produces need no score. Pieces of the alphabet come after all others, as in SentencePiece.
    rest = iter(range(len(ranks), len(ranks) + len(tokens)))
    return [
        0.0 if kind != NORMAL else float(-(ranks[token] if token in ranks else next(rest)))
        for token, kind in zip(tokens, types, strict=True)
    ]


def _check_mixed_merges(mixed: set[str], merges: Sequence[tuple[str, ...]], ranks: Mapping[str, int]) -> None:
    """Checks that pieces whose merges are not consecutive in the list are still merged as llama.cpp merges them.

    SentencePiece gives one score to all pieces of several spaces, and converters put merges of equal scores in
    different orders. If such pieces repeat one character and merge after all others, a text's ids depend on the order
    only within a run of this character, and all runs can be tried.

    Raises:
        ValueError: llama.cpp would give other ids.
    """
    named = min(mixed)
    letter = named[0]
    first = min(place for place, pair in enumerate(merges) if "".join(pair) in mixed)
    last = merges[first:]
    repeated = all(set(left + right) == {letter} for left, right in last)
    joined = {part for pair in merges[:first] for part in pair} & {left + right for left, right in last}
    if repeated and not joined:
        by_rank = {pair: rank for rank, pair in enumerate(last)}
        runs = range(2, LONGEST_COMPARED_RUN + 1)
        if all(
            _merged(letter, count, by_rank.get) == _merged(letter, count, lambda pair: ranks.get("".join(pair)))
            for count in runs
        ):
            return
    raise ValueError(
        f"the tokenizer's merges into {named!r} are not all of one rank: llama.cpp would merge differently"
    )


def _merged(letter: str, count: int, rank: Callable[[tuple[str, ...]], int | None]) -> list[str]:
    """Returns the pieces of a run of one character, if the pair of the lowest rank merges first, the leftmost of equal
    pairs before the others."""
    pieces = [letter] * count
    while True:
        ranked = [(found, at) for at, pair in enumerate(pairwise(pieces)) if (found := rank(pair)) is not None]
        if not ranked:
            return pieces
        at = min(ranked)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def _word_split(backend: Tokenizer, model: Mapping[str, Any]) -> WordSplit:
    """Returns the word split of a byte-level tokenizer, from its result on a text that all splits treat differently."""
    if backend.normalizer is not None:
        raise ValueError("the tokenizer normalizes texts before it cuts them into words, which llama.cpp does not do")
    if backend.pre_tokenizer is not None:
        words = backend.pre_tokenizer.pre_tokenize_str(PROBE)
        for split in WORD_SPLITS:
            if words == split.pre_tokenizer().pre_tokenize_str(PROBE) and split.ignore_merges == model["ignore_merges"]:
                return split
    known = ", ".join(split.names[0] for split in WORD_SPLITS)
    raise ValueError(f"the tokenizer cuts texts into words in a way that a GGUF file cannot name; known are {known}")
