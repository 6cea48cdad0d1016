"""Bytes from rank to rank over TCP."""
