"""Names that a short example takes for granted (``<!-- given: model -->``)."""

from __future__ import annotations

import torch
from my_model import Model

model = Model()
optimizer = torch.optim.AdamW(model.parameters())
