"""Loads tokenizers by name. Four need no hub; any Hugging Face tokenizer can be named, too.

The four are Danube3's tokenizer, that of its chat models, a small tokenizer that comes with this package, and a
tokenizer of the made-up world's words. Danube3's tokenizer has the 32,000 SentencePiece pieces of Mistral v1. That of
its chat models has the same pieces and puts no space before a text.

Danube3's vocabulary file comes with the package `mistral-common`. It is rebuilt here as a fast Hugging Face tokenizer,
because one object then serves training, the export and every tool that reads the export. The rebuilding follows Llama's
own conversion: prepend "▁", replace spaces, merge by piece score, fall back to bytes. The conversion by transformers
5.23 gives other ids for leading or repeated spaces: it prepends nothing before a leading space, and it merges by id
instead of score.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import has_room, is_out_of_memory, looks_like_path, read_json
from lightning_danube.text.embedded.world import WORLD, world_tokenizer
from lightning_danube.tokens.hub import first_line, hint_for

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MISTRAL = "mistral"
DANUBE_CHAT = "danube3-chat"
DANUBE_SMALL = "danube-small"
SMALL_DIRECTORY = Path(__file__).with_name(DANUBE_SMALL)
"""Files of the small tokenizer that comes with this package; docs/tokenizer.md says how they were made."""
FREE_IDS = 1 << 16
"""Ids that a tokenizer may leave free."""
KNOWN_NAMES = f"{DANUBE_SMALL!r}, {MISTRAL!r}, {DANUBE_CHAT!r}"
BEGINS_TEXTS = "bos_begins_texts"
"""The key of tokenizer_config.json of a tokenizer whose bos token this project puts before texts.

Other tokenizers have a bos token before a text only if they add it themselves."""
_MODEL_ENDS = "end_token_ids_of_model"
_NEW_TOKENS = "tokens_added_by_data"


class DocumentTokenizer:
    """Encodes documents for pre-training, and has an identity that shards and checkpoints can check.

    Args:
        name: "danube-small", "mistral", "danube3-chat", "world", a directory with tokenizer files, or a hub id.
        hf: the tokenizer with this name, if it is loaded already.

    Raises:
        ValueError: no tokenizer with this name can be loaded, or it has no token that ends a document.
    """

    def __init__(self, name: str = MISTRAL, hf: PreTrainedTokenizerFast | None = None) -> None:
        self.name = name
        self.new_token_facts = {} if hf is None else new_token_facts(hf)
        self.vocab_size: int
        self.eos_id: int
        self.bos_id: int | None
        if hf is not None:
            self.hf = hf
        elif (own := own_backend(name)) is not None:
            self.vocab_size = own.get_vocab_size()
            self.bos_id, self.eos_id = own.token_to_id("<s>"), _id_of("</s>", own)
            return
        if self.hf.eos_token_id is None:
            raise ValueError(
                f"tokenizer {name!r} has no end-of-sequence token, which ends documents: set eos_token in its files"
            )
        self.vocab_size = len(self.hf)
        self.eos_id = int(self.hf.eos_token_id)
        self.bos_id = document_begin(self.hf)

    @cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The tokenizer of transformers, loaded on first use: importing transformers takes a second."""
        return load_hf_tokenizer(self.name)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest unsigned integer type for the ids."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the ids of a text."""
        # Cached, because serializing 32,000 words takes 50 ms and each checkpoint names its tokenizer.
        own = None if self.new_token_facts else own_backend(self.name)
        if own is not None:  # transformers adds nothing to it
            return _fingerprint(own, self.bos_id, self.eos_id)
        return fingerprint_of(self.hf)

    def encode_documents(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Returns the ids of whole documents: [bos,] text, eos. Text that spells a special token stays text."""
        return encode_documents(self.hf.backend_tokenizer, texts, self.bos_id, self.eos_id, self.dtype)

    def text(self, ids: NDArray[Any]) -> str:
        """Returns the text of ids, (N,), without special tokens."""
        decoded = self.hf.decode(ids, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded

    def identity(self) -> dict[str, Any]:
        """Returns the facts about this tokenizer that are saved beside its ids."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            **self.new_token_facts,
        }


