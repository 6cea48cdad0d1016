"""Python imports this at its start: so every rank of a test can import the libraries."""

import os

if "RANK" in os.environ:
    import cpu_builds  # noqa: F401
