"""Answers are graded once, at a known cost. The judge itself: test_judge.py; whole runs: test_run.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.evaluation.grading import Grader, graded_rows, gradings_of
from lightning_danube.evaluation.judge import ChatJudge, Judgement
from lightning_danube.evaluation.parts.chat import ChatQuestion
from lightning_danube.evaluation.results import Measured


class Part:
    """Two questions of two turns, as a part of an evaluation."""

    benchmark, title = "mt_bench", "MT-Bench"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.questions = [
            ChatQuestion(name, category, [], ["first?", "second?"], ["the truth"])
            for name, category in (("1", "maths"), ("2", "writing"))
        ]

    def file(self, kind: str) -> Path:
        return self.directory / f"mt_bench-{kind}.jsonl"


class FakeJudge(ChatJudge):
    """Grades an answer by its length, and cannot grade an empty answer."""

    def judge(self, messages: Any) -> Judgement:
        answer = messages[-1]["content"].partition("### Answer to grade\n")[2].partition("\n")[0]
        ungraded = "empty" in answer
        return Judgement(None if ungraded else float(len(answer)), answer, 1, "no grade" if ungraded else None)


RECORDS: list[dict[str, Any]] = [{"answers": ["aaaa", "bb"]}, {"answers": ["cccccc", ""]}]


def grader(**options: Any) -> Grader:
    return Grader(FakeJudge("http://localhost:1/v1", "judge"), **options)


def grade(part: Any, grader: Grader) -> tuple[list[tuple[Any, Judgement]], list[str]]:
    said: list[str] = []
    found = grader.grade(
        part, gradings_of(part, RECORDS), "mine", tell=said.append, on_progress=lambda *facts: said.append(str(facts))
    )
    return found, said


def test_each_turn_is_graded_with_what_was_said_before(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    gradings = gradings_of(part, RECORDS)
    assert [(grading.question, grading.turn) for grading in gradings] == [("1", 0), ("1", 1), ("2", 0), ("2", 1)]
    second = gradings[1].messages[-1]["content"]
    assert "first?" in second and "aaaa" in second and "### Answer to grade\nbb" in second
    # Only the first turn has a reference.
    assert "the truth" in gradings[0].messages[-1]["content"] and "the truth" not in second


def test_judgements_are_kept_and_those_without_a_grade_are_made_again(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    found, said = grade(part, grader(at_once=2))
    assert [judgement.score for _, judgement in found] == [4.0, 2.0, 6.0, None]
    assert said[0].startswith("  MT-Bench: 4 judgements by judge, about ") and said[0].endswith("; no price is given")
    assert said[-1] == "('MT-Bench, judged', 4, 4)"
    kept = [json.loads(line) for line in part.file("judgements").read_text().splitlines()]
    assert {(row["question"], row["turn"], row["weights"], row["judge"]) for row in kept} == {
        (question, turn, "mine", "judge") for question in "12" for turn in (0, 1)
    }
    again, said = grade(part, grader())
    assert [judgement.score for _, judgement in again] == [4.0, 2.0, 6.0, None]
    assert said[0].startswith("  MT-Bench: 1 judgement by judge (3 are there from before)")


def test_nothing_is_sent_that_costs_too_much(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    with pytest.raises(ValueError, match=r"judging MT-Bench would cost about .* dollars, above the judge's most_doll"):
        grade(part, grader(price_in=1e6, price_out=1e6, most_dollars=1.0))
    assert not part.file("judgements").exists()


def test_rows_are_means_of_the_answers_that_have_a_grade(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    row = Measured("chat", "mt_bench", "MT-Bench", "greedy", records=RECORDS, notes=["cut"])
    first, second, both = graded_rows(part, row, grade(part, grader())[0], "judge")
    values = [found.estimate and found.estimate.value for found in (first, second, both)]
    assert values == [5.0, 2.0, 4.0]
    assert [found.name for found in (first, second, both)] == ["mt_bench_turn_1", "mt_bench_turn_2", "mt_bench"]
    assert both.more["by_category"] == {"maths": {"score": 3.0, "n": 2}, "writing": {"score": 6.0, "n": 1}}
    assert both.more["ungraded"] == 1 and both.notes[0] == "cut"
    assert both.notes[-1] == "1 of 4 answers have no grade and count nowhere (no grade)"
    assert [len(record["judgements"]) for record in both.records] == [2, 2]


def test_the_judge_sees_the_conversation_up_to_the_graded_answer_alone(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    told = [grading.messages[-1]["content"] for grading in gradings_of(part, RECORDS)]
    first, second = (["User\nfirst?", "Answer to grade\naaaa"], ["User\nfirst?", "Assistant\naaaa", "User\nsecond?"])
    for text, wanted, unwanted in (
        (told[0], first, ["second?", "bb", "cccccc"]),
        (told[1], [*second, "Answer to grade\nbb"], ["cccccc", "the truth"]),
        (told[3], ["Assistant\ncccccc", "User\nsecond?", "Answer to grade\n(the answer is empty)"], ["aaaa", "bb"]),
    ):
        places = [text.index(f"### {piece}\n") for piece in wanted]
        assert places == sorted(places) and not any(piece in text for piece in unwanted)


def test_what_is_judged_already_costs_nothing(tmp_path: Path) -> None:
    part: Any = Part(tmp_path)
    grade(part, grader())
    # About 300 tokens and 512 of the reply for each: one new judgement costs 0.0008 dollars, four cost 0.0032.
    found, said = grade(part, grader(price_in=1.0, price_out=1.0, most_dollars=0.0015))
    assert len(found) == 4 and said[0].endswith("and up to 512 out; at most about 0.00 dollars")
    with pytest.raises(ValueError, match="would cost about"):
        grade(Part(tmp_path / "new"), grader(price_in=1.0, price_out=1.0, most_dollars=0.0015))
