"""Asks a server over HTTP, with limits of time and size that hold whatever the server does.

urllib's time limit is for each read: a server that sends one byte per second is never too slow. urllib also reads
headers and bodies of any length. Here the limit is for the whole answer: a timer shuts the connection down.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

MOST_BYTES = 1 << 24
"""Bytes of an answer. A judgement has some thousands, and some ten thousands with the thoughts before it."""
MOST_BYTES_OF_AN_ERROR = 1 << 16


def exchange(request: urllib.request.Request, seconds: float, *handlers: Any) -> bytes:
    """Sends a request, and returns the body of the answer.

    Args:
        seconds: for all of it: connecting, headers and body. Only looking up the host's name is not counted.
        handlers: of urllib, beside the usual ones.

    Raises:
        urllib.error.HTTPError: the server answers with an error. Its body is read already, and cut to a limit.
        OSError: there is no whole answer within the time, or it is too large.
    """
    with _limited(seconds) as connections:
        opener = urllib.request.build_opener(*connections.handlers(), *handlers)
        try:
            with opener.open(request, timeout=seconds) as response:
                body: bytes = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            said = _beginning(error)
            raise urllib.error.HTTPError(error.url, error.code, error.msg, error.headers, io.BytesIO(said)) from None
        except Exception as error:
            # Also what http.client raises for headers, chunks and status lines that are none.
            if connections.are_late:
                raise _too_slow(seconds) from None
            raise OSError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from None
    if connections.are_late:  # without a length, a body that was cut off looks complete
        raise _too_slow(seconds)
    if len(body) > MOST_BYTES:
        raise OSError(f"it sends more than {MOST_BYTES:,} bytes")
    return body


def _too_slow(seconds: float) -> TimeoutError:
    return TimeoutError(f"no whole answer within {seconds:g} s")


def _beginning(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(MOST_BYTES_OF_AN_ERROR)
    except http.client.IncompleteRead as cut_off:
        return cut_off.partial
    except (OSError, http.client.HTTPException, ValueError):
        return b""


class _Connections:
    """The connections of one request, and of the redirects that it follows."""

    def __init__(self) -> None:
        self.are_late = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def watch(self, connection: socket.socket) -> None:
        # A copy of the descriptor: TLS takes the socket over before the two sides agree.
        with self._lock:
            self._sockets.append(connection.dup())
            if self.are_late:
                self._shut_down()

    def end(self) -> None:
        with self._lock:
            self.are_late = True
            self._shut_down()

    def _shut_down(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for connection in self._sockets:
            connection.close()

    def handlers(self) -> list[Any]:
        plain = self._watched(http.client.HTTPConnection)
        encrypted = self._watched(http.client.HTTPSConnection)

        class Plain(urllib.request.HTTPHandler):
            def http_open(self, request: Any) -> Any:
                return self.do_open(plain, request)

        class Encrypted(urllib.request.HTTPSHandler):
            def https_open(self, request: Any) -> Any:
                return self.do_open(encrypted, request)

        return [Plain(), Encrypted()]

    def _watched(self, kind: type[Any]) -> Any:
        connections = self

        class Watched(kind):
            _own: Any = None

            @property
            def sock(self) -> Any:
                return self._own

            @sock.setter
            def sock(self, value: Any) -> None:
                if value is not None and self._own is None:
                    connections.watch(value)
                self._own = value

        return Watched


@contextmanager
def _limited(seconds: float) -> Iterator[_Connections]:
    connections = _Connections()
    timer = threading.Timer(seconds, connections.end)
    timer.daemon = True
    timer.start()
    try:
        yield connections
    finally:
        timer.cancel()
        connections.close()
