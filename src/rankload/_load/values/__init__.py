"""Single tensors and values, and the translation of torch's errors."""
