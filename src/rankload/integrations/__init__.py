"""Other libraries' own hooks, each filled in a few lines. A submodule imports its library."""
