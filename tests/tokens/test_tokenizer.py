import errno
import json
import mmap
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import transformers

from lightning_danube.__main__ import user_message
from lightning_danube.generation.text import encode_prompt
from lightning_danube.tokens import tokenizer as tokenizer_module
from lightning_danube.tokens.chat_template import encode_chat, end_ids
from lightning_danube.tokens.tokenizer import (
    DANUBE_SMALL,
    DocumentTokenizer,
    adding_bos,
    begin_token,
    beginning_texts,
    encode_text,
    fingerprint_of,
    load_hf_tokenizer,
    mistral_model_file,
    new_tokens_of,
    tokens_beyond,
    with_new_tokens,
)
from lightning_danube.tokens.tokenizer_training import SPECIAL_TOKENS
from lightning_danube.tokens.word_splits import WORD_SPLITS
from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields, load_gguf_tokenizer
from tests.tiny_models import tiny_tokenizer
from tests.weights.gguf.test_tokenizer import write

HARD = [
    "Hello world",
    "  two  spaces\n\nnew\ttab ",
    " leading",
    "x   \n  y",
    "",
    " ",
    "\n\n",
    "12345 3.14 1,000",
    "emoji 👩‍👩‍👧 \U0001f600 é ü 中文 \u200b",
    "a\x00b \x7f",
    "▁x ▁▁ <0x0A> fi ﬁ",
    "<|prompt|>hi</s><|answer|>x</s> <s> <unk>",
    "def f(x):\n    return x ** 2  # über\n",
]
# Of lightning_danube/tokens/danube-small. A model that was trained with other pieces can no longer be used.
SMALL_PIECES, SMALL_FINGERPRINT = 4096, "70ef6ce9ddb97bde"


@pytest.fixture(scope="module")
def mistral() -> DocumentTokenizer:
    return DocumentTokenizer("mistral")


def test_the_vocabulary_is_danube3s(mistral: DocumentTokenizer) -> None:
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id, mistral.hf.pad_token_id) == (32_000, 1, 2, 0)
    assert mistral.dtype == np.uint16


@pytest.mark.parametrize("text", HARD)
def test_ids_equal_sentencepieces(mistral: DocumentTokenizer, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model_file()))
    ids = mistral.encode_documents([text])[0]
    assert ids.tolist() == [1, *reference.encode(text), 2]
    assert mistral.hf.decode(ids[1:-1]) == reference.decode(ids[1:-1].tolist())


@pytest.fixture(scope="module")
def small() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


def test_the_small_tokenizer_is_the_one_that_models_were_trained_with(small: DocumentTokenizer) -> None:
    # It is a file of the package: nothing that is installed beside it changes the ids, and no model that was trained
    # with it can be used without these very ids.
    assert (small.vocab_size, small.fingerprint) == (SMALL_PIECES, SMALL_FINGERPRINT)
    assert (small.bos_id, small.eos_id, small.hf.pad_token_id) == (1, 2, 0) and small.dtype == np.dtype(np.uint16)
    assert tuple(small.hf.convert_ids_to_tokens(list(range(5)))) == SPECIAL_TOKENS


def test_the_small_tokenizer_gives_every_text_back(small: DocumentTokenizer) -> None:
    # Every byte that UTF-8 uses.
    letters = [chr(code) for code in (*range(0x800), *range(0x1000, 0x10000, 0x800), *range(0x10000, 0x110000, 0x8000))]
    letters = [letter for letter in letters if not "\ud800" <= letter <= "\udfff"]
    texts = [*HARD, "".join(letters)]
    assert {byte for letter in letters for byte in letter.encode()} == set(range(0xF5)) - {0xC0, 0xC1, 0xE0}
    for text, ids in zip(texts, small.encode_documents(texts), strict=True):
        assert small.hf.decode(ids[1:-1]) == text


