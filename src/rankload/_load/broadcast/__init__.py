"""A whole checkpoint file, sent to all ranks."""
