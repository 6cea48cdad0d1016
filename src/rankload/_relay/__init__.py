"""A chain of TCP connections that carries bytes from one node to all others."""