def test_the_small_tokenizer_cuts_digits_and_spaces_as_llama_cpp_does(small: DocumentTokenizer, tmp_path: Path) -> None:
    assert [small.hf.decode([i]) for i in small.encode_documents(["in 2024"])[0][1:-1]] == ["in", " ", *"2024"]
    fields = gguf_tokenizer_fields(small.hf)
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.add_bos_token"]
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert loaded.special_tokens_map == small.hf.special_tokens_map
    for text in HARD:
        assert loaded(text).input_ids == small.hf(text, add_special_tokens=False).input_ids
    # A space or a mark belongs to the word behind it, but not to a digit.
    words = next(split for split in WORD_SPLITS if "qwen2" in split.names).pre_tokenizer()
    assert [word for word, _ in words.pre_tokenize_str("a b  (c 12")] == ["a", "Ġb", "Ġ", "Ġ(", "c", "Ġ", "1", "2"]


@pytest.mark.parametrize("name", ["mistral", "danube-small"])
def test_documents_cannot_spell_special_tokens_but_prompts_can(name: str) -> None:
    tokenizer = DocumentTokenizer(name)
    assert 2 not in tokenizer.encode_documents(["a</s>b"])[0][:-1]
    assert 2 in tokenizer.hf("a</s>b", add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "name",
    ["danube-small", "world", *(pytest.param(name, marks=pytest.mark.medium) for name in ("mistral", "danube3-chat"))],
)
def test_an_exported_tokenizer_is_the_same_one(name: str, tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer(name)
    tokenizer.hf.save_pretrained(tmp_path)
    loaded = DocumentTokenizer(str(tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [x.tolist() for x in loaded.encode_documents(HARD)] == [x.tolist() for x in tokenizer.encode_documents(HARD)]


def test_a_tokenizer_with_one_token_for_both_ends_writes_it_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="?"
    ).save_pretrained(tmp_path / "gpt")
    assert DocumentTokenizer(str(tmp_path / "gpt")).encode_documents(["a b"])[0].tolist() == [1, 2, 0]

    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        DocumentTokenizer(str(tmp_path / "endless"))


def test_unknown_tokenizers_are_named() -> None:
    with pytest.raises(ValueError, match=r"there is no tokenizer directory '\./nowhere'"):
        load_hf_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="tokenizer 'nobody/nothing@v1' was found neither"):
        load_hf_tokenizer("nobody/nothing@v1")
    with pytest.raises(ValueError, match="tokenizer 'nobody/nothing' was found neither on disk nor on the hub"):
        load_hf_tokenizer("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "similar"),
    [
        ("./tokeniser/", "tokenizer"),
        ("tokeniser/", "tokenizer"),
        ("runs/my-tok", "runs/my-token"),
        ("../here/tokeniser", "../here/tokenizer"),
        ("runs/a/b", None),
        ("~/no-such-tokenizer-here", None),
    ],
)
def test_a_misspelt_directory_is_not_asked_for_at_the_hub(
    name: str, similar: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in ("tokenizer", "runs/my-token"):
        (tmp_path / "here" / directory).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    with pytest.raises(ValueError) as caught:
        load_hf_tokenizer(name)
    question = f" (did you mean {similar}?)" if similar else ""
    assert str(caught.value) == (
        f"there is no tokenizer directory {name!r}{question}: give 'danube-small', 'mistral', 'danube3-chat', a "
        "directory or a hub id"
    )


def test_a_directory_of_the_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_hf_tokenizer("danube-small").save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fingerprint_of(load_hf_tokenizer("~/mine")) == fingerprint_of(load_hf_tokenizer("danube-small"))


def test_a_directory_without_tokenizer_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no readable tokenizer files"):
        load_hf_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["mistral", "danube3-chat", "danube-small"])
def test_what_is_known_without_transformers_is_what_transformers_says(name: str) -> None:
    tokenizer = DocumentTokenizer(name)
    known = tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.fingerprint
    hf = load_hf_tokenizer(name)
    assert known == (len(hf), hf.bos_token_id, hf.eos_token_id, fingerprint_of(hf))


def test_documents_leave_the_tokenizer_as_it_was(small: DocumentTokenizer) -> None:
    backend = small.hf.backend_tokenizer
    before = backend.encode("a</s>", add_special_tokens=False).ids
    small.encode_documents(["a</s>"])
    assert backend.encode("a</s>", add_special_tokens=False).ids == before and before[-1] == 2


def save(backend: Any, directory: Path, **config: Any) -> str:
    """A Hugging Face directory with a tokenizer's two files and the config.json of a Llama."""
    directory.mkdir(parents=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return str(directory)


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    "name",
    [
        "LlamaTokenizer",
        *(
            pytest.param(name, marks=pytest.mark.medium)
            for name in ("LlamaTokenizerFast", "GemmaTokenizer", "PreTrainedTokenizerFast")
        ),
    ],
)
@pytest.mark.parametrize(
    "legacy",
    [{}, *(pytest.param({"legacy": legacy}, marks=pytest.mark.medium) for legacy in (False, True))],
    ids=str,
)
def test_ids_are_those_of_the_file_whatever_the_class_is_called(
    name: str, legacy: dict[str, bool], mistral: DocumentTokenizer, tmp_path: Path
) -> None:
    file = mistral.hf.backend_tokenizer
    loaded = load_hf_tokenizer(save(file, tmp_path / "llama", tokenizer_class=name, **LLAMA, **legacy))
    for text in [*HARD, "   three", "a </s> b"]:
        assert loaded(text, add_special_tokens=False).input_ids == file.encode(text, add_special_tokens=False).ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    # The saved directory names no class that transformers would rebuild.
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again("  two", add_special_tokens=False).input_ids == loaded("  two", add_special_tokens=False).input_ids


def test_a_class_names_the_tokens_that_the_files_leave_out(mistral: DocumentTokenizer, tmp_path: Path) -> None:
    file = mistral.hf.backend_tokenizer
    loaded = load_hf_tokenizer(save(file, tmp_path / "llama", tokenizer_class="LlamaTokenizer"))
    assert (loaded.bos_token, loaded.eos_token, len(loaded)) == ("<s>", "</s>", 32_000)


def chatml_pieces() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend: Any = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the river walks"], trainer)
    return backend


SMOLLM2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_a_bos_token_that_is_only_named_begins_nothing(tmp_path: Path) -> None:
    named = load_hf_tokenizer(save(chatml_pieces(), tmp_path / "named", **SMOLLM2))
    plain = named("the river", add_special_tokens=False).input_ids
    assert named("the river").input_ids == encode_prompt(named, "the river") == plain
    assert begin_token(named) is None and adding_bos(named) is named
    assert gguf_tokenizer_fields(named)["tokenizer.ggml.add_bos_token"] is False
    assert DocumentTokenizer(str(tmp_path / "named")).encode_documents(["the river"])[0].tolist() == [*plain, 2]
    # One that the tokenizer adds begins texts, whether it is named or not.
    from tokenizers.processors import TemplateProcessing

    adds = chatml_pieces()
    adds.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    cases: list[dict[str, Any]] = [SMOLLM2, {**SMOLLM2, "bos_token": None}]
    for number, options in enumerate(cases):
        adding = load_hf_tokenizer(save(adds, tmp_path / str(number), **options))
        assert begin_token(adding) == 1 and adding_bos(adding) is adding
        assert encode_prompt(adding, "the river") == adding("the river").input_ids == [1, *plain]


@pytest.mark.parametrize("adds", [False, True])
def test_a_token_for_both_ends_stands_once_between_documents(adds: bool, tmp_path: Path) -> None:
    """GPT-2 and SmolLM only name it as bos; OPT puts it before texts."""
    from tokenizers.processors import TemplateProcessing

    backend = chatml_pieces()
    if adds:
        backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    both = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    loaded = load_hf_tokenizer(save(backend, tmp_path / "gpt", **both))
    plain = loaded("the river", add_special_tokens=False).input_ids
    # A text alone has the ids that the tokenizer gives it, here, in an export and in llama.cpp.
    assert encode_prompt(loaded, "the river") == loaded("the river").input_ids == [0] * adds + plain
    assert adding_bos(loaded) is loaded and end_ids(loaded) == [0]
    fields = gguf_tokenizer_fields(loaded)
    assert fields["tokenizer.ggml.add_bos_token"] is adds and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 0
    documents = DocumentTokenizer(str(tmp_path / "gpt"))
    encoded = documents.encode_documents(["the river", "<|endoftext|>", ""])
    typed = encode_text(loaded, "<|endoftext|>")
    assert [ids.tolist() for ids in encoded] == [[*plain, 0], [*typed, 0], [0]] and 0 not in typed
    assert (documents.bos_id, documents.eos_id) == (None, 0)


def test_a_token_behind_texts_begins_none(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    for number, single in enumerate(("$A <|im_end|>", "<|im_start|> $A <|im_end|>")):
        backend = chatml_pieces()
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
        assert begin_token(load_hf_tokenizer(save(backend, tmp_path / str(number), **SMOLLM2))) == (None, 1)[number]


def test_tokenizers_of_earlier_versions_begin_texts_as_before(tmp_path: Path) -> None:
    # The directory of the small tokenizer has no mark, as no directory of the verb `tokenizer` had.
    small = load_hf_tokenizer("danube-small")
    directory = save(small.backend_tokenizer, tmp_path / "mine", tokenizer_class="TokenizersBackend", **LLAMA)
    assert begin_token(load_hf_tokenizer(directory)) == 1
    assert fingerprint_of(load_hf_tokenizer(directory)) == fingerprint_of(small)
    named = load_hf_tokenizer(save(chatml_pieces(), tmp_path / "named", **SMOLLM2))
    assert begin_token(beginning_texts(named)) == 1 and begin_token(named) is None


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "named", [{}, {"pad_token": "<|im_end|>"}, {"additional_special_tokens": ["<|im_end|>"]}], ids=str
)
def test_the_end_of_a_turn_ends_an_answer_whether_it_is_named_or_not(named: dict[str, Any], tmp_path: Path) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    loaded = load_hf_tokenizer(save(chatml_pieces(), tmp_path / "chat", **config, **named))
    ids = encode_chat(loaded, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], False)
    assert 2 in ids and end_ids(loaded) == [0, 2]
    assert gguf_tokenizer_fields(loaded)["tokenizer.ggml.eot_token_id"] == 2


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_ends_that_a_model_names_are_read(file: str, tmp_path: Path) -> None:
    directory = save(chatml_pieces(), tmp_path / "chat", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    assert end_ids(load_hf_tokenizer(directory)) == [0]
    for number, (ends, expected) in enumerate([(2, [0, 2]), ([0, 1, 2], [0, 1, 2]), ([10**6, 1], [0, 1])]):
        directory = save(chatml_pieces(), tmp_path / str(number), tokenizer_class="GPT2Tokenizer")
        path = Path(directory) / file
        path.write_text(json.dumps({"model_type": "llama", "eos_token_id": ends}))
        assert end_ids(load_hf_tokenizer(directory)) == expected


@pytest.mark.parametrize("text", HARD)
def test_danubes_chat_tokenizer_puts_no_space_before_a_text(text: str, mistral: DocumentTokenizer) -> None:
    chat = DocumentTokenizer("danube3-chat")
    assert chat.hf.get_vocab() == mistral.hf.get_vocab() and (chat.bos_id, chat.eos_id) == (1, 2)
    ids = chat.encode_documents([text])[0][1:-1].tolist()
    # The ids behind a token that merges with nothing are those of a text that continues another one.
    newline = mistral.encode_documents(["\n" + text])[0][1:-1].tolist()
    assert newline == [*mistral.encode_documents(["\n"])[0][1:-1].tolist(), *ids]
    assert chat.hf.decode(ids) == text.replace("▁", " ")


def test_danubes_markers_begin_without_a_space_in_its_chat_tokenizer() -> None:
    chat = load_hf_tokenizer("danube3-chat")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids = encode_chat(chat, turns, True)
    marker = {name: chat.tokenize(f"<|{name}|>") for name in ("prompt", "answer")}
    assert marker["prompt"][0] == marker["answer"][0] == "<"
    expected = [*marker["prompt"], "Hi", "</s>", *marker["answer"], "Hello", "</s>", *marker["answer"]]
    assert chat.convert_ids_to_tokens(ids) == expected
    assert load_hf_tokenizer("mistral").tokenize("<|prompt|>")[0] == "▁<"


# --- new tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("name", ["danube-small", "mistral"])
def test_new_tokens_are_found_in_texts_and_nothing_else_changes(name: str) -> None:
    plain, tokens = load_hf_tokenizer(name), ["<protein>", "river stone", "白血病"]
    grown = with_new_tokens(plain, name, tokens)
    first = len(plain)
    text = "the river stone<protein>白血病"
    ids = grown(text, add_special_tokens=False).input_ids
    assert [one for one in ids if one >= first] == [first + 1, first, first + 2]
    assert grown.decode(ids) == text and new_tokens_of(grown) == tokens
    assert grown("a green hill").input_ids == plain("a green hill").input_ids
    assert new_tokens_of(plain) == [] and len(load_hf_tokenizer(name)) == first
    assert tokens_beyond(plain, grown) == [first, first + 1, first + 2] and tokens_beyond(plain, plain) == []
    assert tokens_beyond(grown, plain) is None
    # Tokens added in two goes have the same ids.
    again = with_new_tokens(with_new_tokens(plain, name, tokens[:1]), name, tokens[1:])
    assert fingerprint_of(again) == fingerprint_of(grown) and new_tokens_of(again) == tokens


def test_new_tokens_are_part_of_the_identity() -> None:
    """Without it, the shards and checkpoints of the plain tokenizer would be taken for those with new tokens."""
    plain = DocumentTokenizer("danube-small")
    grown = DocumentTokenizer("danube-small", with_new_tokens(plain.hf, "danube-small", ["<a>"]))
    assert grown.fingerprint == fingerprint_of(grown.hf) != plain.fingerprint
    assert grown.identity()["new_tokens"] == ["<a>"] and "new_tokens" not in plain.identity()
    assert grown.vocab_size == plain.vocab_size + 1
    (ids,) = grown.encode_documents(["a <a> b"])
    assert plain.vocab_size in ids.tolist()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([""], "holds an empty text"),
        (["<a>", "<a>"], "'<a>' appears twice"),
        (["</s>"], "'</s>' is a token of 'danube-small' already"),
        (["the"], "'the' is a token of 'danube-small' already"),
    ],
)
def test_a_wrong_new_token_is_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_new_tokens(load_hf_tokenizer("danube-small"), "danube-small", tokens)


