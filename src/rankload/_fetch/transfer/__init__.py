"""Transfer the missing ranges of one file: streams, retries, scaling, and the hash."""
