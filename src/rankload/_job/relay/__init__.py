"""One stream of bytes from one rank to many, each byte once over each link: a chain of TCP connections."""
