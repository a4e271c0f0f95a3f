"""The lm-evaluation-harness on our decoder: the same answers as its own Hugging Face backend on the exported model,
sample by sample, and its tasks on local files."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.data.academic import PAPER_TASKS, AcademicTask
from lightning_danube.model import save_hf
from tests.tiny_models import CONFIG, tiny_decoder, tiny_tokenizer

pytestmark = pytest.mark.evaluation

# Norms and rotary angles of transformers are float32 in a float64 model, too: 3e-6 on sums of up to 700 nats.
TOLERANCE = 2e-5
WORDS = ("the", "river", "stone", "then", "light", "other", "walks", "they", "green", "that", "mountain", "them")
TASKS = {task.name: task for task in PAPER_TASKS}


def words(seed: int, count: int) -> str:
    source = random.Random(seed)
    return " ".join(source.choice(WORDS) for _ in range(count))


def arc(n: int) -> dict[str, Any]:
    texts = [words(100 * n + k, 1 + (n + k) % 4) for k in range(4)]
    return {"question": words(n, 5), "choices": {"label": list("ABCD"), "text": texts}, "answerKey": "ABCD"[n % 4]}


def winogrande(n: int) -> dict[str, Any]:
    sentence = f"{words(n, 2)} _ {words(n + 50, 3)}"
    return {"sentence": sentence, "option1": "river", "option2": "the stone", "answer": str(1 + n % 2)}


def gsm8k(n: int) -> dict[str, Any]:
    return {"question": words(n, 6), "answer": f"{words(n + 9, 3)}\n#### {n}"}


def coqa(n: int) -> dict[str, Any]:
    said = {"input_text": [words(n, 1), words(n + 1, 2)]}
    return {"story": words(n, 30), "questions": {"input_text": ["who?", "what?"]}, "answers": said}


LAYOUTS: dict[str, tuple[str, dict[str, str], Callable[[int], dict[str, Any]]]] = {
    "arc_challenge": ("allenai/ai2_arc/ARC-Challenge", {"train": "train", "test": "test"}, arc),
    "winogrande": ("allenai/winogrande/winogrande_xl", {"train": "train", "test": "validation"}, winogrande),
    "gsm8k": ("openai/gsm8k/main", {"train": "train", "test": "test"}, gsm8k),
    "coqa": ("EleutherAI/coqa", {"test": "validation"}, coqa),
}


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Six questions of four tasks, in the hub's layout."""
    for folder, splits, make in LAYOUTS.values():
        for first, split in enumerate(splits.values()):
            write(tmp_path / folder / f"{split}.jsonl", [make(n) for n in range(40 * first, 40 * first + 6)])
    return tmp_path


def exported(path: Path, context: int) -> tuple[Any, Any]:
    """A random decoder in float64, and the harness's Hugging Face backend on its export."""
    from lm_eval.models.huggingface import HFLM

    from lightning_danube.data.tokenizer import adding_bos

    decoder = tiny_decoder(dataclasses.replace(CONFIG, max_position_embeddings=context)).double().eval()
    tokenizer = adding_bos(tiny_tokenizer())
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    save_hf(decoder, path, tokenizer, bos_id=ids[0], eos_id=ids[1], pad_id=ids[2])
    return (decoder, tokenizer), HFLM(pretrained=str(path), dtype="float64", batch_size=1, device="cpu")


def with_fewer_shots(name: str, shots: int) -> AcademicTask:
    return dataclasses.replace(TASKS[name], shots=min(shots, TASKS[name].shots))


# 96 tokens are fewer than most prompts have, so that beginnings are cut; three texts, or all, a batch.
@pytest.mark.parametrize(("context", "batch_tokens"), [(2048, 1000), (96, 4096)])
@pytest.mark.parametrize("name", ["arc_challenge", "winogrande", "gsm8k", "coqa"])
def test_answers_are_those_of_the_harness_own_backend(
    name: str, context: int, batch_tokens: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from lightning_danube import harness

    monkeypatch.setattr(harness, "NEW_TOKENS", 16)
    monkeypatch.setattr(HFLM, "max_gen_toks", 16)
    (decoder, tokenizer), theirs = exported(directory / "model", context)
    prepared = harness.prepare(with_fewer_shots(name, 2), directory, None, seed=0)
    assert prepared.documents == 6 and not prepared.notes
    lm = harness.DecoderLM(decoder, tokenizer, batch_tokens=batch_tokens)
    mine, expected = harness.run(lm, prepared), harness.run(theirs, prepared)
    assert mine.values.keys() == expected.values.keys() and mine.values
    assert (lm.truncated > 0) == (context == 96)
    for ours, reference in zip(mine.samples, expected.samples, strict=True):
        assert ours["arguments"] == reference["arguments"] and ours["doc_id"] == reference["doc_id"]
        for (answer,), (wanted,) in zip(ours["resps"], reference["resps"], strict=True):
            if isinstance(wanted, str):
                assert answer == wanted
            else:
                assert answer[0] == pytest.approx(wanted[0], abs=TOLERANCE) and answer[1] == wanted[1]
        assert {m: ours[m] for m in ours["metrics"]} == {m: reference[m] for m in reference["metrics"]}


def test_whole_texts_are_as_likely_as_the_harness_own_backend_says(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from lightning_danube import harness

    (decoder, tokenizer), theirs = exported(tmp_path / "model", 24)
    requests = [Instance("loglikelihood_rolling", {}, (words(n, 3 + 9 * n),), n) for n in range(3)]
    mine = harness.DecoderLM(decoder, tokenizer).loglikelihood_rolling(requests)
    assert mine == pytest.approx(theirs.loglikelihood_rolling(requests), abs=TOLERANCE)
