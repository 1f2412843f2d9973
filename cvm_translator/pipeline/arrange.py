"""The judge's findings in the shape of the final report: every figure as value, low and high, models by name."""

from __future__ import annotations

from typing import Any


def arrange_scores(report: dict[str, Any]) -> dict[str, Any]:
    """{model: {scores, retentions, probes, length_ratio}} of one judged set, the teacher among them."""
    arranged = {}
    for name, model in {"teacher": report["teacher"], **report["models"]}.items():
        scores = {
            metric: {"value": value, "low": model["intervals"][metric][0], "high": model["intervals"][metric][1]}
            for metric, value in model["scores"].items()
        }
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
