"""File formats of checkpoints: what they are, and where each tensor lies in them."""
