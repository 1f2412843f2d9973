"""A small model that is no translator: the quantisers know modules, not models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cvm_translator.quantization import QuantizableLinear, TiedEmbedding


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = TiedEmbedding(40, 64)
        self.layers = nn.Sequential(QuantizableLinear(64, 128), nn.ReLU(), QuantizableLinear(128, 64))
        self.norm = nn.LayerNorm(64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (N, V)."""
        return self.embedding.project(self.norm(self.layers(self.embedding.embed(ids))))


IDS = torch.arange(40)


@pytest.fixture
def ids() -> torch.Tensor:
    return IDS


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def calibrate():
    """Calibration data for `net`: puts it through and returns the logits."""
    return lambda model: model(IDS)
