"""The cache directory: its files, records and leases, and the checks on who may write to it."""
