"""From a URL to a verified file: one rank of a domain fetches, the others wait."""
