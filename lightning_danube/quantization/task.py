"""Evaluates quantization: a model and its quantized levels read one text, and the results are compared.

Shapes: B texts of a batch, T tokens, N counted tokens, V vocabulary, W windows, Q questions.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_danube.quantization.decoders import check_finite, full_decoder, quantized_decoder
from lightning_danube.quantization.levels import FULL, Level, why_not
from lightning_danube.quantization.measured import (
    MeasuredLevel,
    RunningModel,
    load_measured,
    measured_key,
    save_measured,
)
from lightning_danube.quantization.settings import QuantizationSettings
from lightning_danube.quantization.text_windows import TextWindows
from lightning_danube.training.contract import WindowBatch, data_of
from lightning_danube.weights.adapters import weights_digest
from lightning_danube.weights.loading import load_decoder

REFERENCE_BYTES = 2**31
"""Most bytes on disk for the full model's distributions, with which the levels are compared."""
NO_WINDOWS = (
    "QuantizationEvaluation reads a text, {data} has none in windows: set data.class_path to "
    "lightning_danube.quantization.TextWindows"
)
PACKAGES = {"gguf": "llama-cpp-python", "bitsandbytes": "bitsandbytes", "hqq": "hqq", "rounding": "hqq"}


class QuantizationEvaluation(LightningModule):
    """Reads the text of `TextWindows` with a model and with each of its quantized levels in turn.

    A measurement of the same weights, level and text is read from the cache. If a level cannot run on this machine,
    the reason is reported and the evaluation continues.

    Args:
        weights: the model: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        levels: `<method>:<type>` and options, such as gguf:Q4_K_M, gguf:Q4_K_M+imatrix, gguf:F16+cache-q8_0,
            bitsandbytes:int8, bitsandbytes:nf4+double, hqq:4/64+embeddings, rounding:4/64. bitsandbytes, hqq and
            rounding quantize the blocks' linear layers; `+embeddings` adds the embedding and the head. gguf quantizes
            all that llama.cpp does; `+linear` excludes the embedding and the head.
        cost: whether to measure speed and memory, for each level in a separate process.
        cache_dir: where measurements are kept; by default the cache directory of the data.

    Raises:
        ValueError: a level is unknown, or the weights cannot be read or are not finite.
    """

    def __init__(
        self,
        weights: str,
        levels: list[str],
        cost: bool = QuantizationSettings.cost,
        cache_dir: str | None = QuantizationSettings.cache_dir,
    ) -> None:
        super().__init__()
        self.levels = QuantizationSettings(weights, levels, cost, cache_dir).parsed_levels
        self.weights, self.cost = weights, cost
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.decoder = load_decoder(weights, dtype=torch.float32)
        self.config = self.decoder.config
        check_finite(self.decoder)
        self.done: dict[Level, MeasuredLevel] = {}
        """Level → its measurements, from this run or an earlier one."""
        self.failed: dict[Level, str] = {}
        """Level → the reason why it was not measured."""
        self.reused: list[Level] = []
        self._missing: list[Level] = []
        self._running: _Reading | None = None

    # --- before -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data = self._data
        if self.trainer.world_size > 1:
            raise ValueError("QuantizationEvaluation runs in one process: set trainer.devices and num_nodes to 1")
        if max(data.context_lengths) > self.config.max_position_embeddings:
            raise ValueError(
                f"data.context_lengths asks for {max(data.context_lengths):,} tokens, the model reads "
                f"{self.config.max_position_embeddings:,}: shorten the windows"
            )
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocab_size:,} tokens, the model {self.config.vocab_size:,}: give the "
                "tokenizer that belongs to it"
            )
        self._directory = (self.cache_dir or data.cache_dir) / "quantization"
        self._model = weights_digest(self.decoder)
        for level in [FULL, *self.levels]:
            kept = load_measured(self._kept(level))
            if kept is not None and (kept.cost or kept.cost_reason or not self.cost):
                self.done[level] = kept
                self.reused.append(level)
            elif reason := why_not(level):
                self.failed[level] = reason
            else:
                self._missing.append(level)
        # The levels are compared with the full model. It reads again the part of the text for which its distributions
        # are kept.
        if self._missing and self._missing[0] != FULL:
            self._missing.insert(0, FULL)
        data.passes = len(self._missing)

    @property
    def _data(self) -> TextWindows:
        return data_of(self.trainer, TextWindows, NO_WINDOWS)

    def _kept(self, level: Level) -> Path:
        try:
            package = version(PACKAGES.get(level.method, "torch"))
        except PackageNotFoundError:
            package = "none"
        facts: dict[str, Any] = {
            "model": self._model,
            "level": level.name,
            "package": package,
            "precision": self.trainer.precision,
            "device": self.trainer.strategy.root_device.type,
            **self._data.identity(),
        }
        if level.imatrix:
            facts["calibration"] = self._data.calibration_identity()
        return self._directory / f"{measured_key(**facts)}.npz"

    # --- reading ------------------------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self.decoder.eval()
        self._directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self._directory)
        # If this process is killed, the next one removes its files.
        self._work = tempfile.TemporaryDirectory(
            prefix=f"work-{socket.gethostname()}-{os.getpid()}-", dir=self._directory, ignore_cleanup_errors=True
        )
        self._divergences = _Divergences(Path(self._work.name) / "reference", self.config.vocab_size)

    def test_step(self, batch: WindowBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not batch:
            return
        level = self._missing[dataloader_idx]
        with self._cleaning_up():
            if batch_idx == 0:
                self._finish()
                self._begin(level)
            if level in self.failed:
                return
            assert self._running is not None
            try:
                self._running.read(batch)
            except (RuntimeError, NotImplementedError) as error:
                # A kernel that this device does not have, or no memory left.
                self._fail(level, error)

    def on_test_epoch_end(self) -> None:
        with self._cleaning_up():
            self._finish()
        self._work.cleanup()

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Removes half-written files when an error occurs, above all on a full disk."""
        try:
            yield
        except BaseException:
            self._work.cleanup()
            raise

    def _begin(self, level: Level) -> None:
        try:
            began = time.monotonic()
            model, file = self._build(level)
        except OSError:
            raise
        except (ValueError, RuntimeError, NotImplementedError) as error:
            self._fail(level, error)
            return
        self._running = _Reading(level, model, file, self._divergences, began, to_compare_with=level in self.reused)

    def _build(self, level: Level) -> tuple[RunningModel, Path | None]:
        if level == FULL:
            return full_decoder(self.decoder), None
        if level.method != "gguf":
            return quantized_decoder(self.decoder, level), None
        from lightning_danube.quantization.gguf import quantized_file

        data = self._data
        return quantized_file(
            self.decoder,
            level,
            Path(self._work.name),
            tokenizer=data.tokenizer,
            calibration_ids=torch.from_numpy(data.calibration_ids),
            context_length=max(data.context_lengths),
        )

    def _fail(self, level: Level, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        self.failed[level] = reason[:300]
        if self._running is not None:
            self._running.close()
        self._running = None
        if level == FULL:
            raise ValueError(f"the model itself cannot be measured: {reason}") from error

    def _finish(self) -> None:
        """Stores the results of the level that was read last."""
        if self._running is None:
            return
        reading, self._running = self._running, None
        if reading.to_compare_with:
            reading.close()
            return
        measured = reading.result()
        reading.close()
        if self.cost:
            measured = self._with_cost(reading.level, reading.file, measured)
        if reading.file is not None:
            reading.file.unlink(missing_ok=True)
        save_measured(self._kept(reading.level), measured)
        self.done[reading.level] = measured

    def _with_cost(self, level: Level, file: Path | None, measured: MeasuredLevel) -> MeasuredLevel:
        from lightning_danube.quantization.cost import measure_cost

        dtype = str(self.decoder.lm_head.weight.dtype).removeprefix("torch.")
        try:
            cost = measure_cost(
                level,
                self.weights,
                file,
                dtype=dtype,
                device=str(self.device),
                threads=torch.get_num_threads(),
            )
        except ValueError as error:
            return replace(measured, cost_reason=str(error))
        return replace(measured, cost=cost)


class _Divergences:
    """The full model's distributions, in the order in which the text is read, as many as fit into the limit.

    They are stored in an unlinked file, so nothing is left on disk even after a crash.
    """

    def __init__(self, path: Path, vocabulary: int) -> None:
        self.path, self.vocabulary = path, vocabulary
        self.room = max(1, REFERENCE_BYTES // (4 * vocabulary))
        self.kept: list[tuple[int, int]] = []
        self.is_full = False
        self.file = path.open("w+b")
        path.unlink()

    def keep(self, log_probabilities_NV: Tensor) -> None:
        """Appends the distributions of one window, if there is room."""
        rows = len(log_probabilities_NV)
        start = self.kept[-1][1] if self.kept else 0
        self.is_full = bool(self.kept) and start + rows > self.room
        if self.is_full:
            return
        self.kept.append((start, start + rows))
        self.file.seek(4 * self.vocabulary * start)
        try:
            self.file.write(log_probabilities_NV.float().cpu().numpy().tobytes())
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}, while the full model's answers were kept", str(self.path)
            ) from error

    def window(self, number: int) -> Tensor | None:
        """Returns the distributions of a window, (N, V), in float32; None if there was no room for them."""
        if number >= len(self.kept):
            return None
        start, end = self.kept[number]
        self.file.seek(4 * self.vocabulary * start)
        raw = bytearray(self.file.read(4 * self.vocabulary * (end - start)))
        return torch.frombuffer(raw, dtype=torch.float32).view(end - start, self.vocabulary)


class _Reading:
    """One model that is reading the text, and its results so far."""

    def __init__(
        self,
        level: Level,
        model: RunningModel,
        file: Path | None,
        divergences: _Divergences,
        began: float,
        *,
        to_compare_with: bool,
    ) -> None:
        """`to_compare_with`: the model's results are known already, and only its distributions are needed."""
        self.level, self.model, self.file, self.divergences, self.began = level, model, file, divergences, began
        self.to_compare_with = to_compare_with
        self.nats: dict[int, list[np.ndarray[Any, Any]]] = {}
        self.divergence: list[np.ndarray[Any, Any]] = []
        self.same_first: list[np.ndarray[Any, Any]] = []
        self.cloze: list[bool] = []
        self.primary: int | None = None

    def read(self, batch: WindowBatch) -> None:
        self.primary = self.primary or batch.get("context_length")
        if self.to_compare_with and (batch.get("context_length") != self.primary or self.divergences.is_full):
            return
        ids_BT, first = batch["input_ids"], batch["first"]
        logits_BNV = self.model.logits(ids_BT, first)[:, :-1]
        labels_BN = ids_BT[:, first + 1 :].to(logits_BNV.device)
        if "choices" in batch:
            nats_B = _nats(logits_BNV.float().log_softmax(-1), labels_BN).sum(1)
            self.cloze += (nats_B.view(-1, batch["choices"]).argmin(1) == 0).tolist()
            return
        length = batch["context_length"]
        # One window at a time, because several copies of a whole batch's distributions would need too much memory.
        for logits_NV, labels_N in zip(logits_BNV, labels_BN, strict=True):
            log_probabilities_NV = logits_NV.float().log_softmax(-1)
            if length == self.primary:
                self._compare(len(self.nats.get(length, [])), log_probabilities_NV)
            self.nats.setdefault(length, []).append(_nats(log_probabilities_NV, labels_N).cpu().numpy())

    def _compare(self, window: int, log_probabilities_NV: Tensor) -> None:
        if self.level == FULL:
            self.divergences.keep(log_probabilities_NV)
        wanted_NV = self.divergences.window(window)
        if wanted_NV is None:
            return
        wanted_NV = wanted_NV.to(log_probabilities_NV)
        self.divergence.append(divergence(wanted_NV, log_probabilities_NV).cpu().numpy())
        self.same_first.append((wanted_NV.argmax(-1) == log_probabilities_NV.argmax(-1)).cpu().numpy())

    def result(self) -> MeasuredLevel:
        return MeasuredLevel(
            self.model.content,
            time.monotonic() - self.began,
            {length: np.stack(windows) for length, windows in self.nats.items()},
            np.stack(self.divergence),
            np.stack(self.same_first),
            np.array(self.cloze, bool),
        )

    def close(self) -> None:
        self.model.close()


def _nats(log_probabilities_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Returns the loss of each label in nats, (…, N)."""
    return -log_probabilities_NV.gather(-1, labels_N[..., None])[..., 0]


def divergence(wanted_NV: Tensor, found_NV: Tensor) -> Tensor:
    """Returns the Kullback-Leibler divergence at each position, (N,), in nats, from log-probabilities.

    The textbook's sum of p (ln p − ln q) is a small difference of large terms. In float32 its error is 1e-7, which is
    more than F16 costs. As probabilities add up to 1, q − p can be added to each term; then no term is negative.
    """
    apart_NV = wanted_NV - found_NV
    return (wanted_NV.exp() * (torch.expm1(-apart_NV) + apart_NV)).sum(-1)


def _remove_abandoned(directory: Path) -> None:
    """Removes the files of killed processes of this machine."""
    for path in directory.glob(f"work-{socket.gethostname()}-*"):
        process = int(path.name.split("-")[-2])
        if not _is_running(process):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
