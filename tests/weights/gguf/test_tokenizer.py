import io
import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_danube.tokens.chat_template import end_ids
from lightning_danube.tokens.tokenizer import (
    begin_token,
    load_hf_tokenizer,
    mistral_model_file,
    sentencepiece_backend,
    with_danube_tokens,
)
from lightning_danube.tokens.word_splits import WORD_SPLITS, WordSplit
from lightning_danube.weights.gguf.tokenizer import PROBE, gguf_tokenizer_fields, load_gguf_tokenizer

TEXT = (
    "The tokenizer of a model cuts a text into pieces. It's 1234 or 5,678.90 of them, DON'T you'll see?\n\n  Über "
    "allen Gipfeln ist Ruh', in allen Wipfeln spürest du kaum einen Hauch; 我想在 apple 工作, нещо на Български.\n\t"
)
HARD = [
    PROBE,
    "",
    " ",
    "  a",
    "one zqx",
    "a  ",
    "\n\n",
    "a<|end|>b</s> <unk> <|user|>c",
    "<|prompt|>hi</s><|answer|>",
    "▁x ▁▁",
    "e\u0301\x00\u200b",
]
CHAT_TEMPLATE = "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}"


def write(path: Path, fields: dict[str, Any]) -> Path:
    """A file with nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"llama.context_length": 512, **fields}.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(split: WordSplit) -> PreTrainedTokenizerFast:
    """A small tokenizer of GPT-2's kind with control tokens, one that is part of plain text, and one for a word that no
    merges lead to."""
    backend = Tokenizer(models.BPE(ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["Ġzqx"] = len(content["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_tokens([AddedToken("<|user|>", normalized=False, special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )


def own_sentencepiece(**options: Any) -> tuple[sentencepiece.SentencePieceProcessor, PreTrainedTokenizerFast]:
    """A small SentencePiece BPE model and what is made of it here."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(pieces.vocab_size())
    backend = sentencepiece_backend(
        {pieces.id_to_piece(i): i for i in ids},
        [pieces.get_score(i) for i in ids],
        add_space_prefix=options.get("add_dummy_prefix", True),
        never_merged=[pieces.id_to_piece(i) for i in ids if pieces.is_control(i) or pieces.is_byte(i)],
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return pieces, PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, special: bool) -> list[int]:
    """`special`: whether text that spells a control token becomes it."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = not special
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = False


def assert_same_ids(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> None:
    generator = random.Random(0)
    parts = [
        " zqx",
        "a",
        "E",
        " ",
        "  ",
        "\n",
        "1",
        "234",
        "'s",
        "the",
        "é",
        "e\u0301",
        "我",
        "🦙",
        "<|end|>",
        "<|user|>",
        "</s>",
        "▁",
        "?!",
    ]
    texts = HARD + ["".join(generator.choices(parts, k=generator.randrange(12))) for _ in range(300)]
    for text in texts:
        for special in (False, True):
            assert ids_of(one, text, special) == ids_of(other, text, special), (text, special)
        assert one.decode(ids_of(one, text, True)) == other.decode(ids_of(other, text, True))


@pytest.fixture(scope="module")
def mistral_fields() -> dict[str, Any]:
    return gguf_tokenizer_fields(load_hf_tokenizer("mistral"))


@pytest.mark.medium
def test_the_mistral_tokenizer_comes_back_as_the_same_one(mistral_fields: dict[str, Any], tmp_path: Path) -> None:
    original = load_hf_tokenizer("mistral")
    fields = mistral_fields | {"tokenizer.chat_template": CHAT_TEMPLATE}
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert loaded.backend_tokenizer.to_str() == original.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == original.special_tokens_map
    assert (loaded.model_max_length, loaded.chat_template) == (512, CHAT_TEMPLATE)
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|user|>hi<|end|>"


def test_types_and_scores_are_those_of_the_sentencepiece_model(mistral_fields: dict[str, Any]) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(mistral_model_file()))
    ids = range(pieces.vocab_size())
    assert mistral_fields["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in ids]
    kinds = [(pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6)]
    assert mistral_fields["tokenizer.ggml.token_type"] == [
        next((number for holds, number in kinds if holds(i)), 1) for i in ids
    ]
    # Not the same numbers, but the same order: only that decides. Runs of spaces share one score in the model.
    scores = mistral_fields["tokenizer.ggml.scores"]
    merged = [i for i in ids if len(pieces.id_to_piece(i)) > 1 and mistral_fields["tokenizer.ggml.token_type"][i] == 1]
    assert sorted(merged, key=lambda i: -scores[i]) == sorted(merged, key=lambda i: (-pieces.get_score(i), i))
    flags = {key: mistral_fields[f"tokenizer.ggml.{key}"] for key in ("model", "pre", "add_space_prefix")}
    assert flags == {"model": "llama", "pre": "default", "add_space_prefix": True}
    # Documents are "<s> text </s>" and prompts start with <s>; an end of prompt would end the answer.
    assert (mistral_fields["tokenizer.ggml.add_bos_token"], mistral_fields["tokenizer.ggml.add_eos_token"]) == (
        True,
        False,
    )
    special = ("bos", "eos", "unknown", "padding")
    assert [mistral_fields[f"tokenizer.ggml.{key}_token_id"] for key in special] == [1, 2, 0, 0]


@pytest.mark.parametrize("prefix", [True, False])
def test_other_sentencepiece_models_keep_their_ids(prefix: bool, tmp_path: Path) -> None:
    pieces, tokenizer = own_sentencepiece(add_dummy_prefix=prefix)
    fields = gguf_tokenizer_fields(tokenizer)
    assert fields["tokenizer.ggml.add_space_prefix"] == prefix
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert_same_ids(loaded, tokenizer)
    for text in HARD:
        assert ids_of(loaded, text, special=False) == pieces.encode(text), text


@pytest.mark.parametrize("split", WORD_SPLITS, ids=lambda split: split.names[0])
def test_byte_level_tokenizers_keep_their_ids(split: WordSplit, tmp_path: Path) -> None:
    tokenizer = byte_level(split)
    tokenizer.chat_template = CHAT_TEMPLATE
    fields = gguf_tokenizer_fields(tokenizer)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", split.names[0])
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1] and fields["tokenizer.ggml.token_type"][-1] == 4
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert_same_ids(loaded, tokenizer)
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert (loaded.chat_template, loaded.pad_token_id) == (CHAT_TEMPLATE, 2)
    for name in split.names[1:]:
        other = load_gguf_tokenizer(write(tmp_path / "other.gguf", fields | {"tokenizer.ggml.pre": name}))
        assert other.backend_tokenizer.to_str() == loaded.backend_tokenizer.to_str()


def test_the_probe_tells_the_splits_apart() -> None:
    names = [name for split in WORD_SPLITS for name in split.names]
    assert len(set(names)) == len(names)
    for one, other in combinations(WORD_SPLITS, 2):
        assert one.pre_tokenizer().pre_tokenize_str(PROBE) != other.pre_tokenizer().pre_tokenize_str(PROBE)


@pytest.mark.parametrize(
    ("bos", "eos", "adds", "expected"),
    [
        ("<|begin|>", "<|end|>", True, True),
        ("<|begin|>", "<|end|>", False, False),
        ("<|end|>", "<|end|>", True, True),
        ("<|end|>", "<|end|>", False, False),
        (None, "<|end|>", False, False),
    ],
)
def test_a_bos_token_that_is_added_starts_every_text(
    bos: str | None, eos: str, adds: bool, expected: bool, tmp_path: Path
) -> None:
    tokenizer: Any = byte_level(WORD_SPLITS[0])
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.add_bos_token = adds
    fields = gguf_tokenizer_fields(tokenizer)
    assert fields["tokenizer.ggml.add_bos_token"] is expected
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    # A chat template may write a token that begins no text.
    assert (loaded.bos_token, loaded.eos_token) == (bos, eos)
    assert begin_token(loaded) == begin_token(tokenizer) == (tokenizer.bos_token_id if expected else None)


@pytest.mark.parametrize(("name", "expected"), [("gpt-2", None), ("smollm", None), ("llama-bpe", "<|begin|>")])
def test_what_a_file_leaves_open_is_taken_as_llama_cpp_takes_it(
    name: str, expected: str | None, tmp_path: Path
) -> None:
    fields = gguf_tokenizer_fields(byte_level(WORD_SPLITS[0])) | {"tokenizer.ggml.pre": name}
    del fields["tokenizer.ggml.add_bos_token"]
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert begin_token(loaded) == (expected and loaded.bos_token_id)


def test_ids_that_no_token_has_are_passed_over(tmp_path: Path) -> None:
    fields = gguf_tokenizer_fields(byte_level(WORD_SPLITS[0])) | {"tokenizer.ggml.padding_token_id": 10**6}
    assert load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields)).pad_token is None


def test_fillers_at_the_end_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level(WORD_SPLITS[0])
    fields = gguf_tokenizer_fields(tokenizer)
    fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "[PAD1]", "[PAD2]"]
    fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 5, 5]
    loaded = load_gguf_tokenizer(write(tmp_path / "tokenizer.gguf", fields))
    assert len(loaded) == len(tokenizer)
    assert_same_ids(loaded, tokenizer)


def test_of_several_chat_templates_the_default_one_is_written() -> None:
    tokenizer = byte_level(WORD_SPLITS[0])
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tools": "{{ tools }}"}
    assert gguf_tokenizer_fields(tokenizer)["tokenizer.chat_template"] == CHAT_TEMPLATE
    tokenizer.chat_template = None
    assert "tokenizer.chat_template" not in gguf_tokenizer_fields(tokenizer)


def small_sentencepiece(
    merges: list[tuple[str, str]], pieces: str = "▁ a b c ab bc abc", **options: Any
) -> PreTrainedTokenizerFast:
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<0x0A>", *pieces.split()])}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True, **options)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


MERGES = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize(("scheme", "prefix"), [("always", True), ("first", True), ("never", False)])
def test_spaces_may_be_replaced_before_or_while_cutting(scheme: str, prefix: bool) -> None:
    tokenizer = small_sentencepiece(MERGES)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    assert gguf_tokenizer_fields(tokenizer)["tokenizer.ggml.add_space_prefix"] is prefix


def change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    pass


def cut_at_spaces(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)


def add_stripping_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


@pytest.mark.parametrize(
    ("merges", "options", "change", "message"),
    [
        (MERGES[:2] + MERGES[3:], {}, change_nothing, r"never merges 'a' and 'bc', as no SentencePiece model does"),
        ([MERGES[2], *MERGES[:2], MERGES[3]], {}, change_nothing, r"merges into 'abc' are not all of one rank"),
        (MERGES, {"ignore_merges": True}, change_nothing, r"not plain BPE, which is all that a GGUF file can hold"),
        (MERGES, {"dropout": 0.1}, change_nothing, r"not plain BPE"),
        (MERGES, {}, cut_at_spaces, r"changes texts in other ways than SentencePiece with spaces as '▁' does"),
        (MERGES, {}, add_stripping_token, r"token '<mask>' includes the spaces around it, which llama.cpp does not"),
    ],
)
def test_what_llama_cpp_would_merge_otherwise_is_refused(
    merges: list[tuple[str, str]],
    options: dict[str, Any],
    change: Callable[[PreTrainedTokenizerFast], None],
    message: str,
) -> None:
    gguf_tokenizer_fields(small_sentencepiece(MERGES))
    tokenizer = small_sentencepiece(merges, **options)
    change(tokenizer)
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer_fields(tokenizer)


def test_other_splits_into_words_are_refused() -> None:
    known = r"known are gpt-2, smollm, llama-bpe, qwen2$"
    tokenizer = byte_level(WORD_SPLITS[0])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=rf"cuts texts into words in a way that a GGUF file cannot name; {known}"):
        gguf_tokenizer_fields(tokenizer)
    # Llama 3's split means taking whole words as they are, too.
    tokenizer.backend_tokenizer.pre_tokenizer = WORD_SPLITS[2].pre_tokenizer()
    with pytest.raises(ValueError, match=r"in a way that a GGUF file cannot name"):
        gguf_tokenizer_fields(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = WORD_SPLITS[0].pre_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(
        ValueError, match=r"normalizes texts before it cuts them into words, which llama.cpp does not do"
    ):
        gguf_tokenizer_fields(tokenizer)


def test_other_models_than_bpe_are_refused() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    with pytest.raises(ValueError, match=r"the tokenizer is not plain BPE"):
        gguf_tokenizer_fields(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"holds no tokenizer; name one$"),
        ({"model": "none"}, r"holds no tokenizer; name one$"),
        ({"model": "bert"}, r"its tokenizer is of the kind 'bert'; only 'llama' and 'gpt2' can be loaded$"),
        ({"pre": "falcon"}, r"pre is 'falcon', a split into words that is not known here; known are gpt-2, smollm, "),
        ({"pre": None}, r"pre is None, a split into words that is not known here"),
        ({"tokens": None}, r"tokenizer.ggml.tokens is not a list of type str$"),
        ({"tokens": [1, 2]}, r"tokenizer.ggml.tokens is not a list of type str$"),
        ({"tokens": ["a", "b", "a"]}, r"the token 'a' appears twice$"),
        ({"token_type": [1, 1]}, r"tokenizer.ggml.token_type has 2 values for \d+ tokens$"),
        ({"merges": None}, r"tokenizer.ggml.merges is not a list of type str$"),
        ({"merges": ["a b", "zz q"]}, r"merges joins '.*' and '.*', which are not all tokens$"),
        ({"model": "llama"}, r"tokenizer.ggml.scores is not a list of type float$"),
        ({"model": "llama", "scores": [1.0]}, r"tokenizer.ggml.scores has 1 values for \d+ tokens$"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields = gguf_tokenizer_fields(byte_level(WORD_SPLITS[0]))
    for key, value in changes.items():
        fields.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            fields[f"tokenizer.ggml.{key}"] = value
    file = write(tmp_path / "tokenizer.gguf", fields)
    with pytest.raises(ValueError, match=rf"^[^\n]*tokenizer.gguf: [^\n]*{message}"):
        load_gguf_tokenizer(file)


def test_a_prompt_does_not_end_with_the_token_that_ends_texts() -> None:
    assert gguf_tokenizer_fields(byte_level(WORD_SPLITS[0]))["tokenizer.ggml.add_eos_token"] is False


def test_the_end_of_a_turn_is_written_and_read(tmp_path: Path) -> None:
    tokenizer: Any = byte_level(WORD_SPLITS[0])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", "<|user|>")
    fields = gguf_tokenizer_fields(tokenizer)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert fields["tokenizer.ggml.eot_token_id"] == user
    # A template that ends turns with eos needs no field.
    tokenizer.chat_template = CHAT_TEMPLATE
    plain = gguf_tokenizer_fields(tokenizer)
    assert "tokenizer.ggml.eot_token_id" not in plain
    # The field counts where the template says nothing, and so does the end of a call.
    del plain["tokenizer.chat_template"]
    for key in ("eot_token_id", "eom_token_id"):
        loaded = load_gguf_tokenizer(write(tmp_path / "x.gguf", plain | {f"tokenizer.ggml.{key}": 5}))
        assert end_ids(loaded) == [tokenizer.eos_token_id, 5]
    loaded = load_gguf_tokenizer(write(tmp_path / "x.gguf", plain | {"tokenizer.ggml.eot_token_id": 10**6}))
    assert end_ids(loaded) == [tokenizer.eos_token_id]


def danube_with_merges_of_spaces(order: Callable[[tuple[str, str]], Any] | None) -> PreTrainedTokenizerFast:
    """Danube's chat tokenizer, whose merges of spaces stand in another order. They have one score in SentencePiece."""
    description = json.loads(load_hf_tokenizer("danube3-chat").backend_tokenizer.to_str())
    merges = [tuple(pair) for pair in description["model"]["merges"]]
    spaces = [pair for pair in merges if set("".join(pair)) == {"▁"}]
    assert merges[-len(spaces) :] == spaces and len(spaces) == 104
    description["model"]["merges"] = merges[: -len(spaces)] + sorted(spaces, key=order, reverse=True)
    return with_danube_tokens(Tokenizer.from_str(json.dumps(description)))


def test_merges_of_equal_rank_may_stand_in_another_order() -> None:
    plain = load_hf_tokenizer("danube3-chat")
    texts = ["a" + " " * count + "b" for count in range(60)]
    other = danube_with_merges_of_spaces(lambda pair: (len(pair[0]), len(pair[1])))
    assert other(texts, add_special_tokens=False).input_ids == plain(texts, add_special_tokens=False).input_ids
    fields, expected = gguf_tokenizer_fields(other), gguf_tokenizer_fields(plain)
    for key in fields.keys() - {"tokenizer.ggml.scores"}:
        assert fields[key] == expected[key]
    # An order that gives other ids stays refused.
    wrong = danube_with_merges_of_spaces(lambda pair: (-len(pair[0]), -len(pair[1])))
    assert wrong(texts, add_special_tokens=False).input_ids != plain(texts, add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match=r"merges into '▁+' are not all of one rank: llama.cpp would merge differ"):
        gguf_tokenizer_fields(wrong)
