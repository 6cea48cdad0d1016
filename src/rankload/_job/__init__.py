"""Who the ranks are and how they talk to each other."""
