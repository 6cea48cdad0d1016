"""Partial files: owner, journal, and resuming those of dead processes."""
