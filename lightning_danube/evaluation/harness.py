"""Runs the lm-evaluation-harness (EleutherAI) on a decoder in this process. Only this file imports the harness.

The harness makes the prompts and scores the answers. This file implements the harness's three requests (likelihood of a
continuation, likelihood of a text, generation) and points its tasks to local files. The model reads a context once,
even if several continuations share it, such as the choices of a question.

Shapes: B texts of a batch, R their continuations, T tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_danube.evaluation import squad_scores
from lightning_danube.evaluation.academic_tasks import AcademicTask, read_split, split_files
from lightning_danube.extras import need
from lightning_danube.generation.token_stream import TokenStream, evaluation_mode, tokens_on_host
from lightning_danube.model import Decoder, KVCache
from lightning_danube.tokens.chat_template import apply_template, end_ids

try:
    import lm_eval.api.task
    import lm_eval.tasks
except ModuleNotFoundError:
    need("evaluation", "an academic benchmark")
    raise
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

NEW_TOKENS = 256
"""Most tokens of an answer if its task sets no limit: the harness's default for a Hugging Face model."""
SHOTS_SEED = 1234
"""The harness's default seed for the examples before a question."""
HEAD_ROWS = 256
"""Most tokens whose logits are in memory at once."""

OnProgress = Callable[[int, int], None]


class MissingData(Exception):
    """The questions of a task are not available. The message names the file or the reason."""


# --- the decoder as a model of the harness ----------------------------------------------------------------------------


