"""The faults that rankload is built for: what goes wrong, and what users can rely on then.

A test shows a case under ``@pytest.mark.fault(number)``. ``docs/faults.md`` is written from this table
(``faults.write_docs``), and the summary at the end of a test run is told in its slugs (``harness.fault_report``).
A number keeps its meaning for ever; a new case takes the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

NETWORK = "The network"
ORIGIN = "The origin's answers"
CACHED_FILES = "Digests and cached files"
DISKS = "Disks and shared filesystems"
LEASES = "Leases and locks"
RANKS = "Ranks and jobs"
DEVICES = "Devices"
TRUST = "Origins, neighbours and other users that mean no good"

#: In the order of the documentation.
GROUPS = (NETWORK, ORIGIN, CACHED_FILES, DISKS, LEASES, RANKS, DEVICES, TRUST)


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        number: stands in markers, in the documentation and in the summary.
        slug: a few words for it, unique.
        fault: what goes wrong, as a user would tell it.
        outcome: what users can rely on.
        group: one of ``GROUPS``.
    """

    number: int
    slug: str
    group: str
    fault: str
    outcome: str


ALL_CASES = (
    Case(
        1,
        "cut-with-length",
        NETWORK,
        "The connection breaks half-way through a file whose length the origin has told.",
        "The download is resumed, or the call fails. What has arrived is never published as if it were the file.",
    ),
    Case(
        2,
        "cut-without-length",
        NETWORK,
        "The connection closes early, the origin has told no length, and you gave no digest: nothing on the wire "
        "shows that bytes are missing.",
        "The structure of the file shows it. The cut file is rejected and never published.",
    ),
    Case(
        3,
        "cut-chunked",
        NETWORK,
        "An answer that comes in chunks, without a length for the whole, is cut off.",
        "The cut is noticed, and the download is tried again.",
    ),
    Case(
        4,
        "range-ignored",
        ORIGIN,
        "Asked for a part of the file, the origin ignores the range: it answers 200 and sends everything.",
        "What was there is dropped, and the answer is taken as one stream from the first byte on. No byte lands in "
        "the wrong place.",
    ),
    Case(
        5,
        "wrong-range",
        ORIGIN,
        "The origin sends another range than the one it was asked for (its Content-Range says so).",
        "That range is discarded and asked for again. If that does not help, the file is fetched as one stream.",
    ),
    Case(
        6,
        "file-changed-at-origin",
        ORIGIN,
        "The file at the origin changes between two runs, or between two ranges of one download: its ETag is another.",
        "The change is noticed (later requests carry If-Range, and what every answer says is compared), and the "
        "download starts over. The file is never put together from two versions.",
    ),
    Case(
        7,
        "nothing-left-to-send",
        ORIGIN,
        "The origin answers 416: behind what is on disk already there is nothing to send.",
        "What is on disk is used if it verifies as the whole file; else the download starts over.",
    ),
    Case(
        8,
        "signed-url-expired",
        ORIGIN,
        "Your URL leads to a signed one, which expires: the origin answers 403 when the download is to be resumed.",
        "Your URL is asked once more for a fresh signed one, and the download goes on there. This is done once, "
        "not for ever.",
    ),
    Case(
        9,
        "too-many-requests",
        ORIGIN,
        "The origin has too many requests: 429, and Retry-After tells how long to wait.",
        "It is waited for as long as the origin asks, up to a limit. The other ranks see that the leader lives and is "
        "in “backoff”.",
    ),
    Case(
        10,
        "unavailable-once",
        ORIGIN,
        "The origin is unavailable for a moment: 503, and 200 the next time.",
        "The call succeeds.",
    ),
    Case(
        11,
        "not-found-or-not-allowed",
        ORIGIN,
        "The file is not there, or you may not have it: 404 or 401.",
        "It is not tried again: trying does not help. Every rank raises the error.",
    ),
    Case(
        12,
        "web-page",
        ORIGIN,
        "The origin answers 200 and sends a web page instead of the file: a login form, a notice.",
        "The error says that this is not a checkpoint, and shows how the page begins.",
    ),
    Case(
        13,
        "unasked-compression",
        ORIGIN,
        "The origin was asked for the bytes as they are, and compresses them nevertheless.",
        "The answer is decoded or rejected. A digest is always the digest of the file's own bytes.",
    ),
    Case(
        14,
        "stalled",
        NETWORK,
        "The connection stays open, but no more bytes come.",
        "After a while without a byte the connection is given up, and the download is tried again.",
    ),
    Case(
        15,
        "trickling",
        NETWORK,
        "The bytes come very slowly, but they come.",
        "The download goes on, however long it takes: the deadline is on no progress, not on the total time. With "
        "RANKLOAD_MINIMUM_BYTES_PER_SECOND a connection that is too slow is replaced.",
    ),
    Case(
        16,
        "bad-redirects",
        ORIGIN,
        "The origin's redirects lead in a circle, or from https to http.",
        "The call fails. It does not run in circles, and what began encrypted is never fetched in the clear.",
    ),
    Case(
        17,
        "unreachable-address",
        NETWORK,
        "The proxy is dead, or the origin's IPv6 address swallows every packet.",
        "An attempt to connect has a deadline of its own. Where IPv6 leads nowhere, IPv4 is tried.",
    ),
    Case(
        18,
        "wrong-digest",
        CACHED_FILES,
        "What was downloaded does not have the SHA-256 that you gave.",
        "The file is put aside instead of published, and fetched once more. If the digest is wrong again, every rank "
        "raises.",
    ),
    Case(
        19,
        "flipped-bit",
        CACHED_FILES,
        "A bit of a cached file flips; the file's digest is known.",
        'Found with `verify="always"`, and by any call if the file\'s modification time has changed too. The file is '
        "fetched again.",
    ),
    Case(
        20,
        "cached-file-cut",
        CACHED_FILES,
        "A cached file is empty, or its end is missing.",
        "The file is fetched again.",
    ),
    Case(
        21,
        "same-file-name",
        CACHED_FILES,
        "Two URLs end in the same file name.",
        "Each has an entry of its own in the cache, and gets its own weights.",
    ),
    Case(
        22,
        "disk-full",
        DISKS,
        "The disk is full in the middle of the download.",
        "The error names the path, the space that is needed, and the space that there is.",
    ),
    Case(
        23,
        "quota-used-up",
        DISKS,
        "Your quota is used up. Some filesystems tell so at a write, others only when the file is closed.",
        "Either way: the same error as for a full disk, with the path, the space needed, and the space there is.",
    ),
    Case(
        24,
        "no-inodes",
        DISKS,
        "The filesystem has room for bytes, but for no more files: its inodes are used up.",
        "A clear error that says so.",
    ),
    Case(
        25,
        "cache-not-writable",
        DISKS,
        "The cache directory is on a read-only filesystem, or you may not write to it.",
        "What is cached is used. What is not is a clear error.",
    ),
    Case(
        26,
        "group-cache",
        DISKS,
        "You share a cache with your group, in a setgid directory, and your umask is 077.",
        "A directory that is setgid and writable by its group (chmod g+ws) asks for it: the group keeps its access to "
        "what you fetch. Elsewhere the umask decides.",
    ),
    Case(
        27,
        "lease-of-another-user",
        LEASES,
        "The lease belongs to another user and is not yours to write (mode 0644).",
        "The call goes on without the lease.",
    ),
    Case(
        28,
        "planted-symlink",
        CACHED_FILES,
        "Where a partial file, a lease, a record or a cached file should be, somebody has put a symbolic link.",
        "The link is refused, not followed. Your own link (or root's) in the place of a cached file is read, but never "
        "written through.",
    ),
    Case(
        29,
        "lock-error",
        LEASES,
        "The filesystem answers a lock call with an error: 38 (ENOSYS), 37 (ENOLCK), 95 (EOPNOTSUPP), 524 (ENOTSUPP) "
        "or 9 (EBADF).",
        "A warning, and the call goes on.",
    ),
    Case(
        30,
        "lock-hangs",
        LEASES,
        "The shared filesystem never returns from a lock call.",
        "No such call is made on a shared filesystem, so nothing can hang in it.",
    ),
    Case(
        31,
        "lock-lies",
        LEASES,
        "The filesystem only pretends to lock: everybody who asks gets the lock.",
        "More downloads than one, perhaps; at the end one valid file.",
    ),
    Case(
        32,
        "lease-holder-dead",
        LEASES,
        "The job that holds the lease has died on another host, where nobody can look for its process.",
        "The lease is taken over once its duration and one polling interval have passed, at the latest.",
    ),
    Case(
        33,
        "lease-holder-suspended",
        LEASES,
        "The job that holds the lease is suspended (SIGSTOP). Another one takes over, and then the first goes on "
        "(SIGCONT).",
        "Both publish the same bytes.",
    ),
    Case(
        34,
        "clock-skew",
        LEASES,
        "The clocks of two hosts differ by an hour, in either direction.",
        "No effect.",
    ),
    Case(
        35,
        "unequal-lease-durations",
        LEASES,
        "Two jobs use leases of different durations for the same file.",
        "A warning, and the call goes on.",
    ),
    Case(
        36,
        "leader-fails",
        RANKS,
        "The rank that downloads fails.",
        "Every rank raises the same error, within seconds.",
    ),
    Case(
        37,
        "leader-lost",
        RANKS,
        "The rank that downloads is killed or freezes in the middle of it.",
        "All others raise within 30 s. The next run resumes the download.",
    ),
    Case(
        38,
        "signal-while-waiting",
        RANKS,
        "A rank that waits gets SIGTERM or SIGUSR1.",
        "The signal's handler runs within half a second.",
    ),
    Case(
        39,
        "store-lost",
        RANKS,
        "The process that hosts the job's store exits early.",
        "An error of rankload's that says so (`StoreLostError`), around torch's `DistNetworkError`.",
    ),
    Case(
        40,
        "one-rank-cannot-load",
        RANKS,
        "One rank cannot load the file: it has no memory left.",
        "Every rank raises, and the error names that rank.",
    ),
    Case(
        41,
        "group-timeout",
        RANKS,
        "The download takes longer than the timeout of the process group.",
        "The call succeeds.",
    ),
    Case(
        42,
        "restart",
        RANKS,
        "torchrun restarts the job (`--max-restarts`): the store still holds keys of the run before, and two nodes may "
        "have counted their restarts differently.",
        "What the run before has left is ignored, and so are the counts.",
    ),
    Case(
        43,
        "requeue",
        RANKS,
        "SLURM requeues the job, which has the same job id again.",
        "The equal id confuses nothing. What the first run had downloaded is adopted.",
    ),
    Case(
        44,
        "different-urls",
        RANKS,
        "The ranks pass different URLs.",
        "An error that shows the mismatch, and nobody hangs.",
    ),
    Case(
        45,
        "stale-absence",
        DISKS,
        "Another node has looked for the file before it was published, and goes on believing for 60 s that there is "
        "none (an NFS client's negative entry).",
        "The ranks there find the file within 90 s.",
    ),
    Case(
        46,
        "stale-handle",
        DISKS,
        "A network filesystem answers ESTALE when the file is opened or read.",
        "The file is opened again.",
    ),
    Case(
        47,
        "deleted-before-use",
        DISKS,
        "Somebody deletes the file after it was published and before another rank has opened it.",
        "It is fetched in one more round. If that does not help, the call raises.",
    ),
    Case(
        48,
        "node-local-caches",
        DISKS,
        "Each node has its cache on a disk of its own.",
        "One download for all nodes, which exchange its parts. Where directories on network filesystems turn out not "
        "to be shared: one per node.",
    ),
    Case(
        49,
        "job-array",
        LEASES,
        "A thousand tasks of a job array share one cache.",
        "One download. The tasks that wait look at intervals of their own, not all at the same time.",
    ),
    Case(
        50,
        "offline-miss",
        CACHED_FILES,
        "Offline, and the file is not in the cache.",
        "An error at once, with the command that fetches the file beforehand.",
    ),
    Case(
        51,
        "own-gpu",
        DEVICES,
        "Each task sees one GPU only, its own, and has local rank 5 on its node.",
        "The rank uses `cuda:0`, the one that it sees.",
    ),
    Case(
        52,
        "huge-error",
        RANKS,
        "The text of an error is several megabytes long.",
        "The other ranks get it shortened, and the store survives.",
    ),
    Case(
        53,
        "fork-under-lease",
        LEASES,
        "A process that holds the lease forks, as data loaders do for their workers.",
        "The child never releases the lease.",
    ),
    Case(
        54,
        "late-rank",
        RANKS,
        "One rank arrives five minutes after the others.",
        "The others wait, and log which rank is missing.",
    ),
    Case(
        55,
        "init-order",
        RANKS,
        "rankload is called before `init_process_group` with `env://`, or after it.",
        "Both work.",
    ),
    Case(
        56,
        "shard-names",
        CACHED_FILES,
        "A name such as `model-00001-of-00002` looks as if it ended in a hash; `check_hash` is not set.",
        "The digits are not taken for a digest.",
    ),
    Case(
        57,
        "shared-mappings",
        CACHED_FILES,
        "You have made `MAP_SHARED` torch's default for mapped files: updating a tensor would write to its file.",
        "The cached file is never written.",
    ),
    Case(
        58,
        "filesystem-hangs",
        DISKS,
        "The cache's filesystem stops answering on one node, while it downloads or while it loads.",
        "The ranks of the other nodes raise `ProgressTimeoutError`, which names the node, `timeout=` and a quarter of "
        "it (5 s at least) later. Those that the kernel holds raise it once the filesystem answers.",
    ),
    Case(
        59,
        "origin-plants-files",
        TRUST,
        "An origin answers with the index of a checkpoint in several files, whatever its URL was called, and its "
        "parts have the names of other files of the cache.",
        "An index that you did not ask for by its name is refused. The parts of one that you did ask for lie in a "
        "folder that is its URL's alone, under plain names. No other URL's file, record or folder is touched, and "
        "none of the origin's bytes is ever loaded for another URL.",
    ),
    Case(
        60,
        "users-file-in-the-way",
        TRUST,
        "A file of yours lies in `model_dir` under the name of a cached one, or has taken a cached file's place.",
        "It is never moved, replaced or written to, whatever is wrong with it: only what rankload published for "
        "that very URL is. If it cannot be used, the URL's file is kept in an entry of its own, with a warning.",
    ),
    Case(
        61,
        "no-record",
        TRUST,
        "A record cannot be written, or a cached file's record cannot be read.",
        "Without a record nothing is published, and the error names it. A file whose record cannot be read is "
        "somebody's: it is used only if its bytes have the SHA-256 that you give, and never replaced.",
    ),
    Case(
        62,
        "another-users-bytes",
        TRUST,
        "Another user of the cache leaves a file or a record that claims the digest you give, or changes a file "
        "after it was verified.",
        "Your digest is compared with the bytes themselves. They are loaded from memory that their owner cannot "
        "change.",
    ),
    Case(
        63,
        "stolen-credentials",
        TRUST,
        "A redirect leads to a URL that two parsers read differently, carries a user name, or names a host for "
        "which a token or a netrc entry exists.",
        "Such URLs are refused. Headers, user and netrc entry go to the server of your URL alone, tokens to their "
        "own hosts over https, and always to the server that is really connected to.",
    ),
    Case(
        64,
        "endless-small-answer",
        TRUST,
        "An origin sends its headers, an index, a sidecar or `100 Continue` one byte at a time, forever.",
        "Every read has the deadline on no progress, and small answers a bound in time and size. Every rank raises"
        " the same `FetchTimeoutError`.",
    ),
    Case(
        65,
        "reaches-beyond",
        TRUST,
        "A checkpoint is damaged or crafted: a tensor or storage reaches beyond its record, or records overlap.",
        "It is an error that names file and storage, whatever you load it with. Nothing of the rest of the file is"
        " taken for weights.",
    ),
    Case(
        66,
        "stranger-connects",
        TRUST,
        "During a broadcast a port scanner, another job or an attacker connects to a rank's port: it guesses, "
        "replays what it has recorded, or only holds connections open.",
        "It learns nothing and gets nothing: both sides prove by HMAC that they know a key from the job's store. "
        "The real neighbour gets in all the same; somebody who keeps guessing ends the call with an error.",
    ),
    Case(
        67,
        "changed-on-the-way",
        TRUST,
        "Somebody between two nodes changes, drops, repeats or reorders the bytes of a broadcast, or the sender "
        "describes files that cannot be.",
        "The first rank after it finds out, by a keyed digest of each piece, and no rank loads anything: all raise"
        " the same error.",
    ),
    Case(
        68,
        "archive-bomb",
        TRUST,
        "A zip archive of one checkpoint would unpack to many times its size.",
        "It is unpacked up to 20 times its size (or 64 MiB), once a node; beyond that it is an error, and nothing "
        "stays behind.",
    ),
    Case(
        69,
        "too-large",
        TRUST,
        "An origin announces, or sends, more than you want to have on your disk.",
        "With `max_bytes=` or `RANKLOAD_MAX_BYTES` it is refused before the first byte, or as soon as more has "
        "come. Room on the disk is taken as bytes arrive, not as they are announced.",
    ),
    Case(
        70,
        "forged-log-line",
        TRUST,
        "Names in a checkpoint, or texts of an origin, hold line breaks, escape sequences or characters that "
        "reverse the text.",
        "Errors and logs show them escaped.",
    ),
    Case(
        71,
        "look-alike-query",
        TRUST,
        "Two URLs differ only in a query parameter whose name looks like that of a signature.",
        "They are two files: only the exact parameters of known signed URLs are left out of a file's identity.",
    ),
    Case(
        72,
        "overwritten-under-a-job",
        DISKS,
        "A checkpoint that is used in place is written again while the job runs: `torch.save` to the same path, or a "
        "copy over it.",
        "What was loaded stays as it was, and the process lives: only files that rankload itself has published stay "
        "mapped. With `mmap=True` you ask for the file's own pages, and get what happens to them.",
    ),
    Case(
        73,
        "file-of-anybodys",
        CACHED_FILES,
        "torch.hub, or anybody, has left a file under the name of the one that you ask for: many are called "
        "`weights.pth`.",
        "Without a digest that tells, the origin is asked once whether it is its file: by its length, a piece of its "
        "content and the digest that it gives. If not, your URL gets an entry of its own. If the origin cannot be "
        "asked, a warning says that nobody vouches.",
    ),
    Case(
        74,
        "replaced-at-its-url",
        CACHED_FILES,
        "The file at a URL (`last.pth`) is replaced, and the old one is cached.",
        "As in torch.hub, a cached name is used forever, unless you ask: `refresh=True` is one conditional request by "
        "one rank. Without a change no body is sent; a new file is verified and takes the old one's place by rename.",
    ),
    Case(
        75,
        "ranges-refused",
        ORIGIN,
        "A firewall or a gateway answers requests for a range with an error (403, 405, 503, …), and others with the "
        "file.",
        "The first request is for the whole file. Where it breaks off, the whole file is asked for again. "
        "`open_checkpoint`, which needs ranges, says that there are none.",
    ),
    Case(
        76,
        "few-connections",
        ORIGIN,
        "An origin serves one connection, or a few, and keeps the others waiting, even while the served one is idle.",
        "Idle connections are closed when nothing comes for a stall time; fewer streams are used then, also for the "
        "next file of that host.",
    ),
    Case(
        77,
        "replicas-that-differ",
        CACHED_FILES,
        "Nodes have cache directories of their own, and the origin's file is replaced between two downloads, or one "
        "node has an older file.",
        "Every node compares size and SHA-256 with rank 0's file and fetches that version if it has another. If that "
        "cannot be had any more, all ranks raise one error that names both.",
    ),
    Case(
        78,
        "frozen-at-the-verdict",
        RANKS,
        "A rank freezes in the last moment of a call: rank 0 before its vote, or another one before it has read the "
        "outcome.",
        "The outcome is written once, and rank 0 goes by it, too: after a freeze it asks the others for a sign of life "
        "first. It keeps the outcome readable until all have read it, or for the liveness limit (30 s). Only a rank "
        "that wakes up later, or loses rank 0's process in that moment, raises although the others have succeeded.",
    ),
    Case(
        79,
        "lost-while-joining",
        RANKS,
        "A rank is killed, interrupted, or runs out of threads or descriptors before the ranks of its job have met.",
        "The others raise its error within 2 s, or learn within the liveness limit that it is lost. A rank that comes "
        "late raises the same error, and a repeated call finds all ranks at the same one. Where rank 0 dies before "
        "anybody has met it, nothing tells it from a rank 0 that is late: `RANKLOAD_ARRIVAL_SECONDS` ends that wait, "
        "if the launcher does not.",
    ),
    Case(
        80,
        "one-time-url",
        ORIGIN,
        "A URL answers once: the first download uses it up, and later requests get 403, 404 or 410.",
        "The whole file comes in the first answer; requests for more streams beside it may fail. If that connection "
        "breaks, the error says that the URL may serve one download only; with a new one of the same file (the same "
        "path with another signature, or any URL and `sha256=`) the download goes on where it broke off.",
    ),
    Case(
        81,
        "wrong-total",
        ORIGIN,
        "The file size in the Content-Range of an origin's answers is missing (`*`), too small, too large, or another "
        "each time.",
        "The length of the first answer, which has the whole file, counts. What contradicts it is not used: the file "
        "comes over one connection, or the call fails. A cut file is never published as if it were the file.",
    ),
    Case(
        82,
        "no-temporary-directory",
        DISKS,
        "`TMPDIR` is full, too small, read-only, or does not exist.",
        "Another directory serves (`/var/tmp`, `/dev/shm`), or memory. If no directory has room, the error names those "
        "that were tried, how much is needed, and `TMPDIR`.",
    ),
    Case(
        83,
        "bare-container",
        DISKS,
        "A container has no `/dev/fd`, no `/proc`, or no `/dev/shm` to speak of.",
        "`/proc/self/fd` serves in place of `/dev/fd`, and `/dev/shm` is not needed. Without `/proc`, cached "
        "checkpoints load; where a path to an open file is needed, the error says to mount it.",
    ),
    Case(
        84,
        "failure-of-all-ranks",
        RANKS,
        "A call fails on all ranks of a job, and all their outputs end up in one log.",
        "The rank where it happened prints the traceback: your frames, and where the failure was found. Each of the "
        "others prints your frames and one line that names that rank. At log level DEBUG all frames and causes are "
        "logged.",
    ),
    Case(
        85,
        "slow-name-service",
        RANKS,
        "The name service (DNS) is slow or dead. torch's store asks it for the name of each client that connects, one "
        "after another, whatever the ranks are waiting for: the first call of 16 ranks took 12 s with a name service "
        "that takes 0.3 s to answer, 10 s with a dead one. From torch 2.9 on the first failure ends the questions; "
        "torch's warning “The hostname of the client socket cannot be retrieved” is its sign.",
        "The call succeeds, only later. The cure is an entry in `/etc/hosts` of the store's node for each node, in "
        "the form in which the store sees its clients: `::ffff:10.0.0.7 node7`; plain `10.0.0.7 node7` is not found "
        "(glibc 2.36). Or a name service that knows the addresses, a cache on the node (nscd, systemd-resolved), "
        "`hosts: files` in `/etc/nsswitch.conf`, or, against a dead one, `options timeout:1 attempts:1` in "
        "`/etc/resolv.conf` (10 s became 2 s).",
    ),
    Case(
        86,
        "own-file-for-each-rank",
        RANKS,
        "Each rank passes a file or URL of its own to a collective call, or URLs that differ in their query only.",
        "All ranks raise `ArgumentMismatchError`. It names both values, or the parameters of the query that differ "
        "(never their values), and the call that is not collective: `rankload.load`, or "
        "`rankload.hub.load_state_dict_from_url`.",
    ),
    Case(
        87,
        "master-port-taken",
        RANKS,
        "Without a process group: something else listens at `MASTER_PORT`, such as another job, or `MASTER_ADDR` "
        "cannot be resolved.",
        "Rank 0 proves in its store that it is rank 0 of a job of this size. Every rank raises within "
        "`RANKLOAD_CONNECT_SECONDS` and 2 s; the error says what probably holds the port.",
    ),
    Case(
        88,
        "preparation-that-dies",
        RANKS,
        "The rank that runs the function of `dist_once` dies in it, or what an earlier run has prepared is gone.",
        "The error names that rank, on every rank; the next job runs the function again, and so does one that finds "
        "that the path of an earlier run no longer exists.",
    ),
    Case(
        89,
        "unchanged-script-fails",
        RANKS,
        "Under `rankload.patch` or `rankload run`: the origin refuses a file that every rank asks for, or the rank "
        "that downloads it dies.",
        "Ranks that ask for the same file raise the same error, with torch.hub's types, after one try instead of one "
        "after the other; a second call is a second try. After a death another rank goes on.",
    ),
    Case(
        90,
        "refused-repository",
        TRUST,
        "`hub.load` gets an archive that would be written outside of its folder, that unpacks to far more than its "
        "size, or that is none.",
        "`VerificationError`; nothing of it stays, and what was there before is as it was.",
    ),
    Case(
        91,
        "hub-that-counts-requests",
        RANKS,
        "Every rank asks the Hugging Face Hub for each file's state, and the Hub refuses so many (429); or it says "
        "that a repository has no such file.",
        "Under the patch one rank asks. The others have its path, or an error of the same type, without a request.",
    ),
    Case(
        92,
        "node-dies-in-exchange",
        RANKS,
        "A node dies while nodes without a shared directory exchange the parts of a file.",
        "All others raise the same error. Only a node that has the whole, verified file by then publishes it. The next "
        "job fetches only the parts that no node has.",
    ),
    Case(
        93,
        "bytes-change-between-nodes",
        TRUST,
        "Something changes bytes of a file on the way from node to node, or another program takes a node's place.",
        "The unit is refused on arrival, before it is written or sent on; nothing is published.",
    ),
    Case(
        94,
        "nodes-without-internet",
        RANKS,
        "Of nodes without a shared directory, some do not reach the origin, or all are offline and one has the file.",
        "Those that reach it fetch all parts, and the others receive them; a node that has the file serves it, and the "
        "origin is not asked.",
    ),
)

CASES: dict[int, Case] = {case.number: case for case in sorted(ALL_CASES, key=lambda case: case.number)}
