"""The demo: one checkpoint into four ranks, the way people do it today and with rankload."""
