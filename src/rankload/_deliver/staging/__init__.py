"""Into the memory of accelerators, through pinned memory: a rank's own parts, or what all ranks of a group need."""
