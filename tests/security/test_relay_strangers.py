"""The relay's listener, on a network that strangers can connect from as well."""

from __future__ import annotations

import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest

from harness.rank import mark
from harness.ranks import run_ranks, start_ranks
from rankload._relay.handshake import ANSWER_BYTES, HELLO_BYTES, MAGIC, UpstreamHandshake
from rankload._relay.links import Link, connect
from rankload._relay.listener import Listener
from rankload.errors import CoordinationError, LoadError

#: Within which a listener that reacts would have reacted.
_QUIET_SECONDS = 0.5


def _until(seconds: float) -> Callable[[], None]:
    deadline = time.monotonic() + seconds

    def look_around() -> None:
        if time.monotonic() > deadline:
            raise LoadError("enough")

    return look_around


class Accepting:
    """A listener on loopback that waits for its upstream rank in a thread."""

    def __init__(self, pool: ThreadPoolExecutor, stack: ExitStack) -> None:
        self.listener = stack.enter_context(closing(Listener(["127.0.0.1"])))
        self.key = bytes.fromhex(self.listener.way["key"])
        self.link: Future[Link] = pool.submit(self.listener.accept, 0, "here", _until(30))
        self._stack = stack

    def stranger(self, said: bytes = b"") -> socket.socket:
        """Connect from elsewhere and say something."""
        connection = socket.create_connection(("127.0.0.1", self.listener.way["port"]), timeout=10)
        self._stack.enter_context(connection).sendall(said)
        return connection

    def check_upstream_gets_in(self) -> None:
        """Connect as the upstream rank does, and see that bytes get through."""
        way = self.listener.way
        with connect(1, "there", way, 20, lambda: None).socket as ours, self.link.result(20).socket as theirs:
            ours.send(b"x")
            theirs.setblocking(True)
            assert theirs.recv(1) == b"x"


@pytest.fixture
def accepting() -> Iterator[Accepting]:
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        yield Accepting(pool, stack)


