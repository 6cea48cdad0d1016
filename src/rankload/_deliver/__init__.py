"""From a verified file to tensors."""
