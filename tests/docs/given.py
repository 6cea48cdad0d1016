"""Names that a short example takes for granted (``<!-- given: model -->``)."""

from my_model import Model

model = Model()
