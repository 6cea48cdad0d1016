"""From a file on this node to tensors."""
