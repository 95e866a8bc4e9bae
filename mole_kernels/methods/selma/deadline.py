"""A deadline for a whole HTTP exchange: requests has time-outs for a single read only.

A server that sends a byte now and then never exceeds the time-out of a read. So a timer shuts the
connection's
socket down when the time is over, whatever is being waited for: TLS handshake, headers or body.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from requests import Session


class Deadline:
    """Shuts down every watched socket `seconds` after it was entered; `passed` says that it has.

    Args:
        seconds: Time from ``__enter__`` on.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for own in self._sockets:
                own.close()
            self._sockets = []

    def watch(self, connection: socket.socket) -> None:
        """Have `connection` end with the deadline, also when TLS has taken its descriptor over."""
        own = connection.dup()
        with self._lock:
            self._sockets.append(own)
            if self.passed:
                _shut_down(own)

    def _expire(self) -> None:
        with self._lock:
            self.passed = True
            for own in self._sockets:
                _shut_down(own)


@contextmanager
def watched_session(deadline: Deadline) -> Iterator[Session]:
    """A session of requests whose connections end with the deadline; proxies and certificates as usual."""
    import requests
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, **options)
            _watch(self.poolmanager, deadline)

        def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
            manager = super().proxy_manager_for(*args, **options)
            _watch(manager, deadline)
            return manager

    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, Adapter())
        yield session


@contextmanager
def silent_transport() -> Iterator[None]:
    """Keep this thread's warnings of urllib3 out of the log: they quote headers that it cannot read."""
    thread = threading.get_ident()

    def foreign(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(f"urllib3.{name}") for name in ("connection", "connectionpool", "response")]
    for logger in loggers:
        logger.addFilter(foreign)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(foreign)


def _watch(manager: Any, deadline: Deadline) -> None:
    manager.pool_classes_by_scheme = {
        scheme: _watched_pool(pool, deadline) for scheme, pool in manager.pool_classes_by_scheme.items()
    }


def _watched_pool(pool: Any, deadline: Deadline) -> Any:
    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            connection = super()._new_conn()
            deadline.watch(connection)
            return connection

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _shut_down(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        # the other side has ended it already
        pass
