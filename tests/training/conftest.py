"""A tiny model, data of unequal lengths, and a whole loop whose judge says what a test wants to hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import FaultInjection, GuardConfig, ModelConfig, TrainingConfig, ValidationSettings
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.initialization import init_random
from cvm_translator.models.perplexity import compute_perplexity, measure_reference_losses
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.control import ControlFile
from cvm_translator.runs.events import EventWriter, read_events
from cvm_translator.training.guard import Judgement
from cvm_translator.training.judges import ValidationJudge
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.resume import delivered_weights
from cvm_translator.training.setup import LoopOutcome, LoopSetup
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState, seed_everything
from cvm_translator.training.widths import UNROUNDED_BITS, WidthCourse
from cvm_translator.validation import DistillationValidator, ValidationConfig

VOCAB = 24
STUDENT = ModelConfig(
    dim=16, num_heads=2, feed_forward_dim=24, encoder_layers=1, decoder_layers=1, dropout=0.1, max_length=16
)
TEACHER = ModelConfig(
    dim=24, num_heads=2, feed_forward_dim=32, encoder_layers=1, decoder_layers=1, dropout=0.0, max_length=16
)

LATE_INT8 = WidthCourse((8,), first_step=11)


def round_weights(model: CvmTransformer, bits: int) -> None:
    model.set_fake_quantization(bits < UNROUNDED_BITS)


@pytest.fixture
def make_model() -> Callable[..., CvmTransformer]:
    def make(config: ModelConfig = STUDENT, seed: int = 0) -> CvmTransformer:
        model = CvmTransformer(config, VOCAB)
        init_random(model, seed)
        return model

    return make


@pytest.fixture
def teacher(make_model: Callable[..., CvmTransformer]) -> CvmTransformer:
    return make_model(TEACHER, 1)


@pytest.fixture
def dataset() -> DistillationDataset:
    """90 pairs whose target is the reversed source, of 1 to 12 tokens."""
    generator = np.random.default_rng(3)
    sources = [generator.integers(4, VOCAB, generator.integers(1, 13)).tolist() for _ in range(90)]
    return DistillationDataset(sources, [source[::-1] for source in sources])


@dataclass
class ScriptedJudge:
    """Stands in for the validation of real output: gives the verdicts of a script, by attempt and step.

    Stateful like the real one; a step that the script does not name is an improvement.
    """

    script: dict[tuple[int, int], str]
    not_held: frozenset[int] = frozenset()
    """Steps whose quality does not stand beside the width before."""
    widths: list[int] = field(default_factory=list)
    judged: list[list[int]] = field(default_factory=list)
    seen_weights: list[torch.Tensor] = field(default_factory=list)
    observed: list[list[int]] = field(default_factory=list)
    num_started: int = 0
    """How often a new best was asked for."""

    def judge(self, state: LoopState, model: CvmTransformer, bits: int) -> Judgement:
        assert not model.training
        self.widths.append(bits)
        self.judged.append([state.attempt, state.step])
        self.seen_weights.append(next(model.parameters()).detach().clone())
        verdict = self.script.get((state.attempt, state.step), "improved")
        is_degraded = verdict in ("degraded", "emergency")
        is_held = not is_degraded and state.step not in self.not_held
        return Judgement(
            verdict, verdict in ("first", "improved"), is_degraded, f"it is {verdict}", {"drop": 0.1}, is_held
        )

    def observe(self, state: LoopState, model: CvmTransformer, bits: int) -> None:
        """Draws random numbers, as a real validation might."""
        assert not model.training
        torch.rand(7)
        self.observed.append([state.attempt, state.step])

    def start_width(self) -> None:
        self.num_started += 1

    def is_best_held(self) -> bool:
        return self.judged[-1][1] not in self.not_held

    def state_dict(self) -> dict[str, Any]:
        return {"judged": self.judged, "num_started": self.num_started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.judged = [list(pair) for pair in state["judged"]]
        self.num_started = state["num_started"]


class StillModel(torch.nn.Module):
    """For a judge that looks at the model it is given, where there is none any more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


@dataclass
class LateScript:
    """A late judge that says what its scripted judge does, when it is asked to conclude."""

    script: ScriptedJudge
    is_late: bool = True
    begun: list[Any] = field(default_factory=list)
    concluded: list[tuple[int, int]] = field(default_factory=list)
    is_closed: bool = False

    def translate(self, model: CvmTransformer, bits: int) -> dict[str, Any]:
        """Its numbers show in the checkpoint if the weights were other ones."""
        assert not model.training
        return {"sum": sum(float(tensor.detach().double().sum()) for tensor in model.parameters()), "bits": bits}

    def begin_scoring(self, translated: dict[str, Any]) -> None:
        self.begun.append(translated)

    def conclude(self, step: int, attempt: int, translated: dict[str, Any]) -> Judgement:
        self.concluded.append((attempt, step))
        at: Any = LoopState(step=step, attempt=attempt)
        still: Any = StillModel().eval()
        return self.script.judge(at, still, translated["bits"])

    def close(self) -> None:
        self.is_closed = True