class DecoderLM(TemplateLM):
    """A decoder with the tokenizer that its export would have, as a model of the harness.

    Args:
        batch_tokens: most places, padding included, of a batch of texts; a longer text is a separate batch.
        progress: called with the number of finished requests of a kind, and the number of all requests of that kind.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 8192,
        progress: OnProgress | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.tokenizer = decoder, tokenizer
        self.batch_tokens, self.progress = batch_tokens, progress
        self.max_length = decoder.config.max_position_embeddings
        self.truncated = 0
        """Number of requests whose beginning was cut because they do not fit the context."""

    @property
    def device(self) -> torch.device:
        return self.decoder.model.embed_tokens.weight.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        going_on = not add_generation_prompt
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": going_on}
        return apply_template(self.tokenizer, chat_history, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            # A chat template may have written the prefix token already.
            prefix = str(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not string.startswith(prefix)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # --- how likely ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Returns the log-likelihood of whole texts; each token sees the preceding tokens of its window."""
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text)
            mine = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in mine]
            windows += [((text, ""), context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-probability of the continuation in nats, whether all its tokens are the likeliest)."""
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length
            # The model does not read the last token, so one token more than the context fits.
            fits = (context + continuation)[-(self.max_length + 1) :]
            self.truncated += len(fits) < len(context) + len(continuation)
            groups[tuple(fits[: len(fits) - len(continuation)])].append((number, continuation))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(groups):
            with evaluation_mode(self.decoder):
                answers_of_batch = self._score(batch)
            for (number, _), answer in zip(
                [one for _, members in batch for one in members], answers_of_batch, strict=True
            ):
                answers[number] = answer
            done += len(answers_of_batch)
            self._report(done, len(requests))
        return answers

    def _batches(self, groups: Mapping[tuple[int, ...], list[tuple[int, list[int]]]]) -> Iterator[list[Any]]:
        """Yields batches of contexts with their continuations, the longest first, so that a lack of memory shows at
        once."""

        def longest(members: list[tuple[int, list[int]]]) -> int:
            return max(len(continuation) for _, continuation in members)

        order = sorted(groups.items(), key=lambda item: -(len(item[0]) + longest(item[1])))
        batch: list[Any] = []
        rows = width = 0
        for context, members in order:
            wider = max(width, len(context) + longest(members))
            if batch and (rows + len(members)) * wider > self.batch_tokens:
                yield batch
                batch, rows, wider = [], 0, len(context) + longest(members)
            batch.append((context, members))
            rows, width = rows + len(members), wider
        if batch:
            yield batch

    @torch.no_grad()
    def _score(self, batch: Sequence[tuple[tuple[int, ...], list[tuple[int, list[int]]]]]) -> list[tuple[float, bool]]:
        """Returns the answers for the continuations of several contexts, in their order."""
        lengths = [len(context) for context, _ in batch]
        continuations = [continuation for _, members in batch for _, continuation in members]
        owners = [row for row, (_, members) in enumerate(batch) for _ in members]
        more = max(map(len, continuations)) - 1
        ids_BT = self._padded([context for context, _ in batch])
        cache = KVCache.for_decoder(self.decoder, len(batch), ids_BT.shape[1]) if more else None
        hidden_BTD = self.decoder.hidden_states(ids_BT, cache=cache)
        last_BD = hidden_BTD[torch.arange(len(batch)), torch.tensor(lengths) - 1]
        # The context's last state predicts the first token of each continuation.
        states = [last_BD[torch.tensor(owners)]]
        targets = [torch.tensor([continuation[0] for continuation in continuations], device=self.device)]
        rows = [torch.arange(len(continuations))]
        longer = [row for row, continuation in enumerate(continuations) if len(continuation) > 1]
        if longer:
            assert cache is not None
            mine = [owners[row] for row in longer]
            copies = cache.copies(mine, [lengths[owner] for owner in mine], room=more)
            hidden_RTD = self.decoder.hidden_states(
                self._padded([continuations[row][:-1] for row in longer]), cache=copies
            )
            counts = torch.tensor([len(continuations[row]) - 1 for row in longer])
            real_RT = torch.arange(more)[None] < counts[:, None]
            states.append(hidden_RTD[real_RT.to(hidden_RTD.device)])
            targets += [torch.tensor(continuations[row][1:], device=self.device) for row in longer]
            rows.append(torch.tensor(longer).repeat_interleave(counts))
        logs_N, likeliest_N = self._of_tokens(torch.cat(states), torch.cat(targets))
        rows_N = torch.cat(rows)
        sums_R = torch.zeros(len(continuations), dtype=torch.float64).index_add(0, rows_N, logs_N.cpu().double())
        misses_R = torch.zeros(len(continuations)).index_add(0, rows_N, (~likeliest_N).float().cpu())
        return [(log, misses == 0) for log, misses in zip(sums_R.tolist(), misses_R.tolist(), strict=True)]

    def _of_tokens(self, states_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probability of each target, at least in float32, and whether the target is the likeliest."""
        logs, likeliest = [], []
        for states_CD, targets_C in zip(states_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True):
            logits_CV = self.decoder.lm_head(states_CD)
            if logits_CV.dtype != torch.float64:
                logits_CV = logits_CV.float()
            logs.append(logits_CV.log_softmax(-1).gather(1, targets_C[:, None])[:, 0])
            likeliest.append(logits_CV.argmax(-1) == targets_C)
        return torch.cat(logs), torch.cat(likeliest)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Returns the rows padded at their ends, where causal attention does not see the padding."""
        tensors = [torch.tensor(row, device=self.device) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    # --- what comes next ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Returns the greedy continuation of each context, up to its first stop string or the end of the text."""
        by_settings: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(number)
        answers = [""] * len(requests)
        done = 0
        for numbers in by_settings.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], NEW_TOKENS)
            if settings.get("do_sample"):
                raise ValueError("the task draws its answers at random: only the likeliest ones are generated here")
            until = handle_stop_sequences(settings.get("until"), self.tokenizer.decode([self.eot_token_id]))
            new_tokens = int(settings["max_gen_toks"])
            room = self.max_length - new_tokens
            if room < 1:
                raise MissingData(
                    f"it lets answers have {new_tokens:,} tokens, and the context of the model is {self.max_length:,}"
                )
            prompts = {}
            for number in numbers:
                ids = self.tok_encode(requests[number].args[0])
                self.truncated += len(ids) > room
                prompts[number] = ids[-room:]
            for batch in self._prompt_batches(prompts, new_tokens):
                with evaluation_mode(self.decoder):
                    texts = self._continue([prompts[number] for number in batch], new_tokens, until)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
                done += len(batch)
                self._report(done, len(requests))
        return answers

    def _prompt_batches(self, prompts: Mapping[int, list[int]], new_tokens: int) -> Iterator[list[int]]:
        batch: list[int] = []
        width = 0
        for number in sorted(prompts, key=lambda number: -len(prompts[number])):
            width = width or len(prompts[number]) + new_tokens
            if batch and (len(batch) + 1) * width > self.batch_tokens:
                yield batch
                batch, width = [], len(prompts[number]) + new_tokens
            batch.append(number)
        if batch:
            yield batch

    def _continue(self, prompts: Sequence[Sequence[int]], new_tokens: int, until: Sequence[str]) -> list[str]:
        ends = end_ids(self.tokenizer)
        # Number of last tokens that can hold a stop string, plus two for other spellings, as in the harness.
        reach = 2 + max((len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until), default=0)
        stream = TokenStream(self.decoder, prompts, new_tokens, eos_ids=ends)
        new: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for ids in tokens_on_host(stream):
            for row, token in enumerate(ids):
                if row not in open_rows:
                    continue
                new[row].append(token)
                tail = self.tokenizer.decode(new[row][-reach:], skip_special_tokens=False)
                if token in ends or any(stop in tail for stop in until if stop):
                    stream.finish(row)
                    open_rows.remove(row)
            if not open_rows:
                break
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
        return [postprocess_generated_text(text, list(until), None) for text in texts]

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)


