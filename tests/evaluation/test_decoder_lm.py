"""The decoder as a model of the lm-evaluation-harness, without the harness: its classes are empty here.

The harness itself, and its own backend beside this one: test_harness.py.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_danube.evaluation
from lightning_danube.generation.token_stream import generate
from lightning_danube.tokens.tokenizer import adding_bos
from tests.tiny_models import CONFIG, tiny_decoder, tiny_tokenizer

MODULES = (
    *("lm_eval", "lm_eval.api", "lm_eval.api.task", "lm_eval.api.model", "lm_eval.evaluator", "lm_eval.models"),
    *("lm_eval.models.utils", "lm_eval.tasks", "lm_eval.tasks._yaml_loader", "lm_eval.utils"),
)


class EmptyModule(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The file that runs the harness, under a name of its own, so that other tests get the real one."""
    name, file = "harness_without_lm_eval", Path(lightning_danube.evaluation.__file__).with_name("harness.py")
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setitem(sys.modules, module, EmptyModule(module))
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        loaded: Any = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, loaded)
        spec.loader.exec_module(loaded)
        patch.setattr(loaded, "normalize_gen_kwargs", lambda settings, most: {"max_gen_toks": most} | settings)
        patch.setattr(loaded, "handle_stop_sequences", lambda until, end: [*(until or []), end])
        patch.setattr(loaded, "postprocess_generated_text", cut_at_stops)
        yield loaded


def cut_at_stops(text: str, until: list[str], _: None) -> str:
    for stop in until:
        text = text.partition(stop)[0]
    return text


def model(harness: Any, context: int, **options: Any) -> Any:
    decoder = tiny_decoder(dataclasses.replace(CONFIG, max_position_embeddings=context)).double()
    return harness.DecoderLM(decoder, adding_bos(tiny_tokenizer()), **options)


@pytest.mark.parametrize("adds", [False, True])
def test_a_token_for_both_ends_begins_an_empty_context_and_is_not_doubled(harness: Any, adds: bool) -> None:
    tokenizer: Any = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.add_bos_token = adds
    lm = harness.DecoderLM(tiny_decoder(), tokenizer)
    plain = tokenizer("a b", add_special_tokens=False).input_ids
    assert lm.prefix_token_id == lm.eot_token_id == tokenizer.eos_token_id
    assert lm.tok_encode("a b") == [tokenizer.eos_token_id] * adds + plain
    assert lm.tok_encode("<eos>a b") == [tokenizer.eos_token_id, *plain]


