"""HTTP connections that another thread can close while the thread that uses them waits."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import threading
import weakref
from collections import defaultdict
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.cookies import RequestsCookieJar

from rankload._fetch.origins.trust import Trust
from rankload._urls import server_of

#: Most bytes to read of a redirect's body, so that the connection can be reused.
_MAX_OF_A_REDIRECT_BYTES = 64 << 10

#: Largest size of all cookies of a session, with their paths and other attributes. Servers reject requests with half as
#: many. An origin that keeps setting cookies would otherwise fill the memory.
_MAX_COOKIE_BYTES = 64 << 10


class BreakableSession(requests.Session):
    """A requests session that `break_off` can end, that follows no redirects, and that separates cookies by port.

    A cookie is bound to hosts, but not to a port (RFC 6265, 8.5). So a login cookie would also go to a server on
    another port of the same host. This session sends a cookie only to the scheme and port that set it; the cookie
    itself names the hosts.

    Args:
        trust: certificates to trust.
    """

    def __init__(self, trust: Trust) -> None:
        super().__init__()
        self.verify = trust.path or True
        self._cookies: dict[tuple[str, int] | None, RequestsCookieJar] = defaultdict(RequestsCookieJar)
        adapter = _BreakableAdapter(trust)
        self.mount("https://", adapter)
        self.mount("http://", adapter)

    def prepare_request(self, request: requests.Request) -> requests.PreparedRequest:
        """Prepare a request with the cookies of its server. Cookies in the response are kept for the same server."""
        cookies = itertools.chain.from_iterable(self._cookies.values())
        if sum(len(str(vars(cookie))) for cookie in cookies) > _MAX_COOKIE_BYTES:
            self._cookies.clear()
        server = server_of(str(request.url))
        self.cookies = self._cookies[server and (server.scheme, server.port)]
        return super().prepare_request(request)

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None: the caller follows redirects itself.

        requests would read the body of a redirect into memory, to its end, even with ``allow_redirects=False``.
        """
        if resp.is_redirect:
            with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):  # only the headers matter
                resp.raw.read(_MAX_OF_A_REDIRECT_BYTES, decode_content=False)


def break_off(session: requests.Session) -> None:
    """End a session's requests now, in any phase. The session cannot be used again.

    A socket's timeout bounds only the wait for the next byte. Without this function, an origin that sends one header
    byte every few seconds, or ``100 Continue`` forever, could keep a thread and a connection forever.
    """
    for adapter in session.adapters.values():
        if isinstance(adapter, _BreakableAdapter):
            adapter.connections.break_off()


class _Connections:
    """The connections that one session has opened."""

    def __init__(self) -> None:
        self.are_broken_off = False
        self._opened: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, connection: Any) -> None:
        with self._lock:
            self._opened.add(connection)

    def break_off(self) -> None:
        self.are_broken_off = True
        with self._lock:
            opened = list(self._opened)
        for connection in opened:
            connection.break_off()


class _BreakableAdapter(HTTPAdapter):
    def __init__(self, trust: Trust) -> None:
        self.connections = _Connections()
        self._trust = trust
        super().__init__()

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        """Return the key of a request's connection pool, with the certificates to trust."""
        host, options = super().build_connection_pool_key_attributes(request, verify, cert)
        if host["scheme"] == "https":
            options["ssl_context"] = self._trust.context
        return host, options

    def get_connection_with_tls_context(self, *arguments: Any, **keywords: Any) -> Any:
        """Return a request's connection pool, with connections that can be broken off."""
        pool: Any = super().get_connection_with_tls_context(*arguments, **keywords)
        if not isinstance(pool.ConnectionCls, functools.partial):
            pool.ConnectionCls = functools.partial(_breakable(pool.ConnectionCls), self.connections)
        return pool


@functools.cache
def _breakable(base: Any) -> Any:
    """Return a breakable subclass of one of urllib3's connection classes: plain, TLS, or through a SOCKS proxy."""

    class Breakable(base):  # type: ignore[misc]
        def __init__(self, connections: _Connections, **keywords: Any) -> None:
            self._connections = connections
            self._open_socket: weakref.ref[socket.socket] | None = None
            self._connecting: socket.socket | None = None
            super().__init__(**keywords)
            connections.add(self)

        def connect(self) -> None:
            try:
                super().connect()
                # keep the socket: http.client drops it after the headers of a response without a length
                self._open_socket = weakref.ref(self.sock)
            finally:
                if self._connecting is not None:
                    self._connecting.close()
                    self._connecting = None
            if self._connections.are_broken_off:
                self.break_off()

        def _new_conn(self) -> socket.socket:
            new: socket.socket = super()._new_conn()
            # keep a duplicate: a TLS handshake takes the descriptor from `new` long before a new object owns it
            self._connecting = new.dup()
            if self._connections.are_broken_off:
                self.break_off()
            return new

        def break_off(self) -> None:
            opened = self._open_socket() if self._open_socket is not None else None
            for one in (self._connecting, opened):
                # the socket may be closed by now or, with TLS within TLS, not be a plain socket
                with contextlib.suppress(OSError, TypeError):
                    if one is not None:
                        # SSLSocket.shutdown would remove the TLS state while another thread reads
                        socket.socket.shutdown(one, socket.SHUT_RDWR)

    return Breakable
