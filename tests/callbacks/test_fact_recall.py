"""Facts known are counted right, and stand in the summary of a run that was stopped in between as well."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_danube.__main__ import main
from lightning_danube.callbacks import FactRecall
from lightning_danube.callbacks.fact_recall import answered, shares
from lightning_danube.text.embedded import world
from lightning_danube.text.embedded.world import the_world, world_tokenizer

ROOT = Path(__file__).resolve().parents[2]


class Remembering(nn.Module):
    """Knows the answers to some prompts, by heart."""

    def __init__(self, answers: dict[tuple[int, ...], int], vocabulary: int) -> None:
        super().__init__()
        self.answers, self.vocabulary = answers, vocabulary
        self.lm_head = nn.Identity()
        self.decoder, self.device = self, torch.device("cpu")

    def hidden_states(self, ids: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(*ids.shape, self.vocabulary)
        # The likeliest of all is a word that answers nothing: only candidates are compared.
        found[..., 1] = 2.0
        for row, prompt in enumerate(ids.tolist()):
            for length in range(1, len(prompt) + 1):
                if tuple(prompt[:length]) in self.answers:
                    found[row, length - 1, self.answers[tuple(prompt[:length])]] = 1.0
        return found


def test_answers_are_counted_by_group() -> None:
    tokenizer: Any = world_tokenizer()
    questions = the_world().questions()
    known = [question for question in questions if question.group == "noisy"]
    answers = {
        (1, *tokenizer.encode(question.prompt)): int(tokenizer.convert_tokens_to_ids(question.answer))
        for question in known
    }
    right = answered(Remembering(answers, len(tokenizer)), tokenizer, questions)  # type: ignore[arg-type]
    found = shares(questions, right)
    assert found["noisy"] == 1.0
    # Of what it does not know all candidates are alike, and the first one is taken.
    first = [q.candidates[0] == q.answer for q in questions if q.group != "noisy"]
    assert found["clean"] + found["both"] == pytest.approx(2 * sum(first) / len(first))
    assert found["all"] == pytest.approx((found["clean"] + found["noisy"] + found["both"]) / 3)
    callback = FactRecall()
    callback.known = found
    assert callback.summary()["n"] == {"clean": 136, "noisy": 136, "both": 136, "all": 408}
    assert callback.summary()["guessing"] == pytest.approx(0.0232, abs=1e-3)
    # Six of 72 people share a birth year, and so on: 32 of the 408 facts.
    assert callback.summary()["commonest"]["all"] == pytest.approx(32 / 408)


def world_run(tmp_path: Path, *options: str) -> int:
    text = (ROOT / "configs/pretrain/world.yaml").read_text()
    for old, new in (
        ("442368", "2K"), ("191488", "1K"), ("103424", "1K"), ("warmup: 40K", "warmup: 0"), 
        ("every_n_steps: 200", "every_n_steps: 1"), 
        ("hidden_size: 128", "hidden_size: 16"), ("intermediate_size: 384", "intermediate_size: 16"),
        ("held_out: 0.02", f"held_out: 0.1\n    cache_dir: {tmp_path / 'cache'}"),
    ):  # fmt: skip
        assert old in text, old
        text = text.replace(old, new)
    (tmp_path / "world.yaml").write_text(text)
    return main(["fit", "--config", str(tmp_path / "world.yaml"), "--runs", str(tmp_path / "runs"), *options])


def test_a_run_tells_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(world, "DOCUMENTS", {"clean": 200, "noisy": 200})
    assert world_run(tmp_path, "--name", "whole") == 0
    whole = json.loads((tmp_path / "runs/whole/version_0/summary.json").read_text())["recall"]
    assert set(whole) == {"clean", "noisy", "both", "all", "guessing", "commonest", "n"} and 0 <= whole["all"] < 0.2
    said = re.findall(r"facts known: clean .* all (\d+)% \(by the commonest answer 8%\)", capsys.readouterr().out)
    # After each of the three stages.
    assert len(said) == 3 and said[-1] == f"{100 * whole['all']:.0f}"
    # Stopped behind the last validation but one, and gone on with.
    assert world_run(tmp_path, "--name", "parts", "--trainer.max_steps", "3") == 0
    assert world_run(tmp_path, "--name", "parts", "--ckpt_path", "last") == 0
    summary = json.loads((tmp_path / "runs/parts/version_0/summary.json").read_text())
    assert summary["recall"] == whole


def test_another_tokenizer_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny / "tiny.yaml"
    config.write_text(
        config.read_text().replace(
            "callbacks:\n", "callbacks:\n    - class_path: lightning_danube.callbacks.FactRecall\n"
        )
    )
    assert main(["fit", "--config", str(config)]) == 2
    assert "FactRecall asks in words of the made-up world, data.tokenizer is 'mistral'" in capsys.readouterr().err
