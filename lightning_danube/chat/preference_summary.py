"""The plan and the result of a preference-tuning run, as texts and as the content of `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_danube.chat.preference_data import PreferenceData, Reference
from lightning_danube.chat.summary import steps_done, training_summary
from lightning_danube.intervals import wilson
from lightning_danube.terminal import amount, text_table
from lightning_danube.training.run_facts import RunFacts, Trained, metrics_of_sources

METRIC_NAMES = {
    "loss/held_out_": "val_loss",
    "rewards/chosen_held_out_": "val_reward_chosen",
    "rewards/rejected_held_out_": "val_reward_rejected",
    "rewards/margin_held_out_": "val_reward_margin",
    "rewards/accuracy_held_out_": "val_reward_accuracy",
    "ranking/accuracy_held_out_": "val_ranking_accuracy",
}
"""Prefix of the logged name, before the source's name → name in `summary.json`."""
SHARES = ("val_reward_accuracy", "val_ranking_accuracy")
PairResults = dict[str, dict[str, float]]
"""Metric → source → value."""


def pair_results(metrics: Mapping[str, Tensor]) -> PairResults:
    """Returns what the last validation measured on the held-out pairs.

    Args:
        metrics: the trainer's `callback_metrics`.
    """
    return {metric: metrics_of_sources(metrics, prefix) for prefix, metric in METRIC_NAMES.items()}


def with_intervals(results: PairResults, pairs: Mapping[str, int]) -> dict[str, Any]:
    """Returns the results, and `<share>_interval` → source → the 95 % interval of each share.

    Args:
        pairs: source → pairs that were measured.
    """
    intervals = {
        f"{share}_interval": {
            name: [round(end, 4) for end in wilson(value, pairs[name]).ends]
            for name, value in results.get(share, {}).items()
        }
        for share in SHARES
    }
    return results | intervals


# --- the plan ---------------------------------------------------------------------------------------------------------


def reference_line(reference: Reference) -> str:
    """Returns for how many pairs the reference was computed, and for how many an earlier run had computed it."""
    computed = f"{amount(reference.computed, 'pair')} computed in {reference.seconds:.1f} s"
    reused = f"{amount(reference.reused, 'pair')} reused from an earlier run"
    told = [text for text, pairs in ((computed, reference.computed), (reused, reference.reused)) if pairs]
    return f"reference: {', '.join(told)}"


def pair_length_line(data: PreferenceData, steps: str, run: str) -> str:
    """Returns the length of a preference-tuning run, and the run's directory."""
    return (
        f"run: {steps} steps of {amount(data.batch_rows, 'pair')} of at most 2 × {data.context_length} places, in "
        f"{amount(data.epochs, 'epoch')}, into {run}"
    )


# --- the result -------------------------------------------------------------------------------------------------------


def preference_fit_summary(
    task: LightningModule,
    facts: RunFacts,
    data: PreferenceData,
    trained: Trained,
    *,
    before: PairResults,
    after: PairResults,
) -> dict[str, Any]:
    """Returns the content of `summary.json` of `fit`.

    Args:
        before, after: results before and after training; empty if nothing was measured.
    """
    pairs = facts.held_out_counts or data.evaluation_pairs(data.validation_examples)
    return {
        "weights": getattr(task, "weights", None),
        "beta": getattr(task, "beta", None),
        **training_summary(task, facts, data, trained),
        "sources": data.reports(),
        "val_pairs": pairs,
        **{f"{name}_before": values for name, values in with_intervals(before, pairs).items()},
        **with_intervals(after, pairs),
    }


def preference_result_text(summary: Mapping[str, Any], before: PairResults, after: PairResults, run: Path) -> str:
    """Returns the table of the results before and after training, and the next command.

    Args:
        summary: the result of `preference_fit_summary`.
    """
    table = results_table([("before", before), ("after", after)], summary["val_pairs"])
    return "\n".join(["", table, "", *steps_done(summary, run)])


def preference_evaluation_summary(
    results: PairResults, pairs: Mapping[str, int], *, weights: str, precision: str | int
) -> dict[str, Any]:
    """Returns the content of `summary.json` of `validate` and `test`."""
    return {"weights": weights, "precision": precision, "val_pairs": pairs, **with_intervals(results, pairs)}


def results_table(results: Sequence[tuple[str, PairResults]], pairs: Mapping[str, int]) -> str:
    """Returns a table with a row for each source and each time of measuring.

    Args:
        results: (time of measuring, results).
        pairs: source → number of measured pairs.
    """
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
