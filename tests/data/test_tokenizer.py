from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lightning_danube.data.tokenizer import DocumentTokenizer, load_hf_tokenizer, mistral_model_file

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


def test_documents_cannot_spell_special_tokens_but_prompts_can(mistral: DocumentTokenizer) -> None:
    assert 2 not in mistral.encode_documents(["a</s>b"])[0][:-1]
    assert 2 in mistral.hf("a</s>b", add_special_tokens=False).input_ids


def test_an_exported_tokenizer_is_the_same_one(mistral: DocumentTokenizer, tmp_path: Path) -> None:
    mistral.hf.save_pretrained(tmp_path)
    loaded = DocumentTokenizer(str(tmp_path))
    assert loaded.fingerprint == mistral.fingerprint
    assert [x.tolist() for x in loaded.encode_documents(HARD)] == [x.tolist() for x in mistral.encode_documents(HARD)]


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
    with pytest.raises(ValueError, match="tokenizer 'nobody/nothing' was found neither on disk nor on the hub"):
        load_hf_tokenizer("nobody/nothing")


def test_a_directory_without_tokenizer_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no readable tokenizer files"):
        load_hf_tokenizer(str(tmp_path))
