"""The paper's numbers beside ours: none under the other's name."""

import numpy as np
import pytest

from lightning_danube.reports import paper


def test_the_presets_are_the_papers_shapes() -> None:
    shapes = paper.shapes()
    for model in ("danube3-500m", "danube3-4b"):
        assert shapes[model, "the paper's"].tolist() == shapes[model, "preset here"].tolist()
        stages = paper.stages()[model]
        assert stages["web %, the paper's"].tolist() == pytest.approx(stages["web %, config here"].tolist())
        assert stages["B tokens, the paper's"].tolist() == stages["B tokens, config here"].tolist()


def test_academic_scores_stand_in_columns_of_their_own() -> None:
    academic = paper.academic()
    assert set(academic.columns.get_level_values(0)) == {"", "stated in the paper", "measured here: smollm2"}
    assert academic.loc["ARC-c", ("stated in the paper", "Danube3 4B")] == pytest.approx(58.96)
    assert academic.loc["ARC-c", ("measured here: smollm2", "score")] == 32.0
    assert academic["measured here: smollm2", "questions"].to_dict()["GSM8K"] == 24
    (ax,) = paper.academic_scores().axes
    (score,) = [line for line in ax.lines if str(line.get_label()).startswith("SmolLM2")]
    assert np.asarray(score.get_xdata()).tolist() == academic["measured here: smollm2", "score"].tolist()


def test_quantized_models_keep_their_names() -> None:
    table = paper.quantized_perplexity()
    assert table.loc["Q4_K_M", ("Danube3 4B, the paper's", "perplexity")] == 6.37
    assert table.loc["Q2_K", ("SmolLM2 135M, here", "rise, %")] == pytest.approx(43.9, abs=0.05)
    assert table.loc["F16", ("21M of this project, here", "rise, %")] == 0
    assert len(paper.perplexity_by_bits().axes[0].texts) == 6
    sizes = paper.quantized_sizes()
    assert sizes.loc["Q4_K_M", ("danube3-4b", "GB, the paper's")] == 2.39
    assert paper.classification().loc["IMDB", "Danube3 4B, the paper's"] == 0.971


def test_bits_a_weight_are_those_of_the_formats() -> None:
    """A block of 32 weights takes 34 bytes in Q8_0, a weight 2 bytes in F16; a file has a little more."""
    table = paper.quantized_perplexity()
    for model in ("Danube3 4B, the paper's", "Danube3 500M, the paper's"):
        assert table.loc["F16", (model, "bits")] == pytest.approx(16, rel=0.02)
        assert table.loc["Q8_0", (model, "bits")] == pytest.approx(8 * 34 / 32, rel=0.02)


def test_rises_are_over_the_perplexity_in_16_bits() -> None:
    table = paper.quantized_perplexity()
    for model in table.columns.get_level_values(0).unique():
        perplexity = table[model, "perplexity"]
        assert table[model, "rise, %"].tolist() == pytest.approx(
            [100 * (value / perplexity["F16"] - 1) for value in perplexity], nan_ok=True
        )
    assert table.loc["Q4_K_M", ("Danube3 4B, the paper's", "rise, %")] == pytest.approx(100 * (6.37 - 6.17) / 6.17)


def test_measured_scores_lie_within_their_intervals() -> None:
    measured = paper.academic()["measured here: smollm2"]
    assert (measured["low"] < measured["score"]).all() and (measured["score"] < measured["high"]).all()
    assert ((measured["high"] - measured["low"]) < 60).all()
