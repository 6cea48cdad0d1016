"""File formats of checkpoints: detect the format, check the file, and find each tensor's bytes."""
