"""What to ask a model: a list of parts, each a row or a few of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_danube.data.academic import AcademicTask, academic_tasks


class EvaluationData(LightningDataModule):
    """The questions of an evaluation, for `Evaluation`; each part that is not given is left out.

    Args:
        tasks: academic benchmarks, by their names in the lm-evaluation-harness.
        directory: where their files are, laid out as on the hub:
            `<directory>/allenai/ai2_arc/ARC-Challenge/test.jsonl`; from the hub itself where it is not given.
        limit: most questions of a benchmark, chosen by the seed.
        seed: of every choice.

    Raises:
        ValueError: for every mistake in the above, with the key's name.
    """

    def __init__(
        self,
        tasks: Sequence[str] = (),
        directory: str | None = None,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if limit is not None and limit < 1:
            raise ValueError(f"data.limit is {limit}: it must be at least 1")
        self.directory = None if directory is None else Path(directory).expanduser()
        if self.directory is not None and not self.directory.is_dir():
            raise ValueError(f"data.directory: there is no directory {directory}")
        self.tasks: list[AcademicTask] = academic_tasks(tasks)
        self.limit, self.seed = limit, seed

    def parts(self) -> list[Any]:
        """
        Raises:
            ValueError: there are none.
        """
        parts: list[Any] = [*self.tasks]
        if not parts:
            raise ValueError("data: nothing is asked: give data.tasks")
        return parts

    def test_dataloader(self) -> DataLoader[Any]:
        # A part is large and different from the next: one a batch, as it is.
        return DataLoader(self.parts(), batch_size=None, collate_fn=lambda part: part)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Parts stay where they are: the model makes its own tensors."""
        return batch
