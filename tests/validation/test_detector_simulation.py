"""The quick instance of benchmarks/reliability/detector.py: its runs, its rules and its bounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import BenchmarkError
from benchmarks.reliability import detector, detector_simulation
from cvm_translator.config import load_config
from cvm_translator.validation import DistillationValidator, ValidationConfig

CONFIG = """
corpus: {preset: gettext_de_en}
validation: {metrics: [bleu, chrf], weights: {bleu: 1.0, chrf: 1.0}}
"""
ERROR_RATES = {1000: 0.5, 2000: 0.31, 3000: 0.3, 4000: 0.29}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, make_corpus) -> Path:
    """A run folder with the validations of a few checkpoints."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "config.yaml").write_text(CONFIG)
    corpus = make_corpus(400)
    config = ValidationConfig.from_run(load_config(folder / "config.yaml"))
    validator = DistillationValidator(config, folder / "validation", corpus.sources, corpus.references)
    validator.score_teacher(corpus.translator(0.25, 9), "teacher")
    for step, error_rate in ERROR_RATES.items():
        validator.validate(step, 1, corpus.translator(error_rate, step))
    return folder


@pytest.fixture(scope="module")
def simulator(recorded: Path) -> detector_simulation.Simulator:
    recording = detector_simulation.load_recording(recorded, 3)
    return detector_simulation.Simulator(recording, 400, recording.config.guard)


def test_a_recording_is_read_as_it_was_stored(recorded: Path, simulator) -> None:
    recording = simulator.recording
    assert recording.steps == (2000, 3000, 4000, 1000)
    assert list(recording.metrics) == ["bleu", "chrf"]
    assert recording.checkpoints.shape == (4, 400, 28)
    stored = json.loads((recorded / "validation" / "step_4000.json").read_text())
    scores = recording.scores(recording.checkpoints[2].astype(np.float64).sum(axis=0))
    assert {name: float(score) for name, score in scores.items()} == pytest.approx(
        {name: stored["scores"][name] for name in ("bleu", "chrf")}
    )
    alone = np.eye(4)[2]
    assert simulator.true_quality(alone) == pytest.approx(stored["quality_score"])


@pytest.mark.parametrize("drop", [0.0, 0.03, 0.1])
def test_a_drop_is_as_deep_as_it_is_said_to_be(simulator, drop: float) -> None:
    mixture = simulator.draw_mixture(np.random.default_rng(1))
    lowered = simulator.lower_quality(mixture, drop)
    assert lowered.sum() == pytest.approx(1.0)
    assert 1 - simulator.true_quality(lowered) / simulator.true_quality(mixture) == pytest.approx(drop, abs=1e-4)


def test_a_drop_that_cannot_be_made_is_refused(simulator) -> None:
    with pytest.raises(BenchmarkError, match=r"no drop of 90.0%"):
        simulator.lower_quality(np.array([1.0, 0.0, 0.0, 0.0]), 0.9)


def test_the_simulated_rules_are_the_detectors(simulator) -> None:
    assert detector_simulation.check_against_detector(simulator, [1], 4) == []


def test_a_recording_with_too_few_validations_is_refused(recorded: Path) -> None:
    with pytest.raises(BenchmarkError, match="has 4 validations"):
        detector_simulation.load_recording(recorded, 4)


@pytest.mark.slow
def test_the_whole_program_on_few_runs(recorded: Path, tmp_path: Path) -> None:
    arguments = f"--run {recorded} --last 3 --num-runs 12 --num-declines 6 --num-sentences 400 --num-checked 1 --seed 3"
    options = detector.build_parser().parse_args([*arguments.split(), "--work", str(tmp_path)])
    data = json.loads(json.dumps(detector.run_benchmark(options)))
    assert json.loads(json.dumps(detector.run_benchmark(options))) == data  # from its parts
    assert data["different"] == []
    figures = data["by_num_sentences"]["400"]
    assert figures["false_alarms"]["num_alarms"] == 0
    powers = [row["power"] for row in figures["power"]]
    assert powers == sorted(powers)
    assert powers[0] < 0.2
    assert figures["declines"]["0.02"]["with_drift"]["share_found"] > 0.9
    text = detector.format_results(data)
    assert "12 healthy runs of 10 validations" in text
    assert "FAILED: false alarms" in text  # of 12 runs without an alarm, nothing so small follows
    image = detector.plot_power(data)
    assert image is not None
    assert image.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("successes", "trials", "upper"),
    [(0, 2000, 0.001497), (5, 2000, 0.005249), (20, 20, 1.0), (0, 10, 0.258866), (3, 10, 0.606624)],
)
def test_the_bounds_of_shares_are_clopper_and_pearsons(successes: int, trials: int, upper: float) -> None:
    """The values of the beta quantiles, by SciPy: beta.ppf(0.95, k + 1, n - k)."""
    assert detector.upper_bound(successes, trials) == pytest.approx(upper, abs=1e-6)
    assert detector.lower_bound(trials - successes, trials) == pytest.approx(1 - upper, abs=1e-6)
