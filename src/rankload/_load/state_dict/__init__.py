"""A whole checkpoint, as torch.load returns it."""