# --- the harness's tasks on local files -------------------------------------------------------------------------------


@dataclass
class PreparedTask:
    """A task with its questions: the tasks of a group, each with the numbers of the documents to ask."""

    parts: dict[str, ConfigurableTask]
    samples: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)
    """Differences from the paper's setting."""

    @property
    def available(self) -> int:
        return sum(len(part.eval_docs) for part in self.parts.values())

    @property
    def documents(self) -> int:
        return sum(map(len, self.samples.values()))


def prepare_task(task: AcademicTask, directory: Path | None, limit: int | None, seed: int) -> PreparedTask:
    """Returns a task with its questions, from the hub or from files below a directory.

    Args:
        limit: most documents, drawn by the seed in proportion to the sizes of a group's tasks.

    Raises:
        MissingData: the questions are not available.
        ValueError: a row cannot be read or lacks something that the task needs; the message names file and row.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    bring_squad_scores()
    manager = TaskManager(include_defaults=False, include_path=str(Path(lm_eval.tasks.__file__).parent / task.folder))
    parts: dict[str, ConfigurableTask] = {}
    notes: list[str] = []
    leaves = leaf_names(manager, task.name)
    missing = []
    for name in leaves:
        config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
        try:
            parts[name], found = build_part(config | {"task": name}, task.shots, directory)
        except MissingData as error:
            missing.append(str(error))
            if directory is None or len(leaves) == 1:
                break
            continue
        notes += [note for note in found if note not in notes]
    if missing:
        of = f"{len(missing)} of {len(leaves)} parts: " if len(leaves) > 1 and directory is not None else ""
        raise MissingData(of + missing[0])
    sizes = {name: len(part.eval_docs) for name, part in parts.items()}
    samples = chosen_documents(sizes, limit, seed)
    return PreparedTask(parts, samples, notes)


def bring_squad_scores() -> None:
    """Provides `squad_scores` as the module of SQuAD's scores, which CoQA's task imports and transformers 5 lacks."""
    name = "transformers.data.metrics.squad_metrics"
    try:
        there = name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        package = ModuleType("transformers.data.metrics")
        package.squad_metrics = squad_scores  # type: ignore[attr-defined]
        sys.modules["transformers.data.metrics"] = package
        sys.modules[name] = squad_scores


def leaf_names(manager: TaskManager, name: str) -> list[str]:
    """Returns the names of a group's tasks, or the name of the task itself."""
    entry = manager.task_index[name]
    if entry.cfg is not None and isinstance(entry.cfg.get("task"), list):
        return [leaf for member in entry.cfg["task"] for leaf in leaf_names(manager, member)]
    if entry.yaml_path is None:
        return [leaf for member in sorted(entry.tags) for leaf in leaf_names(manager, member)]
    return [name]


