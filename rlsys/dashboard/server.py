"""The dashboard as a server of its own, or in a thread beside a run."""

import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

import uvicorn

from rlsys.dashboard.app import Scale, make_app
from rlsys.dashboard.guard import TOKEN_VARIABLE, choose_token, is_loopback
from rlsys.errors import ConfigError

LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = ("0.0.0.0", "::")
PATIENCE_S = 10.0
"""Longest wait for the thread to end."""


class Served:
    """A dashboard that answers at `url`; with a token, the URL carries it."""

    def __init__(
        self, directories: Sequence[Path], host: str = LOOPBACK, port: int = 0, scale: Scale | None = None
    ) -> None:
        given = os.environ.get(TOKEN_VARIABLE)
        token = choose_token(host, given, acts=scale is not None)
        self._socket = _listen(host, port)
        self._stopping = threading.Event()
        app = make_app(
            directories,
            host=host,
            token=token,
            stopping=self._stopping,
            scale=scale,
            open_to_read=not given and is_loopback(host),
        )
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5, server_header=False
        )
        self._server = _Server(settings, self._stopping)
        self._thread: threading.Thread | None = None
        bound = self._socket.getsockname()[1]
        named = socket.gethostname() if host in EVERY_ADDRESS else host
        shown = f"[{named}]" if ":" in named else named
        self.url = f"http://{shown}:{bound}/" + (f"?token={quote(token)}" if token else "")

    def run(self) -> None:
        """Serve until interrupted."""
        self._server.run(sockets=[self._socket])

    def start(self) -> None:
        """Serve in a thread, which ends with the process at the latest."""
        self._thread = threading.Thread(target=self.run, name="dashboard", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; watchers are told."""
        self._stopping.set()
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
        self._socket.close()


class _Server(uvicorn.Server):
    """uvicorn, with open event streams ended when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Streams end before their connections are waited for."""
        self._stopping.set()
        await super().shutdown(sockets)


def serve(directories: Sequence[Path], *, host: str = LOOPBACK, port: int = 0, on_url: Callable[[str], None]) -> None:
    """Serve until interrupted; `on_url` gets the address once it accepts connections. Raises `ConfigError`."""
    served = Served(directories, host, port)
    on_url(served.url)
    try:
        served.run()
    except KeyboardInterrupt:
        pass
    finally:
        served.stop()


def serve_in_thread(directory: Path, port: int = 0, scale: Scale | None = None) -> Served:
    """Serve one run on loopback beside whatever this process does, until `stop()`. Raises `ConfigError`.

    With `scale` its fleet page can ask for more or fewer workers.
    """
    served = Served([directory], LOOPBACK, port, scale)
    served.start()
    return served


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise ConfigError(f"the dashboard cannot listen on {host}, port {port}: {error.strerror}") from None
    return listening