def _id_of(token: str, backend: Tokenizer) -> int:
    number = backend.token_to_id(token)
    assert number is not None
    return number


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that begins a text, or None.

    A bos token that is only named begins nothing: the tokenizer has to add it to a text. This project's own tokenizers
    have a mark instead (`BEGINS_TEXTS`), because this project adds their token.
    """
    bos = tokenizer.bos_token_id
    if tokenizer.init_kwargs.get(BEGINS_TEXTS) or _is_of_an_earlier_version(tokenizer):
        return None if bos is None else int(bos)
    # The empty text would not show whether a token is put before a text or after it.
    whole = list(tokenizer("a").input_ids)
    own = list(tokenizer("a", add_special_tokens=False).input_ids)
    return int(whole[0]) if whole[: len(own)] != own else None


def document_begin(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token that begins a document among others, or None.

    GPT-type tokenizers use one token as bos and eos. Then the end token of one document also begins the next document.
    """
    begin = begin_token(tokenizer)
    return None if begin == tokenizer.eos_token_id else begin


def _is_of_an_earlier_version(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the verb `tokenizer` made a tokenizer before its directories had the mark."""
    first = tokenizer.convert_ids_to_tokens(list(range(min(5, len(tokenizer)))))
    return first == ["<unk>", "<s>", "</s>", "<|prompt|>", "<|answer|>"]


def beginning_texts(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns a copy of a tokenizer whose bos token begins texts, although the tokenizer does not add it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.init_kwargs[BEGINS_TEXTS] = True
    return tokenizer


def adding_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that adds the bos token, if there is one, before a text, as training did.

    In this package, the code that makes a prompt adds the token. Users of an export only call the tokenizer.
    """
    begin = begin_token(tokenizer)
    if begin is None or list(tokenizer("").input_ids)[:1] == [begin]:
        return tokenizer
    return with_bos(tokenizer, adds=True)


def with_bos(tokenizer: PreTrainedTokenizerFast, *, adds: bool) -> PreTrainedTokenizerFast:
    """Returns a copy of a tokenizer that adds its bos token before a text, or does not."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_bos_token = adds  # type: ignore[misc]  # the setter is not defined directly after the property
    return tokenizer


def model_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a text by the files of the tokenizer's model, beside its eos token."""
    ends: list[int] = getattr(tokenizer, _MODEL_ENDS, [])
    return ends


def set_model_ends(tokenizer: PreTrainedTokenizerBase, ends: object) -> None:
    """Notes the tokens that end a text by the files of a model: an id or a list of ids. Unknown ids are left out."""
    listed = ends if isinstance(ends, list) else [ends]
    known = [end for end in listed if isinstance(end, int) and not isinstance(end, bool) and 0 <= end < len(tokenizer)]
    setattr(tokenizer, _MODEL_ENDS, known)


def with_new_tokens(tokenizer: PreTrainedTokenizerFast, name: str, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Returns a copy of a tokenizer that has further tokens, with the ids after its last one.

    A new token is found wherever its text stands, also inside a word, before the text is cut into pieces.

    Raises:
        ValueError: a text is empty, appears twice, is a token already, or would not be decoded to itself.
    """
    from tokenizers import AddedToken

    grown = copy.deepcopy(tokenizer)
    for token in tokens:
        where = f"data.new_tokens: {token!r}"
        if not token:
            raise ValueError("data.new_tokens holds an empty text: remove it")
        if list(tokens).count(token) > 1:
            raise ValueError(f"{where} appears twice: remove one")
        pieces = tokenizer.backend_tokenizer.encode(token, add_special_tokens=False).ids
        if grown.convert_tokens_to_ids(token) not in (None, grown.unk_token_id) or (
            len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id
        ):
            raise ValueError(f"{where} is a token of {name!r} already: leave it out")
        grown.add_tokens([AddedToken(token, normalized=False, special=False)])
        decoded = grown.decode([len(grown) - 1])
        if decoded != token:
            raise ValueError(
                f"{where} would be decoded to {decoded!r} by the tokenizer {name!r}: choose a text without such "
                "characters"
            )
    setattr(grown, _NEW_TOKENS, [*new_tokens_of(tokenizer), *tokens])
    return grown


def new_tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the tokens that `with_new_tokens` has added."""
    tokens: list[str] = getattr(tokenizer, _NEW_TOKENS, [])
    return tokens


def new_token_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """Returns what a checkpoint says of added tokens, nothing if there are none."""
    tokens = new_tokens_of(tokenizer)
    return {"new_tokens": tokens} if tokens else {}


def tokens_beyond(own: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[int] | None:
    """Returns the ids that `other` has beyond those of `own`; None if it gives other ids to the same text."""
    if fingerprint_of(own) == fingerprint_of(other):
        return []
    ends = [(begin_token(one), one.eos_token_id) for one in (own, other)]
    if ends[0] != ends[1] or not _encodes_alike(own.backend_tokenizer, other.backend_tokenizer):
        return None
    known = set(own.get_vocab().values())
    return sorted(index for index in other.get_vocab().values() if index not in known)


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of everything that determines the ids of a text."""
    return _fingerprint(tokenizer.backend_tokenizer, document_begin(tokenizer), tokenizer.eos_token_id)


def _fingerprint(backend: Tokenizer, bos_id: int | None, eos_id: object) -> str:
    digest = hashlib.sha256(backend.to_str().encode())
    digest.update(f"{bos_id}/{eos_id}".encode())
    return digest.hexdigest()[:16]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of an untrusted text, without special tokens. Text that spells a special token stays text."""
    with special_tokens_as_text(tokenizer.backend_tokenizer) as backend:
        return list(backend.encode(text, add_special_tokens=False).ids)


@contextmanager
def special_tokens_as_text(backend: Tokenizer) -> Iterator[Tokenizer]:
    """Lets a tokenizer encode text that spells a special token as any other text."""
    backend.encode_special_tokens = True
    try:
        yield backend
    finally:
        backend.encode_special_tokens = False


def encode_documents(
    backend: Tokenizer, texts: Sequence[str], bos_id: int | None, eos_id: int, dtype: np.dtype[Any]
) -> list[NDArray[Any]]:
    """Returns the ids of whole documents from a tokenizer of `tokenizers`, without loading transformers."""
    with special_tokens_as_text(backend):
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    head = [] if bos_id is None else [bos_id]
    return [np.array([*head, *encoding.ids, eos_id], dtype=dtype) for encoding in encodings]


@lru_cache(maxsize=4)
def load_hf_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Returns the Hugging Face tokenizer with a name.

    Args:
        name: "danube-small", "mistral", "danube3-chat", "world", a directory, or a hub id with or without "@revision".

    Raises:
        ValueError: no tokenizer with this name can be loaded.
    """
    if name in (MISTRAL, DANUBE_CHAT):
        return with_danube_tokens(_mistral_backend(add_space_prefix=name == MISTRAL), model_max_length=8192)
    if name == DANUBE_SMALL:
        return _danube_small()
    if name == WORLD:
        return beginning_texts(world_tokenizer())
    directory = Path(name).expanduser()
    if not directory.is_dir() and looks_like_path(name):
        raise ValueError(
            f"there is no tokenizer directory {name!r}{hint_for(name)}: give {KNOWN_NAMES}, a directory or a hub id"
        )
    repository, _, revision = name.partition("@")
    try:
        if directory.is_dir():
            tokenizer = _from_files(directory)
        else:
            tokenizer = _from_files(repository, revision=revision or "main")
    except Exception as error:
        where = "has no readable tokenizer files" if directory.is_dir() else "was found neither on disk nor on the hub"
        raise ValueError(
            f"tokenizer {name!r} {where} ({first_line(error)}): give {KNOWN_NAMES}, a directory or a hub id"
        ) from error
    _check_encodes(tokenizer, name)
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} has no fast (tokenizer.json) version, which is needed here")
    if directory.is_dir():
        set_model_ends(tokenizer, _ends_in_files(directory))
    return tokenizer


def _check_encodes(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Encodes a short text, because some damage of a tokenizer's files shows only then.

    Raises:
        ValueError: the tokenizer fails, or an id is far beyond the others.
    """
    try:
        tokenizer.decode(tokenizer("A text, 1 é 好\n").input_ids)
        most = max(tokenizer.get_vocab().values(), default=0)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library in Rust raises an error that is not an Exception
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"tokenizer {name!r} cannot encode a text ({first_line(error)}): its files are damaged"
        ) from None
    if most >= 2 * len(tokenizer) + FREE_IDS:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer):,} tokens, and the id {most:,}: its files are damaged"
        )


