"""The public calls: one family per module."""