def build_part(config: dict[str, Any], shots: int, directory: Path | None) -> tuple[ConfigurableTask, list[str]]:
    """Returns a task of the harness, and notes on how its questions differ from the paper's.

    Raises:
        MissingData: the questions are not available, or there are too few examples.
        ValueError: a row cannot be read or used.
    """
    notes: list[str] = []
    places: dict[str, list[Path]] = {}
    for key in ("tag", "group"):
        config.pop(key, None)
    config["num_fewshot"] = shots
    if directory is not None:
        places, notes = place_splits(config, shots, directory)
        splits = splits_of(places)
        config |= {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    try:
        part = ConfigurableTask(config=config)
    except Exception as error:
        if directory is None:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(" .")
            raise MissingData(f"{config['dataset_path']} cannot be loaded from the hub ({first})") from error
        raise cannot_use(next(iter(places.values()))[0], 1, config["task"], error) from error
    check_documents(part, config["task"], places)
    # If the examples come from the split that is asked, the harness draws one more, to replace the question itself.
    needed = shots + (part.fewshot_cfg.split == part.config.test_split)
    examples = len(part.sampler.df)
    if shots and not config_samples(config) and examples < needed:
        raise MissingData(f"there are {examples} examples, too few for {shots} before each question")
    return part, notes


def config_samples(config: Mapping[str, Any]) -> bool:
    """Returns whether the task has its own fixed examples."""
    return isinstance(config.get("fewshot_config"), dict) and bool(config["fewshot_config"].get("samples"))


def cannot_use(file: Path, row: int, task: str, error: Exception) -> ValueError:
    return ValueError(f"{file}, row {row}: the task {task} cannot use it ({type(error).__name__}: {error})")


def place_splits(config: dict[str, Any], shots: int, directory: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Returns the files of the splits that a task needs, and notes on the splits that were replaced.

    Validation replaces a missing test split. Validation replaces missing examples; if it cannot, the split that is
    asked replaces them, and the harness leaves the question itself out of its examples. Changes the config's splits
    accordingly.

    Raises:
        MissingData: there are no questions.
    """

    def files(split: str | None) -> list[Path]:
        return split_files(directory, config["dataset_path"], config.get("dataset_name"), split) if split else []

    notes: list[str] = []
    test, validation = config.get("test_split"), config.get("validation_split") or "validation"
    evaluated = test or validation
    if not files(evaluated):
        if not (test and files(validation)):
            folder = Path(config["dataset_path"]) / (config.get("dataset_name") or "")
            raise MissingData(f"there is no {directory / folder / evaluated}.jsonl")
        notes.append(f"the questions are those of {validation}, because {test} is missing")
        test, evaluated = None, validation
    places = {evaluated: files(evaluated)}
    has_validation = evaluated == validation or bool(files(validation))
    training, fewshot = config.get("training_split"), config.get("fewshot_split")
    if shots and not config_samples(config):
        if files(fewshot):
            training = training if files(training) else None
            places[str(fewshot)] = files(fewshot)
        elif files(training):
            fewshot = None
            places[str(training)] = files(training)
        else:
            training, fewshot = None, None
            if evaluated != validation and has_validation:
                places[validation] = files(validation)
                notes.append(f"the examples are from {validation}")
            else:
                # If both splits have the same name, the harness leaves the question itself out of its examples.
                fewshot = test
                notes.append(f"the examples are other questions of {evaluated}")
    else:
        training = fewshot = None
    config["test_split"] = test
    config["validation_split"] = validation if validation in places else None
    config["training_split"] = training if training in places else None
    config["fewshot_split"] = fewshot
    return places, notes


def splits_of(places: Mapping[str, list[Path]]) -> dict[str, Any]:
    """Returns split → data set of its rows.

    Raises:
        ValueError: a row cannot be read or a column mixes types; the message names the file, and the row if known.
    """
    import pyarrow
    from datasets import Dataset

    splits = {}
    for split, files in places.items():
        rows = read_split(files)
        try:
            splits[split] = Dataset.from_list(rows)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            message = str(error).splitlines()[0]
            raise ValueError(f"{files[0]}: a column holds values of several kinds ({message})") from error
    return splits


def check_documents(part: ConfigurableTask, task: str, places: Mapping[str, list[Path]]) -> None:
    """Makes question, choices and answer of every document once, so that a bad row is reported before the run."""
    if not places:
        return
    file = next(iter(places.values()))[0]
    for number, document in enumerate(part.eval_docs, start=1):
        try:
            part.doc_to_text(document)
            choices = part.doc_to_choice(document) if part.config.doc_to_choice is not None else None
            target = part.doc_to_target(document)
        except Exception as error:
            raise cannot_use(file, number, task, error) from error
        if choices is not None and isinstance(target, int) and not 0 <= target < len(choices):
            raise ValueError(f"{file}, row {number}: the answer is number {target}, of {len(choices)} choices")


def chosen_documents(sizes: Mapping[str, int], limit: int | None, seed: int) -> dict[str, list[int]]:
    """Returns the numbers of the documents to ask, ascending: all, or at most `limit`, divided in proportion to the
    parts' sizes (largest remainder)."""
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return {name: list(range(size)) for name, size in sizes.items()}
    takes = {name: limit * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: (-(limit * sizes[name] % total), name))
    for name in by_remainder[: limit - sum(takes.values())]:
        takes[name] += 1
    return {
        name: sorted(random.Random(f"{seed}/{name}").sample(range(size), takes[name])) for name, size in sizes.items()
    }


class Answered(NamedTuple):
    """The results of a task: metric (with its filter, unless the filter is "none") → the documents' values, and the
    samples as the harness logs them."""

    values: dict[str, list[float]]
    samples: list[dict[str, Any]]


def ask(lm: LM, prepared: PreparedTask, *, chat_template: bool = False) -> Answered:
    """Asks the questions, and returns the results.

    Args:
        chat_template: ask questions as a user's messages, with the examples as earlier turns.

    Raises:
        MissingData: the questions cannot be asked of this model.
    """
    parts = {name: part for name, part in prepared.parts.items() if prepared.samples[name]}
    for part in parts.values():
        part.set_fewshot_seed(seed=SHOTS_SEED)
    with _without_bars():
        results = evaluate(
            lm,
            {"tasks": parts},
            samples={name: prepared.samples[name] for name in parts},
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    values: dict[str, list[float]] = defaultdict(list)
    samples = []
    for name in parts:
        for sample in results["samples"][name]:
            for metric in sample["metrics"]:
                key = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                # The harness returns numpy scalars.
                values[key].append(float(sample[metric]))
            samples.append({"task": name, **sample})
    return Answered(dict(values), samples)


class AskedPrompts(DecoderLM):
    """Notes what a model would be asked, and asks none: `asked` has the ids of contexts and continuations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        TemplateLM.__init__(self)
        self.tokenizer, self.progress, self.max_length = tokenizer, None, sys.maxsize
        self.asked: list[tuple[list[int], list[int]]] = []

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        self.asked += [(context, continuation) for _, context, continuation in requests]
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        self.asked += [(self.tok_encode(request.args[0]), []) for request in requests]
        return [""] * len(requests)


def asked_first(prepared: PreparedTask, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Returns what is asked for the first question: the ids of a context and of each scored continuation, which is
    empty if the model writes the answer."""
    name = next(name for name, numbers in prepared.samples.items() if numbers)
    first = {part: numbers[:1] if part == name else [] for part, numbers in prepared.samples.items()}
    prompts = AskedPrompts(tokenizer)
    ask(prompts, replace(prepared, samples=first))
    return prompts.asked


def record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a document: enough to see the question and the answer, and to compare runs."""
    return {
        "task": sample["task"],
        "document": sample["doc_id"],
        "row": sample["doc"],
        "prompt": sample["arguments"][0][0],
        "answers": [answers[0] for answers in sample["resps"]],
        "target": sample["target"],
        "filter": sample["filter"],
        **{metric: float(sample[metric]) for metric in sample["metrics"]},
    }


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hides the harness's progress bars for building requests: one per task, and a group has up to 57 tasks."""
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
