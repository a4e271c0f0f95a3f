import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from lightning_danube.text.corpora import Source
from lightning_danube.tokens import tokenizer_training
from lightning_danube.tokens.shards import is_held_out
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.tokens.tokenizer_training import SMALLEST, TextSample, train_tokenizer
from lightning_danube.weights.gguf.tokenizer import gguf_tokenizer_fields
from tests.conftest import WORDS

TEXTS = [f"{word} walks 2024 times under the {word} mountain.\n" for word in WORDS] * 3


def merges_by_counting(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-level BPE as its paper has it: the most frequent pair of neighbours becomes one piece, again and again."""
    split = tokenizer_training._SPLIT.pre_tokenizer()
    words = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    pieces = {word: list(word) for word in words}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: number for number, piece in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                pairs[pair] += frequency
        # Of pairs that are equally frequent, the one whose pieces are older.
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids["".join(best)] = len(ids)
        for parts in pieces.values():
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == best:
                    parts[place : place + 2] = ["".join(best)]
                place += 1
    return merges


def test_the_merges_are_those_of_counting_pairs() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), SMALLEST + 40)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(pair) for pair in merges] == merges_by_counting(TEXTS, 40)


def test_ids_are_danubes_and_the_markers_are_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 40)
    assert len(tokenizer) == SMALLEST + 40
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == ["<unk>", "<s>", "</s>", "<|prompt|>", "<|answer|>"]
    assert [getattr(tokenizer, f"{name}_token_id") for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, 0]
    assert tokenizer("<|prompt|>a</s>", add_special_tokens=False).input_ids[::2] == [3, 2]
    fields = gguf_tokenizer_fields(tokenizer)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert fields["tokenizer.ggml.token_type"] == [3] * 5 + [1] * (SMALLEST + 35)


def test_without_merges_every_byte_is_a_piece() -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST)
    assert len(tokenizer.encode("é walks", add_special_tokens=False)) == len("é walks".encode())


@pytest.mark.medium
def test_the_order_of_the_texts_and_the_threads_change_nothing(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    one, other = (train_tokenizer(texts, SMALLEST + 60).backend_tokenizer.to_str() for texts in (TEXTS, shuffled))
    assert one == other
    program = (
        "import sys; from lightning_danube.tokens.tokenizer_training import train_tokenizer; "
        "from tests.tokens.test_tokenizer_training import TEXTS; "
        f"train_tokenizer(TEXTS, {SMALLEST + 60}).save_pretrained(sys.argv[1])"
    )
    written = []
    for threads in ("1", "2"):
        directory = tmp_path / threads
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", program, directory], env=environment, cwd=root, check=True)
        written.append({file.name: file.read_bytes() for file in directory.iterdir()})
    assert written[0] == written[1]
    assert json.loads(written[0]["tokenizer.json"])["model"] == json.loads(one)["model"]


@pytest.mark.parametrize("pieces", [SMALLEST - 1, 0, -5])
def test_too_few_pieces_are_refused(pieces: int) -> None:
    with pytest.raises(ValueError, match=rf"^--vocab-size is {pieces}: the special tokens \(<unk> .* need 261"):
        train_tokenizer(TEXTS, pieces)


def test_more_pieces_than_the_text_has_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the text gives (\d+) pieces, not 5,000: .* or --vocab-size \1$"):
        train_tokenizer(TEXTS, 5000)


def test_rulers_do_not_become_pieces() -> None:
    tokenizer = train_tokenizer([*TEXTS, "-" * 80 + "\n"] * 9, SMALLEST + 60)
    assert max(map(len, tokenizer.get_vocab())) <= tokenizer_training.LONGEST_PIECE


# --- samples ----------------------------------------------------------------------------------------------------------


def jsonl(file: Path, texts: list[str]) -> Source:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(str(file))


def test_the_documents_that_a_run_holds_out_are_not_learned_from(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(400)]
    sample = TextSample({"web": jsonl(tmp_path / "web.jsonl", texts)}, tmp_path, held_out=0.1)
    learned = list(sample.texts())
    assert learned == [text for text in texts if not is_held_out(text, 0.1)]
    assert sample.measured == {"web": [text for text in texts if is_held_out(text, 0.1)]}
    assert sample.learned_bytes == {"web": sum(map(len, learned))}
    assert 20 < len(sample.measured["web"]) < 60


def test_one_long_text_is_held_out_by_passages(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(50_000))
    (tmp_path / "book.txt").write_text(text)
    sample = TextSample({"book": Source(str(tmp_path / "book.txt"))}, tmp_path)
    learned, held_out = "".join(sample.texts()), "".join(sample.measured["book"])
    assert len(learned) + len(held_out) == len(text) and 0.01 < len(held_out) / len(text) < 0.03
    assert Counter((learned + " " + held_out).split()) == Counter(text.split())


def test_each_source_gives_its_share_of_the_limit_and_no_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 2000)
    long, short = ["x" * 100] * 500, ["y" * 100] * 3
    sources = {"long": jsonl(tmp_path / "long.jsonl", long), "short": jsonl(tmp_path / "short.jsonl", short)}
    # Never reached: the limit ends the source before.
    with (tmp_path / "long.jsonl").open("a") as file:
        file.write("no JSON\n")
    sample = TextSample(sources, tmp_path)
    assert sum(map(len, sample.texts())) == 1300
    assert sample.learned_bytes == {"long": 1000, "short": 300}


def test_bad_rows_are_refused_or_counted_as_the_source_says(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "good"}\nbad\n{"text": "better"}\n')
    refusing = TextSample({"web": Source(str(tmp_path / "web.jsonl"))}, tmp_path)
    with pytest.raises(ValueError, match=r"web\.jsonl, row 2"):
        list(refusing.texts())
    skipping = TextSample({"web": Source(str(tmp_path / "web.jsonl"), on_bad_row="skip")}, tmp_path)
    assert list(skipping.texts()) == ["good", "better"]
    assert skipping.skipped_rows == {"web": 1}


def test_a_source_without_text_is_named(tmp_path: Path) -> None:
    sources = {"web": jsonl(tmp_path / "web.jsonl", ["a text"]), "wiki": jsonl(tmp_path / "wiki.jsonl", ["", " \n"])}
    with pytest.raises(ValueError, match=r"^source 'wiki' \(.*wiki\.jsonl\) holds no text to learn from$"):
        list(TextSample(sources, tmp_path).texts())
    all_held_out = TextSample({"web": sources["web"]}, tmp_path, held_out=0.999999)
    with pytest.raises(ValueError, match=r"holds no text to learn from, as all of its documents are held out$"):
        list(all_held_out.texts())


def test_shards_hold_no_text(tmp_path: Path) -> None:
    (tmp_path / "shards.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^source 'web': .* holds token ids, not text: name the texts"):
        list(TextSample({"web": Source(str(tmp_path))}, tmp_path).texts())


def test_documents_are_encoded_with_it(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, SMALLEST + 40).save_pretrained(tmp_path / "own")
    own = DocumentTokenizer(str(tmp_path / "own"))
    (ids,) = own.encode_documents(["the river <|prompt|>"])
    assert (ids[0], ids[-1], own.vocab_size) == (1, 2, SMALLEST + 40)
    assert 3 not in ids and own.hf.decode(ids[1:-1]) == "the river <|prompt|>"


def test_the_limit_counts_bytes_and_held_out_text_is_kept_up_to_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_training, "SAMPLE_BYTES", 1000)
    monkeypatch.setattr(tokenizer_training, "MEASURED_BYTES", 100)
    sample = TextSample({"web": jsonl(tmp_path / "web.jsonl", ["ü" * 50] * 30)}, tmp_path)
    assert len(list(sample.texts())) == 10 and sample.learned_bytes == {"web": 1000}
    texts = [f"{number:020d}ü" for number in range(400)]
    sample = TextSample({"web": jsonl(tmp_path / "web.jsonl", texts)}, tmp_path, held_out=0.5)
    list(sample.texts())
    kept = sample.measured["web"]
    assert all(is_held_out(text, 0.5) for text in kept) and len(kept) == 5  # 22 bytes each


def test_a_pair_that_occurs_once_is_not_merged() -> None:
    with pytest.raises(ValueError, match=r"gives 263 pieces"):
        train_tokenizer(["abab", "cdcd", "xyz"], SMALLEST + 10)