def test_a_new_token_that_would_not_be_decoded_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'größe' would be decoded to .* by the tokenizer 'tiny'"):
        with_new_tokens(tiny_tokenizer(), "tiny", ["größe"])


@pytest.mark.medium
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ],
)
def test_a_directory_with_a_sentencepiece_model_alone_gives_the_models_ids(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """transformers puts no space before some texts, and merges spaces otherwise."""
    shutil.copy(mistral_model_file(), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = DocumentTokenizer(str(tmp_path))
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32000, 2)
    assert tokenizer.bos_id == (1 if config.get("add_bos_token") else None)
    texts = [
        "A text",
        " one",
        "  two  spaces ",
        "a  b",
        "\n x",
        "<s> spelled </s>",
        "é 好 \U0001f600",
        "\tx",
        "   ",
        "1,234",
    ]
    head = [] if tokenizer.bos_id is None else [1]
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        assert ids.tolist() == [*head, *model.encode(text), 2], text


def test_texts_of_others_spell_no_special_tokens() -> None:
    tokenizer = load_hf_tokenizer(DANUBE_SMALL)
    ids = encode_text(tokenizer, "a <s> b </s> c")
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.decode(ids) == "a <s> b </s> c"
    assert tokenizer.eos_token_id in tokenizer("b </s>").input_ids, "the tokenizer itself is as before"


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [("danube-small", r"[78]"), ("mistral", r"\d\d"), ("DIRECTORY", r"[78]"), ("GROWN", r"\d{3}")],
)
def test_memory_is_asked_for_before_a_tokenizer_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, mebibytes: str
) -> None:
    """The library `tokenizers` would end the process."""
    shutil.copytree(tokenizer_module.SMALL_DIRECTORY, tmp_path / "DIRECTORY")
    shutil.copytree(tmp_path / "DIRECTORY", tmp_path / "GROWN")
    with (tmp_path / "GROWN" / "tokenizer.json").open("a") as file:
        file.write(" " * 10_000_000)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    tokenizer_module._mistral_backend.cache_clear()
    load_hf_tokenizer.cache_clear()
    with pytest.raises((MemoryError, ValueError)) as caught:
        load_hf_tokenizer(str(tmp_path / name) if name.isupper() else name)
    said = user_message(caught.value)
    assert said is not None and re.match(rf"out of memory \(a tokenizer takes about {mebibytes} MiB\): ", said), said
