"""What is asked besides academic benchmarks: running text, needles, passages and chats."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_danube.evaluation.data import EvaluationData
from lightning_danube.evaluation.parts.chat import chat_questions
from lightning_danube.evaluation.parts.needles import Needles, make_needles
from lightning_danube.evaluation.parts.passages import (
    PassageQuestions,
    passage_questions,
    prompt_ids,
    retrieved,
    says,
)
from lightning_danube.evaluation.parts.perplexity import RunningText, position_buckets, text_rows
from lightning_danube.evaluation.settings import ChatOptions, NeedleOptions, RetrievalOptions
from lightning_danube.text.corpora import Source
from tests.rows import write_rows
from tests.tiny_models import save_tiny, tiny_tokenizer

TEXT = "Rivers run over stones, and the light is green under the trees there. "


@pytest.fixture
def texts(tmp_path: Path) -> Source:
    return Source(str(write_rows(tmp_path / "texts.jsonl", *({"text": f"{n}: {TEXT * 3}"} for n in range(4)))))


def test_rows_of_text_are_the_documents_one_after_the_other(texts: Source, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    part = text_rows("wiki", texts, 3, 50, tokenizer, tmp_path)
    whole = f"0: {TEXT * 3}"
    ids = [tokenizer.bos_token_id, *tokenizer(whole, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert part.ids_NT.shape == (3, 50) and part.ids_NT.dtype == np.int64
    assert part.ids_NT.flatten().tolist() == ids[:150]
    assert part.bytes_of_rows[1] == len(tokenizer.decode(ids[51:100]))
    with pytest.raises(ValueError, match=r"data.texts.wiki: .* tokens, less than one row of 5,000: lower"):
        text_rows("wiki", texts, 3, 5000, tokenizer, tmp_path)


def test_positions_share_a_figure_up_to_powers_of_two() -> None:
    assert position_buckets(300) == [(0, 64), (64, 128), (128, 256), (256, 300)]
    assert position_buckets(64) == [(0, 64)] and position_buckets(40) == [(0, 40)]


def test_a_haystack_and_passages_spell_no_special_tokens(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    hay = Source(str(write_rows(tmp_path / "hay.jsonl", {"text": "a <bos> b <eos> c " * 200})))
    options = NeedleOptions([200], haystack=hay, trials=1)
    (part,) = make_needles(options, 300, 1, tokenizer, tmp_path)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for needle in part.needles:
        assert not special & set(needle.prompt_ids[1:])
    assert not special & set(prompt_ids(tokenizer, "who <eos>?", ["he <bos> said"])[1:])


def test_a_needle_stands_where_it_should(texts: Source, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    options = NeedleOptions([160, 300], depths=[0.0, 0.5, 1.0], haystack=texts, trials=2)
    short, long = make_needles(options, 300, 1, tokenizer, tmp_path)
    assert (short.length, long.length, len(long.needles)) == (160, 300, 6)
    for depth, needle in zip((0, 0, 0.5, 0.5, 1, 1), long.needles, strict=True):
        text = str(tokenizer.decode(needle.prompt_ids, skip_special_tokens=True))
        sentence = f"is {needle.answer}.\n"
        assert text.count(needle.answer) == 1 and len(needle.prompt_ids) == 300 - long.new_tokens
        before, after = text.split(sentence)
        hay = len(text) - len(sentence)
        # The sentence's beginning and the question are of neither side.
        assert abs(len(before) / hay - depth) < 0.45 and after.rstrip().endswith(" is")
        assert long.is_found(needle, f" {needle.answer}.") and not long.is_found(needle, "1" + needle.answer)
    assert len({needle.answer for needle in long.needles}) > 1
    assert long.by_depth([True, False, True, True, False, False]) == {0.0: 0.5, 0.5: 1.0, 1.0: 0.0}
    for lengths, message in (
        ([100], "lengths has 100: the sentence and its question alone take more"),
        ([400], "has 400, beyond data.context_length of 300"),
    ):
        with pytest.raises(ValueError, match=message):
            make_needles(NeedleOptions(lengths, haystack=texts), 300, 1, tokenizer, tmp_path)
    with pytest.raises(ValueError, match=r"haystack has .* tokens, fewer than 5,000"):
        make_needles(NeedleOptions([5000], haystack=texts), 5000, 1, tokenizer, tmp_path)


def test_an_answer_is_said_in_whole_words() -> None:
    assert says("It is the Nile, I think.", ["the nile"]) and says("(os.getcwd)", ["getcwd", "x"])
    assert not says("Juvenile", ["Nile"]) and not says("", ["Nile"]) and not says("any", ["?"])


def test_the_most_similar_passages_come_first() -> None:
    corpus = ["stones are hard", "rivers carry water to the sea", "the sea is salt water", "nothing of the kind"]
    assert retrieved(["which rivers carry water?"], corpus, 2) == [[corpus[1], corpus[2]]]


def test_questions_get_their_own_passages_or_those_of_a_corpus(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    own = str(
        write_rows(
            tmp_path / "own.jsonl",
            {"question": "Which river?", "answers": "Nile", "passages": ["It is the Nile.", "no"]},
            {"question": "Which sea?", "answers": ["Red", "Dead"], "passages": ["unknown"]},
        )
    )
    part = passage_questions(RetrievalOptions(own, passages=1), tokenizer, [1], 0, tmp_path)
    assert [question.passages for question in part.questions] == [["It is the Nile."], ["unknown"]]
    assert [question.answer_is_there for question in part.questions] == [True, False]
    asked = tokenizer.decode(part.questions[0].prompt_ids)
    assert "Passage 1: It is the Nile." in asked and "Question: Which river?" in asked and "Passage 2" not in asked
    assert part.is_right(part.questions[1], "the dead one") and not part.is_right(part.questions[0], "the dead one")
    corpus = str(write_rows(tmp_path / "corpus.jsonl", {"text": "The Red Sea is a sea"}, {"text": "stones"}))
    part = passage_questions(RetrievalOptions(own, corpus=corpus), tokenizer, [1], 0, tmp_path)
    assert part.questions[1].passages == ["The Red Sea is a sea"]
    (one,) = passage_questions(RetrievalOptions(own, limit=1), tokenizer, [1], 0, tmp_path).questions
    assert one in passage_questions(RetrievalOptions(own), tokenizer, [1], 0, tmp_path).questions


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": "x", "passages": []}, "row 1: there is no column 'question'"),
        ({"question": "q", "answers": "x"}, "row 1: there is no column 'passages'.* or give data.retrieval.corpus"),
        ({"question": "q", "answers": 3, "passages": []}, "row 1: answers has to be a list of texts"),
        ({"question": "q", "answers": ["?"], "passages": []}, "row 1: it has no question, or no answer with a word"),
        (["q"], "row 1: there is no column 'question'"),
    ],
)
def test_a_bad_question_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "own.jsonl", row))
    with pytest.raises(ValueError, match=message):
        passage_questions(RetrievalOptions(path), tiny_tokenizer(), [1], 0, tmp_path)


MT = {"question_id": 7, "category": "math", "turns": ["What is 2 + 2?", "And 3 + 3?"]}
WILD = {
    "id": "w1",
    "primary_tag": "Coding",
    "conversation_input": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Sort a list."},
    ],
    "checklist": ["Is it sorted?"],
}


def test_mt_bench_has_turns_and_references(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    questions = str(write_rows(tmp_path / "q.jsonl", MT, MT | {"question_id": 8, "category": "writing"}))
    references = str(write_rows(tmp_path / "r.jsonl", {"question_id": 7, "choices": [{"turns": ["4", "6"]}]}))
    part = chat_questions("mt_bench", ChatOptions(questions, references), tokenizer, [1], 0, tmp_path)
    first, second = part.questions
    assert (first.references, second.references) == (["4", "6"], [])
    assert (part.temperature(first), part.temperature(second)) == (0.0, 0.7)
    assert tokenizer.decode(part.prompt_ids(first, ["It is 4."])).count("<bos>") == 3
    assert [message["content"] for message in first.messages(["4"])] == ["What is 2 + 2?", "4", "And 3 + 3?"]


def test_wildbench_has_a_history_and_a_checklist(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "w.jsonl", WILD))
    (question,) = chat_questions("wildbench", ChatOptions(path), tiny_tokenizer(), [1], 0, tmp_path).questions
    assert (question.id, question.turns, question.checklist) == ("w1", ["Sort a list."], ["Is it sorted?"])
    assert question.messages([]) == WILD["conversation_input"]


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("mt_bench", {"question_id": 1, "turns": ["x"]}, r"row 1: no question of MT-Bench \(KeyError: 'category'\)"),
        ("mt_bench", MT | {"turns": []}, "row 1: no question of MT-Bench"),
        ("wildbench", WILD | {"conversation_input": []}, "row 1: no question of WildBench v2"),
        ("wildbench", MT, r"row 1: no question of WildBench v2 \(KeyError: 'conversation_input'\)"),
    ],
)
def test_a_bad_chat_question_is_named(benchmark: Any, row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        chat_questions(
            benchmark, ChatOptions(str(write_rows(tmp_path / "q.jsonl", row))), tiny_tokenizer(), [1], 0, tmp_path
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data: nothing is asked: give tasks, mt_bench"),
        ({"tasks": ["piqa"], "limit": 0}, "data.limit is 0: it must be at least 1"),
        ({"tasks": ["piqa"], "directory": "/nowhere"}, "data.directory: there is no directory /nowhere"),
        ({"tasks": ["piqa"], "context_length": 1}, "data.context_length is 1: it must be at least 2"),
    ],
)
def test_an_impossible_evaluation_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationData(tokenizer="mistral", **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleOptions(depths=[1.5]), "data.needle.depths is \\[1.5\\]: give shares from 0 to 1"),
        (lambda: NeedleOptions(trials=0), "data.needle.trials is 0: it must be at least 1"),
        (lambda: RetrievalOptions(passages=0), "data.retrieval.passages is 0: it must be at least 1"),
        (lambda: ChatOptions("x", new_tokens=0), "new_tokens is 0: it must be at least 1"),
    ],
)
def test_impossible_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_shown_is_what_is_asked(texts: Source, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "q.jsonl", {"question": "Where?", "answers": "Oslo", "passages": ["Oslo is."]})
    data = EvaluationData(
        str(save_tiny(tmp_path / "model")),
        texts={"wiki": texts},
        needle=NeedleOptions([160], depths=[0.5], haystack=texts, trials=2),
        retrieval=RetrievalOptions(str(questions)),
        context_length=160,
        cache_dir=str(tmp_path / "cache"),
    )
    text, needle, passages = data.shown_sources(1, 1000)
    rows, needles, asked = data.parts
    assert isinstance(rows, RunningText) and isinstance(needles, Needles) and isinstance(asked, PassageQuestions)
    assert [token.id for token in text.examples[0].tokens] == rows.ids_NT[0].tolist()
    assert text.marked_tokens == rows.ids_NT.size - len(rows.ids_NT)
    assert [token.id for token in needle.examples[0].tokens] == needles.needles[0].prompt_ids
    assert needles.needles[0].answer in needle.examples[0].notes[0]
    assert [token.id for token in passages.examples[0].tokens] == asked.questions[0].prompt_ids
    assert passages.examples[0].notes == ["accepted answers: Oslo; a passage holds it"]
