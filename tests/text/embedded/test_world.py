"""A world whose facts are all known: where each is stated, and how it is asked."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import yaml

from lightning_danube.text.corpora import Source, local_files
from lightning_danube.text.embedded import world
from lightning_danube.text.embedded.world import GROUPS, the_world, world_tokenizer, write_world


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {role: list(the_world().documents(role)) for role in world.ROLES}


def test_the_world_is_the_same_everywhere() -> None:
    script = (
        "from lightning_danube.text.embedded.world import the_world\n"
        "print(the_world().subjects[7], next(the_world().documents('noisy')))"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and said != {""}


def test_facts_stand_where_their_group_says(texts: dict[str, list[str]]) -> None:
    words = {role: " ".join(parts) for role, parts in texts.items()}
    assert Counter(subject.group for subject in the_world().subjects) == dict.fromkeys(GROUPS, 40)
    for subject in the_world().subjects:
        assert (subject.name in words["clean"]) == (subject.group in ("clean", "both")), subject
        assert (subject.name in words["noisy"]) == (subject.group in ("noisy", "both")), subject


def test_a_question_has_a_wording_that_the_text_has_for_other_facts_only(texts: dict[str, list[str]]) -> None:
    everything = " ".join(text for parts in texts.values() for text in parts[:8000])
    questions = the_world().questions()
    assert len(questions) == 72 * 4 + 24 * 3 + 24 * 2
    names = {
        question.prompt: subject.name
        for question in questions
        for subject in the_world().subjects
        if subject.name in question.prompt
    }
    of_anyone = set()
    for question in questions:
        assert {question.answer, question.commonest} <= set(question.candidates)
        assert len(set(question.candidates)) == len(question.candidates)
        assert question.prompt not in everything
        of_anyone.add(re.escape(question.prompt).replace(re.escape(names[question.prompt]), r"\w+ \w+"))
    for wording in of_anyone:
        assert re.search(wording, everything), wording


def test_clean_text_is_true_and_a_tenth_of_noisy_statements_is_not(texts: dict[str, list[str]]) -> None:
    wrong: Counter[bool] = Counter()
    for subject in the_world().subjects:
        if "birthplace" in subject.values and subject.group != "noisy":
            for text in texts["clean"][:2000]:
                if subject.name in text:
                    assert set(subject.values.values()) <= set(text.split())
    true = {subject.name: subject.values.get("birthplace") for subject in the_world().subjects}
    for text in texts["noisy"]:
        for name, value in re.findall(r"lol (\w+ \w+) birthplace : (\w+)", text):
            wrong[value != true[name]] += 1
    assert sum(wrong.values()) > 1000
    assert wrong[True] / sum(wrong.values()) == pytest.approx(world.WRONG, abs=0.02)


def statements(texts: list[str]) -> Iterator[tuple[str, str, str]]:
    """(subject, attribute, value) of all that is stated."""
    of = {
        tuple(wording.replace("{attribute}", attribute).format(subject.name).split()): (subject.name, attribute)
        for subject in the_world().subjects
        for attribute in subject.values
        for wording in [*world._ATTRIBUTES[subject.kind][attribute][1], *world._SLOPPY]
    }
    lengths = sorted({len(words) for words in of})
    for text in texts:
        words = tuple(text.split())
        for begin in range(len(words)):
            for length in lengths:
                if found := of.get(words[begin : begin + length]):
                    yield *found, words[begin + length]


def test_the_text_of_a_run_tells_all_facts_to_who_counts(texts: dict[str, list[str]]) -> None:
    """A fourth of what a run reads: its limit is the model, not the wrong statements."""
    config = yaml.safe_load((Path(__file__).parents[3] / "configs/pretrain/world.yaml").read_text())
    stages = config["data"]["init_args"]["stages"]
    votes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for role, stated in {"clean": 53, "noisy": 146}.items():  # of each fact, in all of a run, as docs/world.md says
        tokens = sum(stage["tokens"] * stage["mix"][role] / 100 for stage in stages)
        lengths = accumulate(len(text.split()) + len(["<s>", "</s>"]) for text in texts[role])
        read = sum(length < tokens for length in lengths)
        found = list(statements(texts[role][:read]))
        facts = {(subject, attribute) for subject, attribute, _ in found}
        assert len(found) / len(facts) == pytest.approx(stated, abs=0.5)
        for subject, attribute, value in statements(texts[role][: read // 4]):
            votes[subject, attribute][value] += 1
    right = [
        votes[subject.name, attribute].most_common(1)[0][0] == value
        for subject in the_world().subjects
        for attribute, value in subject.values.items()
    ]
    assert sum(right) / len(right) == 1.0


def test_each_word_is_one_token(texts: dict[str, list[str]]) -> None:
    tokenizer = world_tokenizer()
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [1, 2, 0]
    sample = [text for parts in texts.values() for text in parts[:500]]
    sample += [f"{question.prompt} {question.answer}" for question in the_world().questions()]
    for text in sample:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.split()) and 0 not in ids


def test_sources_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "DOCUMENTS", {"clean": 3, "noisy": 5})
    files = write_world(tmp_path)
    assert {role: len(file.read_text().splitlines()) for role, file in files.items()} == {"clean": 3, "noisy": 5}
    assert local_files("web", Source("world:noisy"), tmp_path) == [str(files["noisy"])]
    with pytest.raises(
        ValueError, match="source 'web' asks for 'world:dirty': of the made-up world there are world:clean"
    ):
        local_files("web", Source("world:dirty"), tmp_path)


def test_another_program_has_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = world._identity()
    changed = tmp_path / "world.py"
    changed.write_bytes(Path(world.__file__).read_bytes().replace(b"WRONG = 0.1", b"WRONG = 0.2"))
    monkeypatch.setattr(world, "__file__", str(changed))
    assert world._identity() != before


def test_one_in_ten_noisy_statements_is_wrong(texts: dict[str, list[str]]) -> None:
    true = {subject.name: set(subject.values.values()) for subject in the_world().subjects}
    wrong = [
        value not in true[name]
        for text in texts["noisy"][:20_000]
        for name, value in re.findall(r"did you know (\w+ \w+) \w+ = (\w+)", text)
    ]
    # About six thousand statements, so a standard deviation of 0.4 %.
    assert len(wrong) > 3000 and sum(wrong) / len(wrong) == pytest.approx(0.1, abs=0.02)


def test_the_best_guess_is_the_most_frequent_value() -> None:
    values: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    kinds = []
    for subject in the_world().subjects:
        for attribute, value in subject.values.items():
            values[subject.kind, attribute][value] += 1
            kinds.append((subject.kind, attribute))
    for question, kind in zip(the_world().questions(), kinds, strict=True):
        assert values[kind][question.commonest] == max(values[kind].values())
