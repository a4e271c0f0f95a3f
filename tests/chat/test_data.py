import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_danube.chat.conversations import ConversationSource
from lightning_danube.chat.data import ChatData, EncodedChats, joined
from lightning_danube.chat.rows import FittedChat
from lightning_danube.model import Decoder, DecoderConfig, next_token_loss
from lightning_danube.tokens.chat_template import DANUBE_TEMPLATE, ChatEncoder
from lightning_danube.training.loaders import StepSampler
from lightning_danube.training.planned_data import tokens_of_steps
from tests.rows import write_rows


def write(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for n in range(count):
            turns = []
            for turn in range(1 + n % 3):
                turns += [
                    {"role": "user", "content": f"question {n}.{turn} " + "why " * (n % 11)},
                    {"role": "assistant", "content": f"answer {n}.{turn} " + "so " * (n % 7)},
                ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def data(tmp_path: Path, count: int = 60, **options: Any) -> ChatData:
    sources = {"talk": ConversationSource(str(write(tmp_path / "talk.jsonl", count)))}
    options = {"context_length": 96, "batch_rows": 4, "micro_batch_size": 2, "held_out": 0.2} | options
    module = ChatData(sources, cache_dir=str(tmp_path / "cache"), **options)
    module.prepare_data()
    module.setup("fit")
    return module


def batches(module: ChatData) -> list[dict[str, Any]]:
    return list(module.train_dataloader())


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_each_answer_is_learned_once_in_a_pass(tmp_path: Path, layout: str) -> None:
    module = data(tmp_path, layout=layout)
    found = sum(int((batch["labels"] >= 0).sum()) for batch in batches(module))
    assert found == module.train_chats.labels.sum() > 0
    report = module.reports()["talk"]
    held_out = module.evaluation_tokens(None)["talk"]
    assert found + held_out == report["answer_tokens"]
    assert report["conversations"] == 60 and 0 < report["conversations_held_out"] < 30
    text = module.tokenizer.decode(torch.cat([b["labels"][b["labels"] >= 0] for b in batches(module)]))
    assert "answer" in text and "question" not in text and "<|prompt|>" not in text


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_limits_of_the_sources_limit_the_tokens_of_a_run_before_they_are_read(tmp_path: Path, layout: Any) -> None:
    path = str(write(tmp_path / "talk.jsonl", 60))
    limited = {
        "one": ConversationSource(path, max_conversations=9),
        "two": ConversationSource(path, max_conversations=5),
    }
    options: dict[str, Any] = {"context_length": 96, "batch_rows": 4, "micro_batch_size": 2, "epochs": 3}
    module = ChatData(limited, cache_dir=str(tmp_path / "cache"), layout=layout, **options)
    # 14 conversations are at most 4 steps of 4 rows in each of 3 epochs.
    assert module.most_tokens() == 3 * 4 * 4 * 96 and not (tmp_path / "cache").exists()
    module.prepare_data()
    module.setup("fit")
    assert 0 < module.total_tokens <= 3 * 4 * 4 * 96
    unlimited = limited | {"three": ConversationSource(path)}
    assert ChatData(unlimited, cache_dir=str(tmp_path / "cache"), **options).most_tokens() is None


def test_files_that_change_while_a_run_reads_them_are_those_it_began_with(tmp_path: Path) -> None:
    module = data(tmp_path)
    before, directory = module.reports(), module._directory("talk")
    write(tmp_path / "talk.jsonl", 70)
    assert (module.reports(), module._directory("talk")) == (before, directory)
    assert data(tmp_path, 70)._directory("talk") != directory


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_a_step_counts_the_same_however_it_is_dealt(tmp_path: Path, layout: str) -> None:
    module = data(tmp_path, layout=layout)
    labels = module.train_chats.labels
    dealt = {}
    for micro_batch, replicas in [(4, 1), (1, 1), (2, 2), (1, 4)]:
        samplers = [
            StepSampler(module.passes, labels, micro_batch_size=micro_batch, replicas=replicas, replica=replica)
            for replica in range(replicas)
        ]
        assert len({len(sampler) for sampler in samplers}) == 1
        turns = [micro for turn in zip(*samplers, strict=True) for micro in turn]
        assert len(turns) == len(samplers[0]) * replicas
        rows = [row for micro in turns for row in micro]
        dealt[micro_batch, replicas] = rows
        for first in range(0, len(rows), 4):
            in_step = int(labels[[chat for row in rows[first : first + 4] for chat in row]].sum())
            per_turn = 4 // micro_batch
            assert {m.step_labels for m in turns[first // 4 * per_turn :][:per_turn]} == {in_step}
    assert all(rows == dealt[4, 1] for rows in dealt.values())


def test_going_on_starts_at_the_next_step(tmp_path: Path) -> None:
    module = data(tmp_path, epochs=2)
    assert module.total_steps == sum(one.steps for one in module.passes)
    full = batches(module)
    module.steps_done = 3
    for left, right in zip(full[6:], batches(module), strict=True):
        assert torch.equal(left["input_ids"], right["input_ids"])


def test_a_packed_row_has_the_loss_and_gradients_of_its_conversations(tmp_path: Path) -> None:
    """In float64, so that the order of sums leaves 1e-12 of anything that is really different."""
    packed, single = (data(tmp_path, layout=layout, batch_rows=2) for layout in ("packed", "bucketed"))
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(32, 48, 2, 4, 2, vocab_size=packed.vocab_size, max_position_embeddings=96)).double()
    row = next(row for row in packed.passes[0].rows if len(row) > 1)
    together = packed.train_chats.row(row, 96)
    results = []
    for rows in ([together], [single.train_chats.row([chat], 96) for chat in row]):
        decoder.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for one in rows:
            ids, positions, documents, labels = (
                one[name][None] for name in ("input_ids", "position_ids", "document_ids", "labels")
            )
            hidden = decoder.hidden_states(ids, positions, documents)
            total = total + next_token_loss(hidden, decoder.lm_head.weight, labels)[0]
        total.backward()
        results.append((float(total.detach()), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]))
    (packed_loss, packed_gradients), (single_loss, single_gradients) = results
    assert packed_loss == pytest.approx(single_loss, rel=1e-12)
    for left, right in zip(packed_gradients, single_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


def test_encoding_happens_once_and_anew_for_other_files(tmp_path: Path) -> None:
    module = data(tmp_path)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    again = data(tmp_path, layout="bucketed")
    # write() replaced the file by the same content at another time: that is another file.
    assert len(list((tmp_path / "cache" / "conversations").iterdir())) == 2
    assert np.array_equal(module.train_chats.ids, again.train_chats.ids)
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_bad_rows_are_refused_or_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", 30)
    with path.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
        file.write(
            json.dumps({"messages": [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]}) + "\n"
        )
        file.write(json.dumps({"messages": [{"role": r, "content": "y " * 200} for r in ("user", "assistant")]}) + "\n")
    options: dict[str, Any] = {"context_length": 96, "held_out": 0.2, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"row 31: the last message is not the assistant's; on_bad_row: skip leaves"):
        ChatData({"talk": ConversationSource(str(path))}, **options).prepare_data()
    assert not list((tmp_path / "cache").rglob("*.npy"))
    module = ChatData({"talk": ConversationSource(str(path), on_bad_row="skip")}, **options)
    module.prepare_data()
    report = module.reports()["talk"]
    assert report["left_out"] == {"last turn not the assistant's": 1, "refused by the template": 1, "too long": 1}
    assert "there is no system role" in report["first_left_out"][1]
    assert "no answer within the first 97" in report["first_left_out"][2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.0}, r"data.held_out is 0.0: give a share between 0 and 1"),
        ({"context_length": 0}, r"data.context_length is 0: it must be at least 1"),
        ({"epochs": 0}, r"data.epochs is 0: it must be at least 1"),
        (
            {"count": 1, "held_out": 1e-9},
            r"has 1 conversation on one question, and training and validation need different questions: add conv",
        ),
        ({"context_length": 4}, r"holds no conversation to learn from: .*no answer within the first 5"),
        ({"tokenizer": "/nowhere"}, r"no tokenizer directory '/nowhere'"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **options)


def test_of_few_conversations_one_question_is_held_out(tmp_path: Path) -> None:
    module = data(tmp_path, held_out=1e-9)
    module.setup("fit")
    (report,) = module.reports().values()
    assert (report["conversations"], report["conversations_held_out"]) == (60, 1)
    assert (len(module._validation["talk"]), len(module.train_chats)) == (1, 59)


def test_damage_is_named(tmp_path: Path) -> None:
    module = data(tmp_path)
    (path,) = (tmp_path / "cache").rglob("train-ids.npy")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"is damaged .*: remove it, and it is made again"):
        module.setup("fit")


# --- what the encoded conversations are kept by -----------------------------------------------------------------------


def unread(path: Path, *, source: dict[str, Any] | None = None, **options: Any) -> ChatData:
    """A data module that has read nothing yet."""
    sources = {"talk": ConversationSource(str(path), **(source or {}))}
    options = {"context_length": 96, "held_out": 0.2} | options
    return ChatData(sources, cache_dir=str(path.parent / "cache"), **options)


@pytest.mark.parametrize(
    "changed",
    [
        {"context_length": 95},
        {"learned": "last"},
        {"too_long": "cut"},
        {"held_out": 0.3},
        {"source": {"max_conversations": 5}},
        {"source": {"drop_leading_answers": True}},
        {"source": {"columns": {"messages": "messages"}}},
        {"source": {"on_bad_row": "skip"}},
        {"tokenizer": "danube-small"},
    ],
    ids=str,
)
def test_what_decides_the_encoding_decides_the_fingerprint(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = write(tmp_path / "talk.jsonl", 6)
    before = unread(path).fingerprint("talk")
    assert unread(path, layout="bucketed", batch_rows=2, epochs=3, seed=7).fingerprint("talk") == before
    assert unread(path, **changed).fingerprint("talk") != before


def test_another_template_or_file_is_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", 6)
    module = unread(path)
    tokenizer = copy.deepcopy(module.tokenizer)
    tokenizer.chat_template = DANUBE_TEMPLATE
    module.encoder = ChatEncoder(tokenizer)
    before = unread(path).fingerprint("talk")
    assert module._fingerprint_now("talk") == before
    tokenizer.chat_template = DANUBE_TEMPLATE.replace("<|answer|>", "<|reply|>")
    assert module._fingerprint_now("talk") != before
    write(path, 7)
    assert unread(path).fingerprint("talk") != before


@pytest.mark.parametrize("changed", [{"seed": 1}, {"batch_rows": 2}, {"layout": "bucketed"}, {"context_length": 95}])
def test_a_run_goes_on_only_in_the_same_order(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = write(tmp_path / "talk.jsonl", 6)
    options: dict[str, Any] = {"micro_batch_size": 2, "seed": 0, "batch_rows": 4, "layout": "packed"}
    first, other = unread(path, **options), unread(path, **options | changed)
    state = {"order": json.loads(json.dumps(first.order())), "steps": 3}
    for module in (first, other):
        module.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    first.load_state_dict(state)
    assert first.steps_done == 3
    key = "sources" if "context_length" in changed else next(iter(changed))
    with pytest.raises(ValueError, match=rf"data.{key} is .*, the run began with .*: set it back"):
        other.load_state_dict(state)
    assert other.steps_done == 0


def test_weights_and_early_answers_are_counted(tmp_path: Path) -> None:
    def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": text, **more}

    plain = [turn("user", "why"), turn("assistant", "so"), turn("user", "and"), turn("assistant", "no more")]
    rows = [
        [plain[0], {**plain[1], "weight": 0}, *plain[2:]],
        [turn("assistant", "early"), *plain],
        [*plain[:3], {**plain[3], "weight": 0}],
    ]
    path = write_rows(tmp_path / "talk.jsonl", *({"messages": row} for row in rows))

    def report(**options: Any) -> dict[str, Any]:
        source = {"drop_leading_answers": True, "on_bad_row": "skip"}
        module = unread(path, source=source, held_out=0.5, **options)
        module.prepare_data()
        return module.reports()["talk"]

    found = report()
    assert (found["conversations"], found["answers_not_learned"], found["dropped_leading_answers"]) == (3, 2, 1)
    last = report(learned="last")
    assert last["conversations"] == 2 and last["left_out"] == {"nothing to learn": 1}
    assert last["first_left_out"] == [
        f"{path}, row 3: the weight of the last answer is 0, and learned: last counts no other"
    ]


def test_conversations_with_one_first_question_stand_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    rows = [{"prompt": f"question {n % 12}", "response": f"answer {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = unread(path)
    module.prepare_data()
    module.setup("fit")
    asked = []
    for chats in (module.train_chats, module._validation["talk"]):
        parts = np.split(np.asarray(chats.ids), chats.ends[1:-1])
        asked.append({str(module.tokenizer.decode(ids)).partition("</s>")[0] for ids in parts})
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    assert len(asked[0] | asked[1]) == 12


@pytest.mark.parametrize("questions", [60, 2])
def test_a_held_out_conversation_knows_its_row_and_its_id(questions: int, tmp_path: Path) -> None:
    """With two questions none is below the border, so the lowest topic is held out."""
    rows = [
        {"prompt": f"question {n % questions}", "response": f"answer {n}"} | ({"id": f"row {n}"} if n % 2 else {})
        for n in range(60)
    ]
    path = write_rows(tmp_path / "talk.jsonl", *rows)
    module = unread(path, held_out=0.2 if questions > 2 else 1e-9)
    module.prepare_data()
    module.setup("validate")
    found = 0
    for loader in module.predict_dataloader():
        for batch in loader:
            for ids, place in zip(batch["input_ids"], batch["origins"], strict=True):
                row = rows[place["row"] - 1]
                assert f"{row['prompt']}</s>" in str(module.tokenizer.decode(ids)) and row["response"] in str(
                    module.tokenizer.decode(ids)
                )
                assert (
                    place["file"] == str(path) and place.get("id") == row.get("id") and len(place) == 2 + ("id" in row)
                )
                found += 1
    assert 0 < found == len(module._validation["talk"]) < 60


# --- rows and batches -------------------------------------------------------------------------------------------------


def chats_of(*learned: list[int]) -> EncodedChats:
    """Conversations with ids 10, 11 and so on."""
    counts = [len(one) for one in learned]
    marks = np.array([mark for one in learned for mark in one], bool)
    return EncodedChats(np.arange(10, 10 + sum(counts)), marks, np.cumsum([0, *counts]))


def test_a_row_predicts_each_learned_token_from_the_token_before_it() -> None:
    chats = chats_of([1, 0, 1, 1], [0, 1, 0])
    # The first token of a conversation has no token before it.
    assert chats.labels.tolist() == [2, 1] and chats.places.tolist() == [3, 2]
    row = {name: values.tolist() for name, values in chats.row([1, 0], 7).items()}
    assert row == {
        "input_ids": [14, 15, 10, 11, 12, 0, 0],
        "labels": [15, -100, -100, 12, 13, -100, -100],
        "document_ids": [1, 1, 2, 2, 2, 0, 0],
        "position_ids": [0, 1, 0, 1, 2, 0, 0],
    }


def test_joined_sources_are_their_conversations_one_after_the_other() -> None:
    parts = [chats_of([0, 1, 1], [0, 1]), chats_of([0, 0, 1])]
    both = joined(parts)
    rows = [part.row([chat], 2) for part in parts for chat in range(len(part))]
    assert len(both) == len(rows) == 3
    for chat, row in enumerate(rows):
        assert all(torch.equal(values, row[name]) for name, values in both.row([chat], 2).items())


def test_ids_of_a_large_vocabulary_keep_their_values(tmp_path: Path) -> None:
    module = unread(write(tmp_path / "talk.jsonl", 6))
    for size, ids in ((2**16, [1, 2**16 - 1]), (2**16 + 1, [1, 2**16])):
        module.vocab_size = size
        module._fingerprints["talk"] = str(size)
        chat = FittedChat(np.array(ids, np.int32), np.array([False, True]), 0, 0)
        module._write("talk", {"train": [chat], "validation": []}, {}, [])
        assert module._open("talk", "train").ids.tolist() == ids


def test_each_pass_has_an_order_of_its_own(tmp_path: Path) -> None:
    module = data(tmp_path, epochs=2, layout="bucketed")
    first, second = (one.rows for one in module.passes)
    assert first != second
    assert sorted(row for row in first if row) == sorted(row for row in second if row)


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_the_fill_is_the_share_of_places_with_a_token(tmp_path: Path, layout: str) -> None:
    module = data(tmp_path, epochs=2, layout=layout)
    places = tokens = 0
    for one in module.passes:
        for step in range(one.steps):
            rows = one.rows[step * 4 : step * 4 + 4]
            lengths = [[int(module.train_chats.places[chat]) for chat in row] for row in rows]
            tokens += sum(map(sum, lengths))
            places += 4 * (96 if layout == "packed" else max(map(sum, lengths)))
    assert module.fill() == pytest.approx(tokens / places)


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_the_tokens_of_steps_are_the_places_of_their_batches_without_padding(tmp_path: Path, layout: str) -> None:
    module = data(tmp_path, layout=layout, epochs=2)
    # No text of these has the id of padding, 0. Two micro-batches make a step.
    tokens = [int((batch["input_ids"] != 0).sum()) for batch in batches(module)]
    steps = [sum(tokens[n : n + 2]) for n in range(0, len(tokens), 2)]
    assert len(steps) == module.total_steps and len(set(steps)) > 3
    for first, behind in ((0, 0), (0, 1), (2, 5), (0, len(steps))):
        assert tokens_of_steps(module, first, behind) == sum(steps[first:behind])
    padded = sum(batch["input_ids"].numel() for batch in batches(module))
    assert sum(steps) < padded <= module.total_tokens


def test_a_limit_takes_the_first_held_out_conversations(tmp_path: Path) -> None:
    module = data(tmp_path, validation_conversations=5)
    (limited,), (all_of_them,) = module.val_dataloader(), module.test_dataloader()
    rows = [row for batch in limited for row in batch["rows"]]
    assert sorted(rows) == list(range(5))
    lengths = module._validation["talk"].places[rows]
    assert (np.diff(lengths) <= 0).all() and len(set(lengths)) > 1
    for loader, limit in ((limited, 5), (all_of_them, None)):
        counted = sum(int((batch["labels"] >= 0).sum()) for batch in loader)
        assert counted == module.evaluation_tokens(limit)["talk"]
    assert module.evaluation_tokens(5)["talk"] < module.evaluation_tokens(None)["talk"]


def test_replicas_have_equally_many_batches_and_each_row_once(tmp_path: Path) -> None:
    module = data(tmp_path, validation_conversations=7, micro_batch_size=1)
    dealt = []
    for rank in range(3):
        replicas = {"num_replicas": 3, "rank": rank}
        module.trainer = SimpleNamespace(distributed_sampler_kwargs=replicas)  # type: ignore[assignment]
        (loader,) = module.val_dataloader()
        dealt.append([row for batch in loader for row in batch["rows"]])
    assert [len(rows) for rows in dealt] == [3, 3, 3]
    rows = [row for rank in dealt for row in rank]
    assert sorted(row for row in rows if row >= 0) == list(range(7)) and rows.count(-1) == 2


def test_what_is_shown_is_what_the_batches_hold(tmp_path: Path) -> None:
    module = data(tmp_path, layout="bucketed", context_length=40)
    (shown,) = module.shown_sources(100, 1000)
    assert (shown.read, shown.kept, shown.complete) == (60, 60, True)
    report = module.reports()["talk"]
    assert (shown.tokens, shown.over_limit[1]) == (report["tokens"], report["shortened_conversations"])
    assert shown.over_limit[1] > 0
    learned = sorted([token.id for token in one.tokens if token.marked] for one in shown.examples)
    loaders = [*module.test_dataloader(), module.train_dataloader()]
    rows = [row for loader in loaders for batch in loader for row in batch["labels"]]
    # The last batch may have empty rows.
    assert learned == sorted(row[row >= 0].tolist() for row in rows if (row >= 0).any())
    assert sum(map(len, learned)) == shown.marked_tokens


def test_a_part_of_a_source_is_shown(tmp_path: Path) -> None:
    module = data(tmp_path, context_length=256)
    (shown,) = module.shown_sources(2, 10)
    assert (shown.read, shown.complete, len(shown.examples)) == (10, False, 2)
    assert shown.examples[0].title == f"{tmp_path / 'talk.jsonl'}, row 1"


def test_rows_that_end_a_run_are_shown_with_their_reason(tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "yes", "weight": 0}
    rows = [{"messages": [{"role": "user", "content": "why"}, said]}, {"messages": []}]
    file = write_rows(tmp_path / "zero.jsonl", *rows)
    module = ChatData({"talk": ConversationSource(str(file))}, 96, cache_dir=str(tmp_path / "cache"))
    (shown,) = module.shown_sources(2, 1000)
    assert shown.is_empty and shown.examples == []
    assert shown.left_out == {"nothing to learn": 1, "no turns": 1}
    assert shown.warnings == [f"fit stops at {file}, row 1, and no other row has anything to learn"]
    assert not (tmp_path / "cache").exists()  # looking writes nothing


def test_a_source_that_fit_would_refuse_is_shown(tmp_path: Path) -> None:
    file = write(tmp_path / "talk.jsonl", 1)
    for held_out in (0.02, 1 - 1e-9):  # more or fewer held-out conversations do not help
        sources = {"talk": ConversationSource(str(file))}
        module = ChatData(sources, 96, held_out=held_out, cache_dir=str(tmp_path / "cache"))
        (shown,) = module.shown_sources(0, 1000)
        assert shown.warnings == [
            "fit refuses this source, because it has 1 conversation on one question, and training and validation need "
            "different questions: add conversations on at least one other question"
        ]


def test_a_source_whose_questions_are_all_held_out_is_shown(tmp_path: Path) -> None:
    file = write(tmp_path / "talk.jsonl", 5)
    sources = {"talk": ConversationSource(str(file))}
    module = ChatData(sources, 96, held_out=1 - 1e-9, cache_dir=str(tmp_path / "cache"))
    (shown,) = module.shown_sources(0, 1000)
    (warning,) = shown.warnings
    assert warning.startswith("fit refuses this source, because all are held out: lower data.held_out (now 0.999")
