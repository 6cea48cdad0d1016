"""Origins: the interface, and one module per protocol."""
