"""Where bytes come from: one module a kind of origin, and the protocol that they share."""
