"""Reads that ranks share: each reads a part, and they exchange the parts over a process group."""
