"""The reader's own model, which the pages import."""

from __future__ import annotations

from torch import Tensor, nn


class Model(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, batch: Tensor) -> Tensor:
        return self.down(self.up(batch).relu())