def _everything_from(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes."""
    received = b""
    try:
        while more := connection.recv(100):
            received += more
    except ConnectionResetError:  # it closed before it had read all
        pass
    return received


# --- guessing ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault(66)
def test_right_beginning_of_a_hello_looks_like_a_wrong_one(accepting: Accepting) -> None:
    """The old listener closed at the first wrong byte, which made its secrets guessable byte by byte."""
    right = UpstreamHandshake(accepting.key).hello
    strangers = [
        accepting.stranger(right[:length] + bytes([right[length] ^ flip]))
        for length in (len(MAGIC), len(MAGIC) + 32, HELLO_BYTES - 2)
        for flip in (0, 1)
    ]
    assert not select.select(strangers, [], [], _QUIET_SECONDS)[0]  # neither answered nor closed


@pytest.mark.parametrize("length", [0, len(MAGIC), len(MAGIC) + 32, HELLO_BYTES - 1])
def test_wrong_hello_is_closed_without_a_byte(accepting: Accepting, length: int) -> None:
    right = UpstreamHandshake(accepting.key).hello
    wrong = right[:length] + bytes(byte ^ 1 for byte in right[length:])
    assert _everything_from(accepting.stranger(wrong)) == b""
    accepting.check_upstream_gets_in()


def _hellos_until_the_wait_ends(accepting: Accepting, hello: bytes, most: int) -> int:
    """Send a wrong hello on one connection after the other; return how many the listener took."""
    for number in range(most):
        if accepting.link.done():
            return number
        connection = accepting.stranger(hello)
        while not accepting.link.done() and not select.select([connection], [], [], 0.05)[0]:
            pass
    return most


@pytest.mark.fault(66)
def test_somebody_who_guesses_ends_the_wait(accepting: Accepting) -> None:
    guesses = _hellos_until_the_wait_ends(accepting, MAGIC + bytes(HELLO_BYTES - len(MAGIC)), 50)
    assert guesses < 20
    with pytest.raises(CoordinationError, match="keeps connecting to the relay's port") as caught:
        accepting.link.result(10)
    assert "\\x" not in str(caught.value) and "rkrelay" not in str(caught.value)


def test_port_scanner_does_not_end_the_wait(accepting: Accepting) -> None:
    for _ in range(20):
        assert _everything_from(accepting.stranger(b"GET / HTTP/1.1\r\nUser-Agent: scanner\r\n" + bytes(100))) == b""
    accepting.check_upstream_gets_in()


def test_endless_rubbish_ends_the_wait(accepting: Accepting) -> None:
    assert 20 < _hellos_until_the_wait_ends(accepting, bytes(HELLO_BYTES), 500) < 500
    with pytest.raises(CoordinationError, match="something other than the upstream rank"):
        accepting.link.result(10)


# --- replay and reflection --------------------------------------------------------------------------------------------


@pytest.mark.fault(66)
def test_recorded_hello_is_refused(accepting: Accepting) -> None:
    """Of a connection that upstream gave up: the recorded hello is right, but only once."""
    recorded = UpstreamHandshake(accepting.key).hello
    with accepting.stranger(recorded) as given_up:
        assert given_up.recv(1)
    assert _everything_from(accepting.stranger(recorded)) == b""
    accepting.check_upstream_gets_in()


def test_right_hello_without_a_right_confirmation_is_refused(accepting: Accepting) -> None:
    """An attacker in the middle passes on a hello, and then has nothing to confirm the answer with but itself."""
    attacker = accepting.stranger(UpstreamHandshake(accepting.key).hello)
    answer = b""
    while len(answer) < ANSWER_BYTES:
        answer += attacker.recv(ANSWER_BYTES - len(answer))
    attacker.sendall(answer[-32:])
    assert _everything_from(attacker) == b""
    accepting.check_upstream_gets_in()


@pytest.mark.fault(66)
@pytest.mark.parametrize("how", ["reflected", "recorded"])
def test_upstream_does_not_take_an_impostor(accepting: Accepting, how: str) -> None:
    """The impostor answers with upstream's own proof, or with an answer that the real rank gave to another hello."""
    with accepting.stranger(UpstreamHandshake(accepting.key).hello) as earlier:
        recorded = b""
        while len(recorded) < ANSWER_BYTES:
            recorded += earlier.recv(ANSWER_BYTES - len(recorded))

    def answer_falsely(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            hello = b""
            while len(hello) < HELLO_BYTES:
                hello += connection.recv(HELLO_BYTES - len(hello))
            connection.sendall(hello[-ANSWER_BYTES:] if how == "reflected" else recorded)
            connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        impostor = threading.Thread(target=answer_falsely, args=[server], daemon=True)
        impostor.start()
        way = {**accepting.listener.way, "port": server.getsockname()[1]}
        with pytest.raises(CoordinationError, match="another process listens there"):
            connect(1, "there", way, 0, lambda: None)
        impostor.join(10)
        assert not impostor.is_alive()
    accepting.check_upstream_gets_in()


# --- addresses --------------------------------------------------------------------------------------------------------


def test_listens_on_announced_addresses_only() -> None:
    with closing(Listener(["127.0.0.1"])) as listener:
        port = listener.way["port"]
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=10)


def test_listens_on_each_announced_address() -> None:
    with closing(Listener(["127.0.0.2", "192.0.2.1", "127.0.0.1"])) as listener:
        way = listener.way
        assert way["addresses"] == ["127.0.0.2", "127.0.0.1"]  # 192.0.2.1 is for documentation (RFC 5737)
        for address in way["addresses"]:
            socket.create_connection((address, way["port"]), timeout=10).close()


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python has no IPv6")
def test_listens_on_ipv6() -> None:
    try:
        listener = Listener(["::1"])
    except CoordinationError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    with closing(listener), ThreadPoolExecutor() as pool:
        result = pool.submit(listener.accept, 0, "here", _until(20))
        with connect(1, "there", listener.way, 5, lambda: None).socket, result.result(20).socket:
            pass


def test_no_address_that_can_be_bound() -> None:
    with pytest.raises(CoordinationError, match=r"cannot listen on any address.*192\.0\.2\.1"):
        Listener(["192.0.2.1"])


# --- many strangers ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(66)
def test_strangers_that_hold_connections_do_not_keep_upstream_out(accepting: Accepting) -> None:
    half = UpstreamHandshake(accepting.key).hello[: HELLO_BYTES // 2]
    strangers = [accepting.stranger((b"", half, b"GET /")[number % 3]) for number in range(200)]
    accepting.check_upstream_gets_in()
    assert len(strangers) == 200


@contextmanager
def _free_descriptors(count: int) -> Iterator[None]:
    """Leave this process so many descriptors."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _accept_with_descriptors(rank: int, spare: int) -> tuple[str, float]:
    """Accept with so many free descriptors; return how it ended, and the CPU seconds that it took."""
    with closing(Listener(["127.0.0.1"])) as listener:
        mark("way", listener.way)
        with _free_descriptors(spare):
            began_at = time.process_time()
            try:
                listener.accept(0, "here", _until(30 if spare else 3)).socket.close()
            except (OSError, LoadError) as error:
                return repr(error), time.process_time() - began_at
            return "upstream", time.process_time() - began_at


@pytest.mark.parametrize("spare", [1, 4])
def test_strangers_that_use_up_descriptors_do_not_keep_upstream_out(spare: int) -> None:
    with start_ranks(_accept_with_descriptors, 1, args=(spare,)) as group, ExitStack() as strangers:
        [way] = group.wait_for_mark("way")
        for _ in range(60):
            strangers.enter_context(socket.create_connection(("127.0.0.1", way["port"]), timeout=10))
        with connect(1, "there", way, 20, lambda: None).socket:
            ending, cpu_seconds = group.wait_for_end(0).value
    assert ending == "upstream"
    assert cpu_seconds < 2


def test_lack_of_descriptors_neither_escapes_nor_spins() -> None:
    with start_ranks(_accept_with_descriptors, 1, args=(0,)) as group:
        [way] = group.wait_for_mark("way")
        with socket.create_connection(("127.0.0.1", way["port"]), timeout=10):
            ending, cpu_seconds = group.wait_for_end(0).value
    assert ending == repr(LoadError("enough"))  # from what looks around: the wait went on until then
    assert cpu_seconds < 1


def _listen_without_descriptors(rank: int) -> str:
    with _free_descriptors(0):
        try:
            Listener(["127.0.0.1"]).close()
        except Exception as error:
            return type(error).__name__
    return "listens"


def test_listener_without_descriptors_says_so() -> None:
    [result] = run_ranks(_listen_without_descriptors, 1)
    assert result.value == "CoordinationError"