def _from_files(place: str | Path, **options: Any) -> PreTrainedTokenizerFast:
    """Returns the tokenizer in a directory or in a repository of the hub, with the ids of its tokenizer.json.

    transformers 5 rebuilds some tokenizers from the name of their class, and takes only the pieces from the file.
    Class names are often wrong, and the ids then differ from those that the model was trained on.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (known := _file_of(place, "tokenizer.json", **options)) is not None:
        check_room_for_tokenizer(known.stat().st_size)
    named: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    file, pieces = (_file_of(place, name, **options) for name in ("tokenizer.json", "tokenizer.model"))
    if file is None and pieces is not None:
        return _as_sentencepiece(named, pieces)
    if type(named) is PreTrainedTokenizerFast or not named.is_fast or file is None:
        return named
    backend = Tokenizer.from_file(str(file))
    if _encodes_alike(backend, named.backend_tokenizer):
        return named
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(place, **options)
    for role, token in named.special_tokens_map.items():
        # The class has its own special tokens, which the files may lack.
        if isinstance(token, str) and getattr(tokenizer, role, None) is None and backend.token_to_id(token) is not None:
            setattr(tokenizer, role, token)
    return tokenizer


def _file_of(place: str | Path, name: str, **options: Any) -> Path | None:
    """Returns a file of a directory, or of a repository that transformers has just downloaded; None if it has none."""
    from huggingface_hub import try_to_load_from_cache

    file: Any = Path(place) / name if isinstance(place, Path) else try_to_load_from_cache(place, name, **options)
    return Path(file) if isinstance(file, str | Path) and Path(file).is_file() else None


_SPACED = ("A text", " one space", "  two", "a  b", "\n x", "   ", "tab\tx", "é 好 \U0001f600", "1234 don't")
"""Texts that conversions of a SentencePiece model encode differently from the model itself."""


def _as_sentencepiece(named: PreTrainedTokenizerFast, file: Path) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that gives the ids of a SentencePiece model, with the special tokens of `named`.

    Args:
        named: what transformers has made of the model. transformers 5.23 puts no "▁" before a text that begins with a
            space, or before any text, and merges pieces by id.

    Raises:
        ValueError: no conversion gives the model's ids.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = [model.encode(text) for text in _SPACED]

    def agrees(backend: Tokenizer) -> bool:
        with special_tokens_as_text(backend):
            return [backend.encode(text, add_special_tokens=False).ids for text in _SPACED] == ids

    if named.is_fast and agrees(named.backend_tokenizer):
        return named
    numbers = range(model.vocab_size())
    control = [model.id_to_piece(n) for n in numbers if model.is_control(n) or model.is_unknown(n)]
    for add_space_prefix in (True, False):
        backend = sentencepiece_backend(
            {model.id_to_piece(n): n for n in numbers},
            [model.get_score(n) for n in numbers],
            unknown=model.id_to_piece(model.unk_id()),
            add_space_prefix=add_space_prefix,
            never_merged=control,
        )
        if agrees(backend):
            break
    else:
        raise ValueError(f"{file.name} is converted to other ids than its own: add a tokenizer.json of the model")
    for _, token in sorted(named.added_tokens_decoder.items()):
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if named.is_fast:
        backend.post_processor = named.backend_tokenizer.post_processor
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=named.chat_template,
        model_max_length=named.model_max_length,
        clean_up_tokenization_spaces=False,
        **named.special_tokens_map,
    )
    return tokenizer


def _encodes_alike(file: Tokenizer, made: Tokenizer) -> bool:
    """Whether a tokenizer that was made from a file has all of the file's parts that decide ids."""
    theirs, ours = json.loads(file.to_str()), json.loads(made.to_str())
    tokens = [[tuple(token.items()) for token in description["added_tokens"]] for description in (theirs, ours)]
    return set(tokens[0]) <= set(tokens[1]) and all(
        theirs[part] == ours[part] for part in ("normalizer", "pre_tokenizer", "model")
    )


