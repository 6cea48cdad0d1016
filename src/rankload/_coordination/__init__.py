"""Coordinate the ranks of a job: identity, rendezvous, agreement, waits, and one verdict per call."""
