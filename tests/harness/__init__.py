"""What the tests stand on: real ranks, real HTTP servers, real checkpoint files.

- ``ranks``: run a function in N real processes that look like a torchrun (or other) job.
- ``rank``: what such a function may call to talk with its test.
- ``scripts``: plain subprocesses, and the real ``torchrun``.
- ``origin``: an HTTP server that counts, lies, stalls and breaks on request.
- ``nginx``: the real one, for speed.
- ``fuse``: mounts with the vices of cluster filesystems.
- ``disks``: full, limited and read-only real filesystems.
- ``checkpoints``: small (and one big) real checkpoint files.

Every process is a child of one process, the zygote (``spawner``, ``zygote``), and dies with it.
Every mount is in a mount namespace of the test process (``mounts``), and dies with it, too.
"""
