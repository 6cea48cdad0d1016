"""What lies in the cache directory, and who may touch it."""
