"""Partial files: their owner, their journal, and how a dead one is adopted."""
