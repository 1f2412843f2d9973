"""A small corpus and noisy translations of it, so that scores behave as those of real models do."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cvm_translator.config.schema import GuardConfig, ValidationSettings
from cvm_translator.validation import TranslationQualityEvaluator, ValidationConfig

VOCABULARY = (
    "the a file not found directory open window please save change setting user name password error invalid server "
    "connection lost retry delete event person family tree report export import date place note source media remove"
)
WORDS = VOCABULARY.split()
NUM_SENTENCES = 120

Translate = Callable[[list[str]], list[str]]


class Corpus:
    """Sources that can be undone, their references, and translators that get a share of the words wrong."""

    def __init__(self, num_sentences: int, seed: int = 0) -> None:
        generator = random.Random(seed)
        self.references = [
            f"{' '.join(generator.choices(WORDS, k=1 + min(20, int(generator.lognormvariate(1.8, 0.6)))))} {index}."
            for index in range(num_sentences)
        ]
        self.sources = [" ".join(word[::-1] for word in reference.split()) for reference in self.references]

    def translator(self, error_rate: float, seed: int = 0) -> Translate:
        """Translates any of the sources; the same seed makes the same errors."""

        def translate(sources: list[str]) -> list[str]:
            generator = random.Random(seed)
            return [
                " ".join(
                    generator.choice(WORDS) if generator.random() < error_rate else word[::-1]
                    for word in source.split()
                )
                for source in sources
            ]

        return translate


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    return Corpus(NUM_SENTENCES)


@pytest.fixture(scope="session")
def make_corpus() -> type[Corpus]:
    return Corpus


@pytest.fixture(scope="session")
def config() -> ValidationConfig:
    """Without BERTScore, whose encoder takes seconds to load."""
    return ValidationConfig(
        settings=ValidationSettings(metrics=["bleu", "chrf", "ter", "rouge"]),
        guard=GuardConfig(num_resamples=2000),
        target_language="en",
    )


@pytest.fixture(scope="session")
def evaluator(config: ValidationConfig) -> TranslationQualityEvaluator:
    return TranslationQualityEvaluator(config)
