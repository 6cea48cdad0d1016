"""The machine, the kernel and the clock."""
