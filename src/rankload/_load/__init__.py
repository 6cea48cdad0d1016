"""Load tensors from a file on this node, or from another rank."""