def _ends_in_files(directory: Path) -> object:
    """Returns the tokens that end a text by a Hugging Face directory; transformers ends at them, too."""
    for name in ("generation_config.json", "config.json"):
        try:
            content = read_json(directory / name)
        except (OSError, ValueError):  # a file that the model needs is refused where the model is read
            continue
        if content.get("eos_token_id") is not None:
            return content["eos_token_id"]
    return []


def check_room_for_tokenizer(size: int) -> None:
    """Checks that the process can get the memory that the library `tokenizers` needs, by getting and returning it.

    A library in Rust that gets no memory ends the process, with lines of its own. Mistral's tokenizer.json, of 3.5 MB,
    takes 12 times its size while it is read.

    Args:
        size: bytes of the file tokenizer.json.

    Raises:
        MemoryError: the process does not get so much.
    """
    needed = 16 * size + (4 << 20)
    if not has_room(needed):
        raise MemoryError(f"a tokenizer takes about {needed / 2**20:,.0f} MiB")


SIZE_OF_A_TOKEN = 128
"""Bytes that a token takes in tokenizer.json, with its merges. Mistral's 32,000 tokens take 110 bytes each."""


def _danube_small() -> PreTrainedTokenizerFast:
    # AutoTokenizer is not used, because its import takes two seconds longer.
    from transformers import PreTrainedTokenizerFast

    check_room_for_tokenizer((SMALL_DIRECTORY / "tokenizer.json").stat().st_size)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(SMALL_DIRECTORY)
    return beginning_texts(tokenizer)


