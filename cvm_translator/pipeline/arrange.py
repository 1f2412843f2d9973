"""The judge's findings in the shape of the final report: every figure as value, low and high, models by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.resampling import confidence_interval, resample, resampling_counts


def arrange_scores(report: dict[str, Any], perplexities: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """{model: {scores, retentions, probes, length_ratio}} of one judged set, the teacher among them."""
    arranged = {}
    for name, model in {"teacher": report["teacher"], **report["models"]}.items():
        scores = {
            metric: {"value": value, "low": model["intervals"][metric][0], "high": model["intervals"][metric][1]}
            for metric, value in model["scores"].items()
        }
        if name in perplexities:
            scores["perplexity"] = perplexities[name]
        retentions = dict(model.get("retentions", {}))
        if "quality" in retentions:
            retentions = {"quality_score": retentions.pop("quality")} | retentions
        arranged[name] = {
            "scores": scores,
            "retentions": retentions,
            "probes": model["probes"],
            "length_ratio": model["length_ratio"],
            "error_analysis": model.get("error_analysis"),
        }
    return arranged


def arrange_perplexities(
    losses: Mapping[str, FloatArray], num_resamples: int, seed: int
) -> dict[str, dict[str, float]]:
    """Each model's perplexity with its 95 % interval, over the pairs that fit all models; {} where there are none.

    `losses`: (N, 2) nats and tokens of each pair's reference, by model.
    """
    fits = np.logical_and.reduce([rows[:, 1] > 0 for rows in losses.values()])
    if not fits.any():
        return {}
    counts = resampling_counts(int(fits.sum()), num_resamples, seed)
    found = {}
    for name, rows in losses.items():
        kept = rows[fits]
        draws = resample(counts, kept)
        low, high = confidence_interval(np.exp(draws[:, 0] / draws[:, 1]))
        nats, num_tokens = kept.sum(axis=0)
        found[name] = {"value": float(np.exp(nats / num_tokens)), "low": low, "high": high}
    return found


def arrange_gate(gate: dict[str, Any]) -> dict[str, Any]:
    """The gate's word, its thresholds by metric and what failed, by how much."""
    thresholds = {
        "quality_score" if item["name"] == "quality" else item["name"]: item["threshold"]
        for item in gate["requirements"]
    }
    return {
        "passed": gate["passed"],
        "model": gate["model"],
        "thresholds": thresholds,
        "failures": gate["failures"],
    }


def negate(figure: dict[str, float]) -> dict[str, float]:
    """A loss as a change."""
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}
