import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_danube.chat.preference_data import PreferenceData
from lightning_danube.chat.preferences import PreferenceSource
from lightning_danube.chat.rows import DoesNotFit, fit_chat, fit_pair
from lightning_danube.tokens.chat_template import ChatEncoder
from lightning_danube.tokens.tokenizer import load_hf_tokenizer
from lightning_danube.training.loaders import StepSampler
from tests.rows import write_rows
from tests.tiny_models import tiny_tokenizer


def write(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for n in range(count):
            prompt = []
            for turn in range(1 + n % 3):
                prompt += [{"role": "user", "content": f"question {n}.{turn} " + "why " * (n % 11)}]
                prompt += [{"role": "assistant", "content": "well, so so"}]
            row = {"prompt": prompt[:-1], "chosen": [{"role": "assistant", "content": f"good {n} " + "so " * (n % 7)}]}
            file.write(json.dumps(row | {"rejected": [{"role": "assistant", "content": f"bad {n}"}]}) + "\n")
    return path


def data(tmp_path: Path, count: int = 60, **options: Any) -> PreferenceData:
    path = tmp_path / "pairs.jsonl"
    if not path.exists():
        write(path, count)
    options = {"context_length": 96, "batch_pairs": 4, "micro_batch_size": 2, "held_out": 0.2} | options
    module = PreferenceData({"pairs": PreferenceSource(str(path))}, cache_dir=str(tmp_path / "cache"), **options)
    module.prepare_data()
    module.setup("fit")
    return module


def length_of_answers(batch: Any) -> Tensor:
    """Stands in for a model: what it says of an answer depends on that answer alone."""
    return (batch["labels"].clamp(min=0) * (1 + batch["input_ids"] % 7)).sum(1).view(-1, 2).double() / 1000


def test_a_limit_of_pairs_limits_the_tokens_of_a_run(tmp_path: Path) -> None:
    limited = {"pairs": PreferenceSource(str(write(tmp_path / "pairs.jsonl", 20)), max_pairs=7)}
    module = PreferenceData(limited, 96, batch_pairs=4, micro_batch_size=2, cache_dir=str(tmp_path / "cache"))
    # 7 pairs are 2 steps of 4 pairs, each of two answers with their prompt.
    assert module.most_tokens() == 2 * 4 * 2 * 96
    module.prepare_data()
    module.setup("fit")
    assert 0 < module.total_tokens <= 2 * 4 * 2 * 96
    assert data(tmp_path).most_tokens() is None


def test_each_pair_comes_once_in_a_pass_with_its_reference(tmp_path: Path) -> None:
    module = data(tmp_path)
    module.prepare_reference("a", length_of_answers)
    seen = []
    for batch in module.train_dataloader():
        there = (batch["labels"] >= 0).any(1).view(-1, 2)
        assert torch.equal(there[:, 0], there[:, 1])
        assert torch.equal(batch["reference"], length_of_answers(batch))
        for ids, labels in zip(
            batch["input_ids"].view(-1, 2, batch["input_ids"].shape[1]),
            batch["labels"].view(-1, 2, batch["labels"].shape[1]),
            strict=True,
        ):
            if (labels >= 0).any():
                chosen, rejected = (str(module.tokenizer.decode(side[side >= 0])) for side in labels)
                number = chosen.removesuffix("</s>").split()[1]
                # The end of an answer is learned with it; what came before it is not.
                assert chosen.startswith("good ") and chosen.endswith("</s>") and "question" not in chosen
                assert rejected == f"bad {number}</s>"
                assert f"question {number}." in module.tokenizer.decode(ids[0])
                seen.append(int(number))
    report = module.reports()["pairs"]
    assert len(seen) == len(set(seen)) == report["pairs"] - report["pairs_held_out"]
    held_out = [row for loader in module.val_dataloader() for batch in loader for row in batch["rows"] if row >= 0]
    assert len(held_out) == module.evaluation_pairs(None)["pairs"] == report["pairs_held_out"] > 0
    for loader in module.val_dataloader():
        for batch in loader:
            assert torch.equal(batch["reference"], length_of_answers(batch))


def test_a_step_counts_its_pairs_however_they_are_dealt(tmp_path: Path) -> None:
    module = data(tmp_path, count=57)
    counted = module.counted(module.train_chats)
    dealt = {}
    for micro_batch, replicas in [(4, 1), (1, 1), (2, 2), (1, 4)]:
        samplers = [
            StepSampler(module.passes, counted, micro_batch_size=micro_batch, replicas=replicas, replica=replica)
            for replica in range(replicas)
        ]
        micros = [micro for turn in zip(*samplers, strict=True) for micro in turn]
        rows = [row for micro in micros for row in micro]
        dealt[micro_batch, replicas] = rows
        for first in range(0, len(rows), 4):
            pairs = sum(map(len, rows[first : first + 4]))
            assert {m.step_labels for m in micros[first // micro_batch : (first + 4) // micro_batch]} == {pairs}
    assert all(rows == dealt[4, 1] for rows in dealt.values())
    assert sorted(pair for row in dealt[4, 1] for pair in row) == list(range(len(counted)))


def test_several_sources_keep_their_references_apart(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", 20), write(tmp_path / "b.jsonl", 33)
    sources = {"a": PreferenceSource(str(first)), "b": PreferenceSource(str(second))}
    module = PreferenceData(sources, 96, batch_pairs=4, held_out=0.3, cache_dir=str(tmp_path / "cache"))
    module.prepare_data()
    module.setup("fit")
    module.prepare_reference("a", length_of_answers)
    for batch in [*module.train_dataloader(), *(batch for loader in module.val_dataloader() for batch in loader)]:
        assert torch.equal(batch["reference"], length_of_answers(batch))
    # Both files hold the same first questions, which therefore stand on the same side in both.
    assert module.reports()["a"]["pairs_held_out"] <= module.reports()["b"]["pairs_held_out"]


def test_the_reference_is_computed_once_for_a_model(tmp_path: Path) -> None:
    module = data(tmp_path)
    module.prepare_reference("a", length_of_answers)
    first = module.reference
    assert (first.computed, first.reused) == (60, 0)

    def refuse(batch: Any) -> Tensor:
        raise AssertionError("computed twice")

    again = data(tmp_path, batch_pairs=2)
    again.prepare_reference("a", refuse)
    assert (again.reference.computed, again.reference.reused) == (0, 60)
    for place, values in first.values.items():
        assert np.array_equal(values, again.reference.values[place])
    again.prepare_reference("b", lambda batch: 2 * length_of_answers(batch))
    assert again.reference.computed == 60
    assert np.array_equal(again.reference.values["pairs", "train"], 2 * first.values["pairs", "train"])
    # Nothing half-written, and nothing that is not asked for by its own name.
    names = sorted(path.name for path in (tmp_path / "cache" / "pairs").rglob("*reference*"))
    assert names == [f"{split}-reference-{model}.npy" for split in ("train", "validation") for model in "ab"]


def test_other_pairs_are_other_references(tmp_path: Path) -> None:
    data(tmp_path).prepare_reference("a", length_of_answers)
    shorter = data(tmp_path, context_length=64)
    shorter.prepare_reference("a", length_of_answers)
    assert shorter.reference.reused == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: b"", lambda data: data[:20]])
def test_a_damaged_reference_is_named(tmp_path: Path, damage: Any) -> None:
    module = data(tmp_path)
    module.prepare_reference("a", length_of_answers)
    (path,) = (tmp_path / "cache").rglob("train-reference-a.npy")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-reference-a.npy is damaged .*: remove it, and it is made again"):
        module.prepare_reference("a", length_of_answers)


def test_a_reference_of_other_pairs_is_damage(tmp_path: Path) -> None:
    module = data(tmp_path)
    module.prepare_reference("a", length_of_answers)
    (path,) = (tmp_path / "cache").rglob("train-reference-a.npy")
    np.save(path, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"train-reference-a.npy is damaged .*: remove it"):
        module.prepare_reference("a", length_of_answers)


def test_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no reference log-probabilities, .* set model.class_path to .*PreferenceTun"):
        data(tmp_path).train_dataloader()
    with pytest.raises(ValueError, match=r"no reference log-probabilities"):
        data(tmp_path).val_dataloader()


def test_going_on_starts_at_the_next_step(tmp_path: Path) -> None:
    module = data(tmp_path, epochs=2)
    module.prepare_reference("a", length_of_answers)
    full = list(module.train_dataloader())
    assert module.total_tokens == len(full) // 2 * 4 * 2 * 96
    module.steps_done = 3
    for left, right in zip(full[6:], module.train_dataloader(), strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])


ENCODER = ChatEncoder(load_hf_tokenizer("mistral"))
OLD = [{"role": "user", "content": "one " * 20}, {"role": "assistant", "content": "two " * 20}]
ASKED = {"role": "user", "content": "three?"}


def test_turns_are_left_out_for_both_answers(tmp_path: Path) -> None:
    answers = ["short", "long " * 30]
    whole = fit_pair(ENCODER, [*OLD, ASKED], answers, 200, "drop_turns")
    assert [one.dropped_turns for one in whole] == [0, 0]
    # Room for the prompt with the short answer, not with the long one.
    room = len(whole[0].ids)
    for places in (room, len(whole[1].ids) - 2):
        short, long = fit_pair(ENCODER, [*OLD, ASKED], answers, places, "drop_turns")
        assert short.dropped_turns == long.dropped_turns == 2 and short.cut_tokens == long.cut_tokens == 0
        start = len(short.ids) - int(short.learned.sum())
        assert np.array_equal(short.ids[:start], long.ids[:start])
        assert "one" not in ENCODER.tokenizer.decode(short.ids)
    # A system message stays; Danube's template has none, so the first turn stands for it here.
    kept = fit_pair(ENCODER, [ASKED], answers, 30, "drop_turns")
    assert [one.cut_tokens > 0 for one in kept] == [False, True]


def test_answers_that_end_up_the_same_are_left_out() -> None:
    answers = ["so " * 30 + "good", "so " * 30 + "bad"]
    with pytest.raises(DoesNotFit, match="has answers that are the same within the first 31 tokens"):
        fit_pair(ENCODER, [ASKED], answers, 30, "drop_turns")
    with pytest.raises(DoesNotFit, match="tokens, 31 fit"):
        fit_pair(ENCODER, [ASKED], answers, 30, "skip")
    with pytest.raises(ValueError, match="writes the same for the chosen and the rejected answer"):
        fit_pair(ENCODER, [ASKED], ["so", " so"], 30, "drop_turns")


def test_bad_rows_are_refused_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", 30)
    with path.open("a") as file:
        file.write(json.dumps({"prompt": "Hi", "chosen": "x", "rejected": "x"}) + "\n")
        file.write(json.dumps({"system": "Be.", "prompt": "Hi", "chosen": "x", "rejected": "y"}) + "\n")
        file.write(json.dumps({"prompt": "y " * 200, "chosen": "x", "rejected": "y"}) + "\n")
    options: dict[str, Any] = {"context_length": 96, "held_out": 0.2, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"row 31: the chosen and the rejected answer are the same; on_bad_row: skip"):
        PreferenceData({"pairs": PreferenceSource(str(path))}, **options).prepare_data()
    assert not list((tmp_path / "cache").rglob("*.npy"))
    module = PreferenceData({"pairs": PreferenceSource(str(path), on_bad_row="skip")}, **options)
    module.prepare_data()
    report = module.reports()["pairs"]
    assert report["left_out"] == {"equal answers": 1, "refused by the template": 1, "too long": 1}
    assert "there is no system role" in report["first_left_out"][1]
    assert "no answer within the first 97" in report["first_left_out"][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.0}, r"data.held_out is 1.0: give a share between 0 and 1"),
        ({"batch_pairs": 0}, r"data.batch_pairs is 0: it must be at least 1"),
        ({"validation_pairs": 0}, r"data.validation_pairs is 0: it must be at least 1"),
        (
            {"count": 1, "held_out": 1e-9},
            r"'pairs' has 1 pair on one question, and training and validation need different questions: add pairs on",
        ),
        (
            {"held_out": 1 - 1e-9},
            r"all pairs are held out: add pairs on other questions, or lower data.held_out \(now 0.9",
        ),
        ({"context_length": 4}, r"holds no pair to learn from: .*no answer within the first 5"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **options)


