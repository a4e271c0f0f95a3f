"""What a preference-tuning run was and what came of it: held-out pairs before and after, and summary.json."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.throughput import Throughput
from lightning_danube.chat.preference_data import PreferenceData
from lightning_danube.files import write_json
from lightning_danube.intervals import wilson
from lightning_danube.terminal import quoted, runnable, text_table
from lightning_danube.training.position import run_directory, steps_ahead

# What is logged of the held-out pairs of a source → what summary.json calls it.
METRICS = {
    "loss/held_out_": "val_loss",
    "rewards/chosen_held_out_": "val_reward_chosen",
    "rewards/rejected_held_out_": "val_reward_rejected",
    "rewards/margin_held_out_": "val_reward_margin",
    "rewards/accuracy_held_out_": "val_reward_accuracy",
    "ranking/accuracy_held_out_": "val_ranking_accuracy",
}
SHARES = ("val_reward_accuracy", "val_ranking_accuracy")
Results = dict[str, dict[str, float]]
"""Metric → source → value."""


class PreferenceSummary(Callback):
    """Prints the plan and the result of a preference-tuning run and writes `summary.json`.

    Of each source's held-out pairs: the loss; the reward accuracy, in how many of them the chosen answer has become
    likelier by more than the rejected one; the margin between their rewards; the ranking accuracy, in how many the
    chosen answer is the likelier one. Shares come with a 95 % interval (Wilson 1927).

    Before training it needs the trainer's check of validation: `num_sanity_val_steps: -1`.
    """

    def __init__(self) -> None:
        self._before: Results = {}
        self._measured: tuple[int, Results] = (-1, {})
        self._seconds_before = 0.0
        self._began = time.monotonic()

    # --- fit ----------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before the task computes the reference, which may take a while.
        self._began = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = preference_data_of(trainer)
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        reports = data.reports()
        rows = [
            [
                name,
                f"{report['pairs']:,}",
                f"{report['pairs_held_out']:,}",
                f"{report['tokens']:,}",
                f"{report['answer_tokens']:,}",
                f"{report['shortened_pairs']:,}",
                f"{sum(report['left_out'].values()):,}",
            ]
            for name, report in reports.items()
        ]
        lines = [
            f"model: {pl_module.config.parameters:,} parameters, of which {trained:,} train",  # type: ignore[union-attr]
            text_table(["source", "pairs", "held out", "tokens", "of answers", "shortened", "left out"], rows),
        ]
        for name, report in reports.items():
            lines += [f"{name}: {count:,} left out: {cause}" for cause, count in report["left_out"].items()]
            lines += [f"  {message}" for message in report["first_left_out"]]
        reference = data.reference
        computed = f"{reference.computed:,} pairs computed in {reference.seconds:.1f} s"
        reused = f"{reference.reused:,} pairs as an earlier run has left them"
        told = [text for text, pairs in ((computed, reference.computed), (reused, reference.reused)) if pairs]
        lines.append(f"reference: {', '.join(told)}")
        lines.append(
            f"run: {steps_ahead(trainer, data.total_steps)} steps of {data.batch_rows} pairs of at most "
            f"2 × {data.context_length} places, in {data.epochs} pass(es), into {trainer.log_dir}"
        )
        say(trainer, "\n".join(lines))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._before = results_of(trainer)
        elif trainer.state.fn == "fit":
            self._measured = trainer.global_step, results_of(trainer)
        elif trainer.state.fn == "validate":
            self._report_evaluation(trainer, preference_data_of(trainer).validation_examples)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        data, directory = preference_data_of(trainer), run_directory(trainer)
        # A run that ends before its pass does is not validated at its end: what was measured earlier is not its result.
        step, after = self._measured
        after = after if step == trainer.global_step else {}
        pairs = data.evaluation_pairs(data.validation_examples)
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        seconds = self._seconds()
        summary = {
            "weights": getattr(pl_module, "weights", None),
            "beta": getattr(pl_module, "beta", None),
            "steps": trainer.global_step,
            "parameters": pl_module.config.parameters,  # type: ignore[union-attr]
            "trained_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "precision": trainer.precision,
            "seconds": round(seconds, 3),
            "places_per_second": round(trainer.global_step * data.batch_tokens / throughput.seconds, 1)
            if throughput and throughput.seconds
            else None,
            "sources": data.reports(),
            "val_pairs": pairs,
            **{f"{name}_before": values for name, values in with_intervals(self._before, pairs).items()},
            **with_intervals(after, pairs),
        }
        write_json(directory / "summary.json", summary)
        minutes, rest = divmod(round(seconds), 60)
        lines = [
            "",
            results_table([("before", self._before), ("after", after)], pairs),
            "",
            f"{trainer.global_step:,} steps in {minutes} min {rest:02d} s",
            f"run:  {directory}",
            f"next: {runnable()} chat --weights {quoted(directory)}",
        ]
        say(trainer, "\n".join(lines))

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before, self._before = state_dict["seconds"], state_dict["before"]

    # --- validate and test --------------------------------------------------------------------------------------------

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, None)

    def _report_evaluation(self, trainer: Trainer, limit: int | None) -> None:
        data, results = preference_data_of(trainer), results_of(trainer)
        if not trainer.is_global_zero:
            return
        pairs, path = data.evaluation_pairs(limit), run_directory(trainer) / "summary.json"
        facts = {"weights": str(trainer.ckpt_path), "precision": trainer.precision, "val_pairs": pairs}
        write_json(path, {**facts, **with_intervals(results, pairs)})
        say(trainer, results_table([("", results)], pairs))
        say(trainer, f"written to {path}")


def results_of(trainer: Trainer) -> Results:
    """What the last validation said of the held-out pairs."""
    return {
        metric: {
            name.removeprefix(prefix): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix)
        }
        for prefix, metric in METRICS.items()
    }


def with_intervals(results: Results, pairs: dict[str, int]) -> dict[str, Any]:
    """The results, and `<share>_interval` → source → the 95 % interval of each share."""
    intervals = {
        f"{share}_interval": {
            name: [round(end, 4) for end in wilson(value, pairs[name]).ends]
            for name, value in results.get(share, {}).items()
        }
        for share in SHARES
    }
    return results | intervals


def results_table(results: list[tuple[str, Results]], pairs: dict[str, int]) -> str:
    rows = []
    for name, count in pairs.items():
        for when, metrics in results:
            if name not in metrics.get("val_loss", {}):
                continue
            shares = []
            for share in SHARES:
                low, high = wilson(metrics[share][name], count).ends
                shares.append(f"{100 * metrics[share][name]:.1f} % ({100 * low:.0f}–{100 * high:.0f})")
            loss, margin = metrics["val_loss"][name], metrics["val_reward_margin"][name]
            rows.append([f"{name} {when}".strip(), f"{count:,}", f"{loss:.4f}", shares[0], f"{margin:+.3f}", shares[1]])
    header = ["held-out pairs", "pairs", "loss", "reward accuracy", "margin", "ranking accuracy"]
    return text_table(header, rows)


def preference_data_of(trainer: Trainer) -> PreferenceData:
    """
    Raises:
        ValueError: the run has other data.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PreferenceData):
        raise ValueError("PreferenceSummary reports on PreferenceData: remove it, or use that data module")
    return data
