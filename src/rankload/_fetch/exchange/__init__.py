"""One download of a file into the caches of several nodes: each fetches a part, and they exchange the parts."""
