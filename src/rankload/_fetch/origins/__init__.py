"""Origins: one module a protocol, and the interface that they share."""
