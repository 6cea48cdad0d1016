"""What a checkpoint file is, told from its bytes alone. Nothing here imports torch: a login node uses it."""