class WordTokenizer:
    """Each token is a word: w4, w5, …"""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[int(word[1:]) for word in text.split()] for text in texts]

    def decode(self, ids: list[list[int]]) -> list[str]:
        return [" ".join(f"w{number}" for number in row) for row in ids]


@dataclass
class LoopBench:
    """Builds the same loop again and again on one folder, as restarts of a process would."""

    folder: Path
    dataset: DistillationDataset
    make_model: Callable[..., CvmTransformer]
    reports: list[str] = field(default_factory=list)
    loops: list[TrainingLoop] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sizes: ModelConfig = STUDENT
    """Of the student."""

    def build(
        self,
        script: dict[tuple[int, int], str] | None = None,
        *,
        guard: dict[str, Any] | None = None,
        faults: list[dict[str, Any]] | None = None,
        folder: str = "run",
        stop: StopRequest | None = None,
        widths: WidthCourse = LATE_INT8,
        not_held: frozenset[int] = frozenset(),
        is_compiled: bool = False,
        is_late: bool = False,
        **settings: Any,
    ) -> TrainingLoop:
        plain = {"num_iterations": 20, "batch_size": 8, "warmup_steps": 2, "learning_rate": 5e-3}
        plain |= {"precision": "float32", "checkpoint_every_steps": 3}
        training = TrainingConfig(**(plain | settings))
        student, teacher = (self.make_model(*each).to(self.device) for each in ((self.sizes, 0), (TEACHER, 1)))
        seed_everything(7)
        root = self.folder / folder
        judge = ScriptedJudge(script or {}, not_held)
        loop = TrainingLoop(
            LoopSetup(
                stage="distil",
                settings=training,
                guard=GuardConfig(**(guard or {})),
                model=student,
                objective=DistillationObjective(student, DistillationLoss(2.0, 0.7, 0.3), teacher),
                dataset=self.dataset,
                batches=BatchSchedule(self.dataset.lengths, training.batch_size, seed=5),
                store=CheckpointStore(root / "checkpoints", report=self.reports.append),
                events=EventWriter(root / "events.jsonl"),
                judge=judge,
                late=LateScript(judge, is_late),
                stop=stop or StopRequest(),
                device=self.device,
                is_compiled=is_compiled,
                validate_every_steps=5,
                widths=widths,
                prepare=round_weights,
                faults=[FaultInjection(**fault) for fault in faults or []],
                num_threads=1,
                control=ControlFile(root / "control.json"),
            )
        )
        self.loops.append(loop)
        return loop

    def use_real_judge(
        self,
        loop: TrainingLoop,
        beat: Callable[[], object] | None = None,
        build_scoring: Callable[[DistillationValidator], Any] | None = None,
    ) -> None:
        """Validate the model's own translations of 20 sentences, in 3 batches; `beat` is called before each."""
        generator, tokenizer = np.random.default_rng(4), WordTokenizer()
        sources = [generator.integers(4, VOCAB, 6).tolist() for _ in range(20)]
        targets = [source[::-1] for source in sources]
        held_out = DistillationDataset(sources, targets)
        settings = ValidationSettings(metrics=["bleu", "chrf"], weights={"bleu": 1.0, "chrf": 1.0}, batch_size=8)
        validator = DistillationValidator(
            ValidationConfig(settings, target_language="xx"),
            loop.setup.store.directory.parent / "validation",
            tokenizer.decode(sources),
            tokenizer.decode(targets),
        )
        loop.setup.judge = loop.setup.late = ValidationJudge(
            "distil",
            loop.setup.events,
            validator,
            tokenizer,  # type: ignore[arg-type]
            lambda model, bits: model,
            lambda model: compute_perplexity(measure_reference_losses(model, held_out, len(held_out), batch_size=8)),
            beat,
            build_scoring(validator) if build_scoring is not None else None,
        )

    def run(self, *arguments: Any, **options: Any) -> LoopOutcome:
        loop = self.build(*arguments, **options)
        outcome = loop.run()
        loop.setup.events.flush()
        return outcome

    def events(self, *kinds: str, folder: str = "run") -> list[dict[str, Any]]:
        return [e for e in read_events(self.folder / folder / "events.jsonl") if e["kind"] in kinds]

    def weights(self, outcome: LoopOutcome, folder: str = "run") -> dict[str, torch.Tensor]:
        """What the outcome delivers, read from its checkpoint."""
        return delivered_weights(CheckpointStore(self.folder / folder / "checkpoints", report=print), outcome)

    def losses(self, folder: str = "run") -> dict[tuple[int, int], set[float]]:
        """Every loss that the events tell, by (attempt, executed step)."""
        losses: dict[tuple[int, int], set[float]] = {}
        for event in self.events("train", folder=folder):
            losses.setdefault((event["attempt"], event["executed_step"]), set()).add(event["loss"])
        return losses


@pytest.fixture
def bench(
    tmp_path: Path, dataset: DistillationDataset, make_model: Callable[..., CvmTransformer]
) -> Iterator[LoopBench]:
    torch.set_num_threads(1)
    built = LoopBench(tmp_path, dataset, make_model)
    yield built
    for loop in built.loops:
        loop.setup.events.close()
