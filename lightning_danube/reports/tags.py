"""The TensorBoard tags of a pre-training run: what each tag means, and which callback logs it."""

from __future__ import annotations

from typing import NamedTuple


class Tag(NamedTuple):
    """A tag of a pre-training run.

    Args:
        meaning: what its values are.
        callback: name of the class in lightning_danube.callbacks that logs the tag; None: the task does.
    """

    meaning: str
    callback: str | None = None

    @property
    def class_path(self) -> str | None:
        """Returns the callback as `trainer.callbacks` names it; None if the task logs the tag."""
        return None if self.callback is None else f"lightning_danube.callbacks.{self.callback}"


TAGS = {
    "loss/train": Tag("mean loss of one batch, nats/token"),
    "held_out/": Tag(
        "mean loss of a few held-out rows of the source (nats/token; a pair in preference tuning, a text in "
        "classification): before the first step, at each tenth of the run, and at each stage's end"
    ),
    "loss/held_out_": Tag("mean loss of all held-out rows of the source, nats/token, at each stage's end"),
    "mix/": Tag("share of the source in the tokens since the point before", "TokenLedger"),
    "mix/stage": Tag("number of the stage of the next sample, from 1 on", "CurriculumStages"),
    "tokens_seen/": Tag("tokens of the source since the run began", "TokenLedger"),
    "mix/seen": Tag("tokens of each source in each stage so far, as a stacked picture", "TokenLedger"),
    "optimizer/step": Tag("number of the optimizer step, since the horizontal axis counts tokens"),
    "optimizer/learning_rate": Tag("of the step just made"),
    "optimizer/gradient_norm": Tag("of all parameters together, before clipping"),
    "optimizer/skipped_steps": Tag(
        "steps left out so far because their gradient was not finite or too large", "SkipBadSteps"
    ),
    "throughput/tokens_per_second": Tag("since the point before, validation and checkpoints left out", "Throughput"),
    "throughput/mfu": Tag(
        "share of the device's peak FLOPs (peak_flops) that the model's own operations make up", "Throughput"
    ),
    "recall/": Tag("share of a made-up world's facts that are answered right, by which texts tell them", "FactRecall"),
    "samples/": Tag("the prompt and how the model continues it, each time after all held-out rows", "TextSamples"),
    "run/plan": Tag("what the run was going to do, as it was printed at the start", "PretrainingSummary"),
}
"""Tag, or the beginning of a tag → what it is."""
UNKNOWN = Tag("not described here")


def tag_called(name: str) -> Tag:
    """Returns the tag with the longest beginning of a name. The beginning of a tag, such as "recall/", is a name."""
    known = [beginning for beginning in TAGS if name.startswith(beginning)]
    if not known:
        known = [tag for tag in TAGS if tag.startswith(name)][:1]
    return TAGS[max(known, key=len)] if known else UNKNOWN