def test_a_pair_is_as_long_as_its_longer_answer(tmp_path: Path) -> None:
    module = data(tmp_path)
    chats = module.train_chats
    longer = [max(chats.places[2 * pair : 2 * pair + 2]) for pair in range(len(chats) // 2)]
    assert module.lengths(chats).tolist() == longer
    assert any(chats.places[2 * pair] != chats.places[2 * pair + 1] for pair in range(len(longer)))


@pytest.mark.parametrize("changed", [{"too_long": "cut"}, {"context_length": 95}, {"held_out": 0.3}], ids=str)
def test_what_decides_the_encoding_decides_the_fingerprint(tmp_path: Path, changed: dict[str, Any]) -> None:
    path, found = write(tmp_path / "pairs.jsonl", 6), []
    for options in ({}, {"batch_pairs": 4, "seed": 3}, changed):
        options = {"context_length": 96, "held_out": 0.2} | options
        sources = {"pairs": PreferenceSource(str(path))}
        found.append(PreferenceData(sources, cache_dir=str(tmp_path), **options).fingerprint("pairs"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_replicas_share_the_work_of_the_reference(tmp_path: Path, micro_batch_size: int) -> None:
    module = data(tmp_path, count=33, micro_batch_size=micro_batch_size)
    chats = module.train_chats
    whole, asked, parts = module._compute(chats, length_of_answers), [0, 0, 0], []
    assert (whole != 0).all()
    for rank in range(3):

        def counted(batch: Any, rank: int = rank) -> Tensor:
            asked[rank] += len(batch["labels"]) // 2
            return length_of_answers(batch)

        strategy = SimpleNamespace(reduce=lambda values, reduce_op: values, root_device="cpu")
        ranks = {"num_replicas": 3, "rank": rank}
        trainer = SimpleNamespace(distributed_sampler_kwargs=ranks, is_global_zero=False, strategy=strategy)
        module.trainer = trainer  # type: ignore[assignment]
        parts.append(module._compute(chats, counted))
    assert np.array_equal(sum(parts), whole)
    assert sum(asked) == len(whole) and max(asked) - min(asked) <= 1


SPOKEN = ChatEncoder(tiny_tokenizer())
SYSTEM = {"role": "system", "content": "Be brief."}


def ids_of(*messages: dict[str, str]) -> list[int]:
    return SPOKEN.encode(messages).ids


def test_the_system_message_of_a_long_pair_stays() -> None:
    prompt, answers = [SYSTEM, *OLD, ASKED], ["short", "long " * 30]
    said = [{"role": "assistant", "content": answer} for answer in answers]
    room = len(ids_of(*prompt, said[0])) - 1
    found = fit_pair(SPOKEN, prompt, answers, room, "drop_turns")
    assert [one.ids.tolist() for one in found] == [ids_of(SYSTEM, ASKED, answer) for answer in said]
    assert [one.dropped_turns for one in found] == [2, 2] and not any(one.cut_tokens for one in found)


def test_a_system_message_is_no_turn_to_drop() -> None:
    turns = [SYSTEM, *OLD, ASKED, {"role": "assistant", "content": "four " * 9}]
    last = ids_of(SYSTEM, *turns[3:])
    found = fit_chat(SPOKEN, turns, len(last) - 1, "drop_turns", "all")
    assert found.ids.tolist() == last and (found.dropped_turns, found.cut_tokens) == (2, 0)
    found = fit_chat(SPOKEN, turns, len(last) - 6, "drop_turns", "all")
    assert found.ids.tolist() == last[:-5] and (found.dropped_turns, found.cut_tokens) == (2, 5)


def test_both_answers_of_a_pair_are_shown(tmp_path: Path) -> None:
    row = {"prompt": "Which?", "chosen": "This one.", "rejected": "That one, or not."}
    file = write_rows(tmp_path / "pairs.jsonl", row)
    module = PreferenceData({"pairs": PreferenceSource(str(file))}, 64, cache_dir=str(tmp_path / "cache"))
    (shown,) = module.shown_sources(2, 1000)
    chosen, rejected = shown.examples
    assert [one.title for one in shown.examples] == [f"{file}, row 1, chosen", f"{file}, row 1, rejected"]
    for one, answer in ((chosen, "This one."), (rejected, "That one, or not.")):
        assert "".join(token.text for token in one.tokens if token.marked) == f"{answer}</s>"
