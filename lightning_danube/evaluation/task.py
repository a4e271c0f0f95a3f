"""Evaluation of a trained model: each batch is a part of the report, and `results` is what came of them."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_danube.evaluation.results import Estimate, Measured, mean_of
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.generation.sampling import Sampling
from lightning_danube.generation.token_stream import TokenStream
from lightning_danube.weights.adapters import base_digest
from lightning_danube.weights.loading import load_as_exported

HEAD_ROWS = 256
"""Tokens whose logits exist at once."""


class Evaluation(LightningModule):
    """Asks a model the questions of `EvaluationData`; for the verb `test`. It runs on one device.

    Args:
        weights: the model: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        dtype: type of its parameters, as stored if not given (of a quantized GGUF file float32).
        places: most places, padding included, of a batch of texts; a longer text is a batch of its own.
        chat_template: put academic questions as a user's messages, in the tokenizer's chat template. The leaderboard
            of the paper's time did not.

    Raises:
        ValueError: the weights cannot be read, or there is no such template.
    """

    def __init__(self, weights: str, dtype: str | None = None, places: int = 8192, chat_template: bool = False) -> None:
        super().__init__()
        if places < 1:
            raise ValueError(f"model.places is {places}: it must be at least 1")
        self.decoder, self.tokenizer = load_as_exported(weights, dtype=dtype)
        self.decoder.eval()
        self.config = self.decoder.config
        self._digest = base_digest(self.decoder)
        self.weights, self.places, self.chat_template = weights, places, chat_template
        if chat_template and self.tokenizer.chat_template is None:
            raise ValueError(f"model.chat_template: the tokenizer of {weights} has none: leave it out")
        # Prompts that do not fit are cut, and counted in the report: no warning is needed.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.results: list[Measured] = []
        self.on_progress: Callable[[str, int, int], None] | None = None
        """Called with a part's title, and how much of it is done."""
        self._prepared: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("an evaluation runs on one device: set --trainer.devices 1")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocab_size:,} tokens, the model of {self.weights} knows "
                f"{self.config.vocab_size:,}: give the tokenizer that belongs to it"
            )
        if (data.texts or data.needle) and data.context_length > self.config.max_position_embeddings:
            raise ValueError(
                f"data.context_length is {data.context_length:,}, the model of {self.weights} was made for "
                f"{self.config.max_position_embeddings:,}: lower it"
            )
        if data.tasks:
            from lightning_danube.evaluation import harness

            # All questions are read before the first is asked: a bad row is told at once.
            for task in data.tasks:
                try:
                    self._prepared[task.name] = harness.prepare(task, data.directory, data.limit, data.seed)
                except harness.MissingData as missing:
                    self._prepared[task.name] = missing

    def on_test_start(self) -> None:
        # A CPU reads prompts in less than two thirds of the time then. What is packed takes no other type than its own.
        if not str(self.trainer.precision).endswith("mixed"):
            pack_for_generation(self.decoder, rows=self.places)

    def test_step(self, batch: int, batch_idx: int) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        part = data.parts[batch]
        # Parts are told by their class's name: what the data are made of is not this module's to import.
        measure = {
            "AcademicTask": self._academic,
            "TextRows": self._perplexity,
            "Needles": self._needles,
            "PassageQuestions": self._passages,
            "ChatQuestions": self._chat,
        }[type(part).__name__]
        began = time.monotonic()
        rows = measure(part)
        for row in rows:
            row.seconds = time.monotonic() - began
        self.results += rows

    def _progress(self, title: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(title, done, total)

    # --- academic benchmarks ------------------------------------------------------------------------------------------

    def _academic(self, task: Any) -> list[Measured]:
        from lightning_danube.evaluation import harness

        row = Measured("academic", task.name, task.title, task.setting)
        if task.chance is not None:
            row.more["guessing"] = task.chance
        prepared = self._prepared[task.name]
        if isinstance(prepared, harness.MissingData):
            row.not_run = str(prepared)
            return [row]
        lm = harness.DecoderLM(
            self.decoder,
            self.tokenizer,
            batch_tokens=self.places,
            progress=lambda done, total: self._progress(task.title, done, total),
        )
        try:
            answered = harness.run(lm, prepared, chat_template=self.chat_template)
        except harness.MissingData as missing:
            row.not_run = str(missing)
            return [row]
        key = task.metric if task.filter == "none" else f"{task.metric},{task.filter}"
        row.estimate = mean_of(answered.values[key])
        row.more |= {name: mean_of(values)._asdict() for name, values in answered.values.items()}
        row.notes = [*prepared.notes, *part_of(row.estimate.n, prepared.available)]
        if self.chat_template:
            row.notes.append("asked in the chat template")
        if lm.truncated:
            row.notes.append(f"{lm.truncated:,} prompts lost their beginning, at {lm.max_length:,} tokens")
        row.records = [harness.record(sample) for sample in answered.samples]
        return [row]

    # --- perplexity ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _perplexity(self, part: Any) -> list[Measured]:
        ids_NT = torch.from_numpy(part.ids_NT)
        size = max(1, self.places // ids_NT.shape[1])
        nats = []
        for ids_BT in ids_NT.split(size):
            ids_BT = ids_BT.to(self.device)
            nats.append(self._nats(ids_BT))
            self._progress(part.title, sum(map(len, nats)), len(ids_NT))
        nats_NT = torch.cat(nats)
        mean = mean_of(nats_NT.mean(1).tolist())
        ends = [None if end is None else math.exp(end) for end in (mean.low, mean.high)]
        # The error of an exponential is not symmetric: the interval says it, a standard error would not.
        row = Measured(
            "perplexity",
            part.source,
            part.source,
            f"rows of {ids_NT.shape[1]:,} tokens",
            Estimate(math.exp(mean.value), None, ends[0], ends[1], mean.n),
            percent=False,
        )
        total = float(nats_NT.sum())
        row.more = {
            "tokens": nats_NT.numel(),
            "nats_a_token": mean._asdict(),
            "bits_a_byte": total / math.log(2) / sum(part.bytes_of_rows),
            # A row's first token is not predicted: what is said at a place is the token behind it.
            "by_position": [
                {"first": first, "last": last - 1, "perplexity": math.exp(float(nats_NT[:, first:last].mean()))}
                for first, last in part.buckets()
                if first < nats_NT.shape[1]
            ],
        }
        return [row]

    def _nats(self, ids_BT: Tensor) -> Tensor:
        """Of each token but the first, (B, T - 1), in float64 on the CPU."""
        states_ND = self.decoder.hidden_states(ids_BT[:, :-1]).flatten(0, 1)
        nats = []
        for states_CD, targets_C in zip(
            states_ND.split(HEAD_ROWS), ids_BT[:, 1:].flatten().split(HEAD_ROWS), strict=True
        ):
            logits_CV = self.decoder.lm_head(states_CD)
            logits_CV = logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()
            nats.append(F.cross_entropy(logits_CV, targets_C, reduction="none").cpu().double())
        return torch.cat(nats).view(len(ids_BT), -1)

    # --- what comes next ----------------------------------------------------------------------------------------------

    def _continue(
        self, title: str, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int]
    ) -> list[str]:
        """The likeliest continuations. A prompt that is too long loses its beginning."""
        room = self.config.max_position_embeddings - new_tokens
        kept = [list(prompt[-room:]) for prompt in prompts]
        texts = [""] * len(kept)
        done = 0
        for numbers in batches(list(map(len, kept)), new_tokens, self.places):
            batch = self._generate([kept[number] for number in numbers], new_tokens, ends)
            for number, ids in zip(numbers, batch, strict=True):
                texts[number] = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            done += len(numbers)
            self._progress(title, done, len(kept))
        return texts

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        ends: Sequence[int],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        stream = TokenStream(self.decoder, prompts, new_tokens, eos_ids=ends, sampling=sampling, seeds=seeds)
        rows = torch.stack(list(stream), dim=1).tolist()
        return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]

    def _needles(self, part: Any) -> list[Measured]:
        ends: list[int] = []
        prompts = [needle.prompt_ids for needle in part.needles]
        texts = self._continue(part.title, prompts, part.new_tokens, ends)
        found = [part.is_found(needle, text) for needle, text in zip(part.needles, texts, strict=True)]
        name = f"needle_{part.length}"
        row = Measured("needle", name, f"{part.length:,} tokens", "number said first", mean_of(list(map(float, found))))
        row.more = {"by_depth": part.by_depth(found)}
        row.records = [
            {"depth": needle.depth, "answer": needle.answer, "said": text, "found": one}
            for needle, text, one in zip(part.needles, texts, found, strict=True)
        ]
        return [row]

    def _passages(self, part: Any) -> list[Measured]:
        room = self.config.max_position_embeddings - part.new_tokens
        prompts = [question.prompt_ids for question in part.questions]
        texts = self._continue(part.title, prompts, part.new_tokens, part.end_ids)
        right = [part.is_right(question, text) for question, text in zip(part.questions, texts, strict=True)]
        there = [float(question.answer_is_there) for question in part.questions]
        row = Measured(
            "retrieval",
            "answers",
            "answers",
            "answer said",
            mean_of(list(map(float, right))),
            notes=part_of(len(right), part.available),
        )
        row.more = {"answer_is_in_a_passage": mean_of(there)._asdict()}
        row.notes.append(f"in {100 * sum(there) / len(there):.1f} % of the questions a passage holds the answer")
        row.notes.append(f"the questions are those of {part.source}: the paper's own set was not published")
        if cut := sum(len(prompt) > room for prompt in prompts):
            row.notes.append(f"{cut:,} prompts lost their beginning, at {self.config.max_position_embeddings:,} tokens")
        row.records = [
            {
                "question": question.question,
                "answers": question.answers,
                "passages": question.passages,
                "said": text,
                "right": one,
            }
            for question, text, one in zip(part.questions, texts, right, strict=True)
        ]
        return [row]

    # --- chat ---------------------------------------------------------------------------------------------------------

    def _chat(self, part: Any) -> list[Measured]:
        """Answers, kept as they come; those of an earlier run that were asked for in the same way are taken over. Their
        scores are a judge's business."""
        file = part.file("answers")
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {row["key"]: row for row in read_jsonl(file)}
        notes = part_of(len(part.questions), part.available)
        if not part.has_template:
            notes.append("the tokenizer has no chat template: asked in that of the H2O-Danube chat models")
        keys = []
        for question in part.questions:
            asked = [self._digest, question.id, question.turns, question.history, part.options.new_tokens]
            told = json.dumps([*asked, part.temperature(question)])
            keys.append(hashlib.sha256(told.encode()).hexdigest()[:16])
        pending = [number for number, key in enumerate(keys) if key not in kept]
        for numbers in self._chat_batches(part, pending):
            questions = [part.questions[number] for number in numbers]
            with file.open("a", encoding="utf-8") as opened:
                for number, question, (answers, shortened) in zip(
                    numbers, questions, self._answer(part, questions), strict=True
                ):
                    kept[keys[number]] = {
                        "key": keys[number],
                        "weights": self.weights,
                        "question": question.id,
                        "category": question.category,
                        "temperature": part.temperature(question),
                        "history": question.history,
                        "turns": question.turns,
                        "answers": answers,
                        "shortened": shortened,
                    }
                    opened.write(json.dumps(kept[keys[number]], ensure_ascii=False) + "\n")
            self._progress(part.title, sum(key in kept for key in keys), len(keys))
        records = [kept[key] for key in keys]
        if cut := sum(record["shortened"] for record in records):
            notes.append(f"{cut:,} prompts lost their beginning, at {self.config.max_position_embeddings:,} tokens")
        row = Measured("chat", part.benchmark, part.title, "score of 1 to 10", percent=False, notes=notes)
        row.not_run = (
            "its answers are written, and no judge is there to score them: add lightning_danube.callbacks.Judge"
        )
        row.records = records
        return [row]

    def _chat_batches(self, part: Any, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Questions that are answered together: at one temperature, and few enough for the places."""
        by_temperature: dict[float, list[int]] = {}
        for number in numbers:
            by_temperature.setdefault(part.temperature(part.questions[number]), []).append(number)
        for mine in by_temperature.values():
            lengths = [len(part.prompt_ids(part.questions[number], [])) for number in mine]
            turns = max(len(part.questions[number].turns) for number in mine)
            for batch in batches(lengths, turns * part.options.new_tokens, self.places):
                yield [mine[place] for place in batch]

    def _answer(self, part: Any, questions: Sequence[Any]) -> list[tuple[list[str], int]]:
        """For each question the answers to its turns, and how many of the prompts did not fit."""
        new_tokens = min(part.options.new_tokens, self.config.max_position_embeddings // 2)
        room = self.config.max_position_embeddings - new_tokens
        sampling = Sampling(temperature=part.temperature(questions[0]))
        answers: list[list[str]] = [[] for _ in questions]
        cut = [0] * len(questions)
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
            prompts = [part.prompt_ids(questions[row], answers[row]) for row in rows]
            seeds = [seed_of(questions[row].id) + turn for row in rows]
            cut_prompts = [prompt[-room:] for prompt in prompts]
            new = self._generate(cut_prompts, new_tokens, part.end_ids, sampling, seeds)
            for row, prompt, ids in zip(rows, prompts, new, strict=True):
                cut[row] += len(prompt) > room
                answers[row].append(str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip())
        return list(zip(answers, cut, strict=True))


def seed_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def part_of(asked: int, available: int) -> list[str]:
    return [f"{asked:,} of {available:,} questions, chosen by seed"] if asked < available else []


def batches(lengths: Sequence[int], more: int, places: int) -> Iterator[list[int]]:
    """Numbers of texts, the longest first, in batches of so many places when each has grown by `more`."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * (lengths[batch[0]] + more) > places:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def read_jsonl(file: Any) -> list[dict[str, Any]]:
    """Rows that were appended one by one. A last line that was broken off by a kill is left out."""
    if not file.is_file():
        return []
    *whole, last = file.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in whole if line]
    if last:
        # The next row must begin a line of its own.
        file.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
    return rows
