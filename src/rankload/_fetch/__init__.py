"""Fetch a URL into a verified file: one rank per domain fetches, the others wait."""
