"""What the tests stand on: real ranks, real HTTP servers, real checkpoint files.

- ``ranks``: run a function in N real processes that look like a torchrun (or other) job.
- ``rank``: what such a function may call to talk with its test.
- ``scripts``: plain subprocesses, and the real ``torchrun``.
- ``origin``: an HTTP server that counts, lies, stalls and breaks on request.
- ``nginx``: the real one, for speed and TLS; ``nginx_behaviours``: and how it can be made to misbehave.
- ``s3``: moto's S3 server; ``hf``: a Hugging Face Hub on an origin.
- ``chaos``: a TCP proxy before any of them that is slow, cuts, resets or falls silent.
- ``squid``: a real forward proxy.
- ``namespace``: a network of a test's own, with real host names, real ports and black holes.
- ``certificates``: an authority of the test's own.
- ``client``: the plainest HTTP client, to see what a server really sends.
- ``fuse``: mounts with the vices of cluster filesystems.
- ``disks``: full, limited and read-only real filesystems.
- ``checkpoints``: small (and one big) real checkpoint files.
- ``fault_report``: a table of the fault cases that a test run has shown (a pytest plugin).

Every process is a child of one process, the zygote (``spawner``, ``zygote``), and dies with it.
Every mount is in a mount namespace of the test process (``mounts``), and dies with it, too.
"""
