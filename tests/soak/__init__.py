"""Long runs at random, for what no single test comes upon: ``PYTHONPATH=tests:src python -m soak.NAME --runs N``."""
