"""What a validation needs to know, gathered from the run's config: settings, guard, languages, seed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cvm_translator.config.schema import GuardConfig, RunConfig, ValidationSettings


@dataclass(frozen=True)
class ValidationConfig:
    """Settings shared by evaluator, detector, validator and judge, so that all of them measure the same thing."""

    settings: ValidationSettings = field(default_factory=ValidationSettings)
    """What is measured, and when."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When a drop counts as degradation."""
    source_language: str = "de"
    target_language: str = "en"
    seed: int = 13
    """Of the resampling matrix."""
    device: str = "cpu"
    """Where neural metrics run."""

    @classmethod
    def from_run(cls, config: RunConfig, device: str = "cpu") -> ValidationConfig:
        """The validation part of a run's config; `device` is the resolved one (cpu, cuda:0, ...)."""
        return cls(
            settings=config.validation,
            guard=config.guard,
            source_language=config.corpus.source_language,
            target_language=config.corpus.target_language,
            seed=config.seed,
            device=device,
        )