def some_ids(seed: int, count: int) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(("context", "batch_tokens"), [(64, 4096), (64, 60), (14, 4096)])
def test_continuations_are_as_likely_as_alone(harness: Any, context: int, batch_tokens: int) -> None:
    told: list[tuple[int, int]] = []
    lm = model(harness, context, batch_tokens=batch_tokens, progress=lambda *facts: told.append(facts))
    decoder = lm.decoder
    # Two questions with four choices each, some of one token, and texts of other lengths.
    asked = [(some_ids(n // 4, 9 + 5 * (n // 4)), some_ids(10 + n, 1 + n % 4)) for n in range(8)]
    asked += [(some_ids(30 + n, 2 + 3 * n), some_ids(40 + n, 6 - n)) for n in range(5)]
    for context_ids in (some_ids(0, 9), some_ids(33, 11)):
        asked.append((context_ids, generate(decoder, [context_ids], 3)[0]))
    found = lm._loglikelihood_tokens([(("", ""), *one) for one in asked])
    for (before, after), (log, is_likeliest) in zip(asked, found, strict=True):
        ids = torch.tensor([before + after])[:, -(context + 1) :]
        with torch.no_grad():
            logs = decoder.eval()(ids[:, :-1])[0].log_softmax(-1)[-len(after) :]
        expected = sum(float(row[token]) for row, token in zip(logs, after, strict=True))
        assert log == pytest.approx(expected, abs=1e-6)
        assert is_likeliest == (logs.argmax(-1).tolist() == after)
    assert [likeliest for _, likeliest in found[-2:]] == [True, True] and not all(likeliest for _, likeliest in found)
    cut = [len(before) + len(after) > context + 1 for before, after in asked]
    assert lm.truncated == sum(cut) and any(cut) == (context == 14)
    assert told[-1] == (15, 15)


def test_batches_of_continuations_fit_the_places(harness: Any) -> None:
    lm = model(harness, 64, batch_tokens=60)
    groups = {tuple(some_ids(n, 3 + 2 * n)): [(n, [1] * k) for k in range(1, 1 + n % 3 + 1)] for n in range(9)}
    batches = list(lm._batches(groups))
    assert sorted(context for batch in batches for context, _ in batch) == sorted(groups)
    for batch in batches:
        rows = sum(len(members) for _, members in batch)
        widths = [len(context) + max(len(ids) for _, ids in members) for context, members in batch]
        assert len(batch) == 1 or rows * max(widths) <= 60
    assert any(len(batch) > 1 for batch in batches)


def test_answers_end_before_a_stop_string_and_follow_the_end_of_a_long_prompt(harness: Any) -> None:
    lm = model(harness, 32)
    texts = ["the river", "stone " * 20, "a", "then the other one"]
    free = []
    for text in texts:
        ids = lm.tok_encode(text)[-22:]
        free.append(lm.tokenizer.decode(generate(lm.decoder, [ids], 10)[0], skip_special_tokens=True))
    stop = next(letter for letter in free[0][2:] if letter.isascii() and letter not in free[0][:2])
    for until in ([], [stop]):
        settings = {"max_gen_toks": 10, "until": until}
        requests = [SimpleNamespace(args=(text, settings)) for text in texts]
        wanted = [text.partition(stop)[0] if until else text for text in free]
        assert lm.generate_until(requests) == wanted
    assert lm.truncated == 2 * sum(len(lm.tok_encode(text)) > 22 for text in texts) > 0
    with pytest.raises(harness.MissingData, match="answers have 32 tokens, and the context of the model is 32"):
        lm.generate_until([SimpleNamespace(args=("x", {"max_gen_toks": 32}))])


def test_a_text_begins_with_one_prefix_token(harness: Any) -> None:
    lm = model(harness, 32)
    bos = lm.tokenizer.bos_token_id
    for text in ("the river", "<bos>the river"):
        ids = lm.tok_encode(text)
        assert ids[0] == bos and ids.count(bos) == 1


def test_a_limit_takes_of_each_part_its_share(harness: Any) -> None:
    sizes = {"a": 10, "b": 30, "c": 1}
    chosen = harness.chosen_documents(sizes, 8, seed=1)
    # 1.95, 5.85 and 0.2 of 8.
    assert {name: len(numbers) for name, numbers in chosen.items()} == {"a": 2, "b": 6, "c": 0}
    for name, numbers in chosen.items():
        assert numbers == sorted(set(numbers)) and all(0 <= number < sizes[name] for number in numbers)
    assert chosen == harness.chosen_documents(sizes, 8, seed=1) != harness.chosen_documents(sizes, 8, seed=2)
    assert (
        harness.chosen_documents({"a": 30, "b": 30}, 8, seed=1)["a"]
        != harness.chosen_documents({"a": 30, "b": 30}, 8, seed=1)["b"]
    )
    for limit in (None, 41, 100):
        assert harness.chosen_documents(sizes, limit, seed=1) == {name: list(range(n)) for name, n in sizes.items()}


CONFIGURED = {"dataset_path": "set", "test_split": "test", "validation_split": "validation", "training_split": "train"}


@pytest.mark.parametrize(
    ("there", "shots", "splits", "notes"),
    [
        # (test, validation, training, few-shot) of the config that the harness gets.
        ("test train validation", 3, ("test", None, "train", None), []),
        ("test train", 0, ("test", None, None, None), []),
        ("test validation", 3, ("test", "validation", None, None), ["the examples are from validation"]),
        ("test", 3, ("test", None, None, "test"), ["the examples are other questions of test"]),
        (
            "validation train",
            3,
            (None, "validation", "train", None),
            ["the questions are those of validation, because test is missing"],
        ),
    ],
)
def test_splits_that_are_missing_are_replaced(
    harness: Any, tmp_path: Path, there: str, shots: int, splits: tuple[str | None, ...], notes: list[str]
) -> None:
    (tmp_path / "set").mkdir()
    for split in there.split():
        (tmp_path / "set" / f"{split}.jsonl").touch()
    config = dict(CONFIGURED)
    places, found = harness.place_splits(config, shots, tmp_path)
    names = ("test_split", "validation_split", "training_split", "fewshot_split")
    assert tuple(config[name] for name in names) == splits and found == notes
    assert set(places) == {split for split in splits if split}
    assert next(iter(places)) == (splits[0] or splits[1]), "the questions come first: messages name their file"


def test_without_questions_the_missing_file_is_named(harness: Any, tmp_path: Path) -> None:
    with pytest.raises(harness.MissingData, match=r"there is no .*/set/test\.jsonl"):
        harness.place_splits(dict(CONFIGURED), 0, tmp_path)