def mistral_model_file() -> Path:
    """Returns the path of Mistral v1's SentencePiece model in the installed package `mistral-common`."""
    for file in importlib.metadata.files("mistral-common") or []:
        if file.name == "tokenizer.model.v1":
            return Path(str(file.locate()))
    raise ValueError("the package mistral-common has no tokenizer.model.v1: reinstall it, or name another tokenizer")


def own_backend(name: str) -> Tokenizer | None:
    """Returns Danube's own tokenizers as objects of the library `tokenizers`, and None for every other name."""
    if name in (MISTRAL, DANUBE_CHAT):
        return _mistral_backend(add_space_prefix=name == MISTRAL)
    if name == DANUBE_SMALL:
        from tokenizers import Tokenizer

        check_room_for_tokenizer((SMALL_DIRECTORY / "tokenizer.json").stat().st_size)
        return Tokenizer.from_file(str(SMALL_DIRECTORY / "tokenizer.json"))
    return None


@lru_cache(maxsize=2)
def _mistral_backend(*, add_space_prefix: bool) -> Tokenizer:
    import sentencepiece
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model_file()))
    backend = sentencepiece_backend(
        {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())},
        [pieces.get_score(i) for i in range(pieces.vocab_size())],
        add_space_prefix=add_space_prefix,
    )
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    # Adds nothing. transformers would set it, and the fingerprint has to be the same without transformers.
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    return backend


def with_danube_tokens(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of transformers whose special tokens have the same roles as in Danube's tokenizer.

    Args:
        backend: a tokenizer that has `<unk>`, `<s>` and `</s>`.
        options: further arguments of `PreTrainedTokenizerFast`.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        # Danube3 pads with id 0, as its config.json says.
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
        **{BEGINS_TEXTS: True},
        **options,
    )


def sentencepiece_backend(
    vocabulary: dict[str, int],
    scores: Sequence[float],
    *,
    unknown: str | None = "<unk>",
    add_space_prefix: bool = True,
    never_merged: Collection[str] = (),
) -> Tokenizer:
    """Converts a SentencePiece BPE model to a tokenizer of the library `tokenizers`, without its special tokens.

    Args:
        scores: by id. A merge into a piece with a higher score comes first.
        never_merged: pieces of the vocabulary that no merge creates, such as control tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    check_room_for_tokenizer(SIZE_OF_A_TOKEN * len(vocabulary))
    # The score determines the order of merges, not the id: "▁▁" has the lowest id of all and merges late.
    known = vocabulary.keys() - set(never_merged)
    merges: list[tuple[str, str]] = []
    for piece in sorted(known, key=lambda piece: (-scores[vocabulary[piece]], vocabulary[piece])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        possible = [pair for pair in splits if pair[0] in known and pair[1] in known]
        merges += sorted(possible, key=lambda pair: (len(pair[0]), len(pair[1])))

    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if add_space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
