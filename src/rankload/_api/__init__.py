"""The public calls, one family a module."""
