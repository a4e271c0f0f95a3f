"""Ids by gigatoken, where it is installed, are those of `tokenizers`."""

import json
import random
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightning_danube.tokens.encoding import TextEncoder, can_encode_in_parts, gigatoken_encoder
from lightning_danube.tokens.tokenizer import load_hf_tokenizer

ROOT = Path(__file__).resolve().parents[2]
HARD = [
    *("", "a", " ", "  ", " a", "a ", " a b", "a  b", "\n", "\n\n a\t b", "\r\n", "   lead", "trail   ", " " * 50),
    *(
        "<s>",
        "</s> x <unk>",
        "<0x0A>",
        "▁",
        "a▁b",
        " ▁ ",
        "😀 emoji 👨\u200d👩\u200d👧",
        "日本語テキスト",
        "1234567890",
    ),
    *("\u0000", "\x7f", "é e\u0301", "A" * 5000, "a\u00a0b", "\ufeffbom", "ﬁ ligature", "\u2028x", "ℝ𝔸", "don't I'LL"),
]


@pytest.fixture
def mistral() -> str:
    return str(load_hf_tokenizer("mistral").backend_tokenizer.to_str())


def fake(monkeypatch: pytest.MonkeyPatch, encode_batch_list: Any) -> None:
    """In the place of gigatoken."""
    loaded = SimpleNamespace(encode_batch_list=encode_batch_list)
    module = SimpleNamespace(Tokenizer=SimpleNamespace(from_json=lambda description: loaded))
    monkeypatch.setitem(sys.modules, "gigatoken", module)


def test_other_ids_are_refused(monkeypatch: pytest.MonkeyPatch, mistral: str) -> None:
    slow = Tokenizer.from_str(mistral)
    batches = []

    def encode(texts: list[str], parallel: bool) -> list[list[int]]:
        assert not parallel
        batches.append(texts)
        return [
            [*slow.encode(text, add_special_tokens=False).ids, *([7] if len(batches) > 70 else [])] for text in texts
        ]

    fake(monkeypatch, encode)
    encoder = TextEncoder(mistral, in_parts=True)
    for _ in range(70):
        assert encoder.encode(["a river", "stone"]) == [slow.encode(t).ids for t in ("a river", "stone")]
    for _ in range(129 - 71):
        encoder.encode(["a river"])  # wrong, and not compared
    with pytest.raises(ValueError, match="text that begins with 'a river' differently from tokenizers: pip uninst"):
        encoder.encode(["a river"])
    assert len(batches) == 129


def test_what_gigatoken_does_not_know_is_left_to_tokenizers(monkeypatch: pytest.MonkeyPatch, mistral: str) -> None:
    def refuse(description: str) -> None:
        raise TypeError("unsupported model")

    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=SimpleNamespace(from_json=refuse)))
    assert gigatoken_encoder(mistral) is None
    assert TextEncoder(mistral, in_parts=True).encode(["stone"]) == [Tokenizer.from_str(mistral).encode("stone").ids]


@pytest.fixture(params=["mistral", "byte-level"])
def tokenizer_json(request: pytest.FixtureRequest, mistral: str) -> str:
    """A SentencePiece tokenizer, and one of GPT-2's kind with a special token in its vocabulary."""
    if request.param == "mistral":
        return mistral
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([__doc__ or "", *HARD, Path(__file__).read_text()], trainer)
    return str(tokenizer.to_str())


@pytest.mark.gigatoken
def test_hard_texts_have_the_same_ids(tokenizer_json: str) -> None:
    fast = gigatoken_encoder(tokenizer_json)
    assert fast is not None
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    drawn = random.Random(0)
    alphabet = [
        *" \n\t.▁",
        "  ",
        "river",
        "stone ",
        "</s>",
        "<s>",
        "é",
        "日本",
        "\u200b",
        "🙂",
        "a" * 30,
        "'s",
        "12",
        "\u0301",
    ]
    texts = HARD + ["".join(drawn.choices(alphabet, k=drawn.randrange(300))) for _ in range(3000)]
    expected = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, ids, encoding in zip(texts, fast(texts), expected, strict=True):
        assert ids == encoding.ids, text


@pytest.mark.gigatoken
def test_real_text_has_the_same_ids(mistral: str) -> None:
    fast = gigatoken_encoder(mistral)
    assert fast is not None
    texts = [*topics.values(), *(file.read_text(encoding="utf-8") for file in (ROOT / "docs").glob("*.md"))]
    assert sum(map(len, texts)) > 500_000
    assert fast(texts) == TextEncoder(mistral, can_encode_in_parts(mistral))._encode_slowly(texts)


def test_gigatoken_gets_no_special_tokens(monkeypatch: pytest.MonkeyPatch, mistral: str) -> None:
    described = []

    def load(description: str) -> Any:
        described.append(json.loads(description))
        return SimpleNamespace(encode_batch_list=lambda texts, parallel: [[len(text)] for text in texts])

    monkeypatch.setitem(sys.modules, "gigatoken", SimpleNamespace(Tokenizer=SimpleNamespace(from_json=load)))
    whole = json.loads(mistral)
    whole["added_tokens"].append({**whole["added_tokens"][0], "id": 40_000, "content": "mine", "special": False})
    encode = gigatoken_encoder(json.dumps(whole))
    assert encode is not None and encode(["ab", "c"]) == [[2], [1]]
    assert [token["content"] for token in described[0]["added_tokens"]] == ["mine"]
    assert described[0]["model"] == whole["model"]
