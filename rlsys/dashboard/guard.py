"""Who may read: anybody on this machine by default, only who has the token once it is bound elsewhere.

Who may change something, where a server can: only who has the token, from the dashboard's own page.
"""

import hashlib
import hmac
import ipaddress
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlsys.errors import ConfigError

TOKEN_VARIABLE = "RLSYS_DASHBOARD_TOKEN"
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,}")
READING = {"GET", "HEAD"}
LOCAL_NAMES = {"localhost", "127.0.0.1", "[::1]"}

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def choose_token(host: str, given: str | None, *, acts: bool = False) -> str | None:
    """The token a server bound to `host` demands: the given one, a new one off loopback or if it acts, otherwise none.

    Raises `ConfigError` for one that is easily guessed, or that an address or a cookie cannot carry.
    """
    if given and not _TOKEN.fullmatch(given):
        raise ConfigError(f"{TOKEN_VARIABLE} must be at least 16 letters, digits, or any of . _ ~ -")
    if given:
        return given
    return None if is_loopback(host) and not acts else secrets.token_urlsafe(24)


class Guard:
    """Refuses what may not be read, and adds the headers under which a browser runs nothing but our own files.

    Without a token the Host header must name this machine, so that no other site's name can be pointed at it.
    The token comes once as `?token=` and then as a cookie that scripts cannot see, or as `Authorization: Bearer`.
    `open_to_read`: it is demanded only of what changes something.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None, open_to_read: bool = False) -> None:
        self._app = app
        self._open_to_read = open_to_read
        self._token = token.encode() if token else None
        # Cookies know no ports: two dashboards on one machine keep theirs apart by name.
        self._cookie = f"rlsys-{hashlib.sha256(self._token or b'').hexdigest()[:8]}"
        self._local = is_loopback(host)
        self._hosts = LOCAL_NAMES | ({host, f"[{host}]"} if self._local else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        reads = scope["method"] in READING
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        in_query = self._matches(next(iter(query.get("token", [])), ""))

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out[name] = value
                if in_query and self._token:
                    out.append(
                        "set-cookie", f"{self._cookie}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict"
                    )
            await send(message)

        app: ASGIApp = self._app
        if self._local and _hostname(headers.get("host", "")) not in self._hosts:
            app = PlainTextResponse("This dashboard answers to the names of this machine only.\n", 421)
        elif not reads and not _from_our_page(headers):
            app = PlainTextResponse("Only the dashboard's own page may change something.\n", 403)
        elif self._token and not (
            (reads and self._open_to_read)
            or in_query
            or self._matches(_bearer(headers))
            or self._matches(_cookie(headers, self._cookie))
        ):
            app = PlainTextResponse(
                "This dashboard needs its token: open the address that `rlsys dashboard` printed.\n",
                401,
                headers={"www-authenticate": "Bearer"},
            )
        await app(scope, receive, guarded)

    def _matches(self, given: str) -> bool:
        """Compared in constant time."""
        return self._token is not None and hmac.compare_digest(given.encode(), self._token)


def _from_our_page(headers: Headers) -> bool:
    """Whether a request cannot be another site's: those have another origin, and may not send JSON without asking."""
    origin = headers.get("origin", "").partition("://")[2]
    return bool(origin) and origin == headers.get("host") and headers.get("content-type") == "application/json"


def _hostname(host: str) -> str:
    """`127.0.0.1` of `127.0.0.1:8000`, `[::1]` of `[::1]:8000`."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0].lower()


def _bearer(headers: Headers) -> str:
    kind, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def _cookie(headers: Headers, name: str) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except CookieError:
        return ""
    return found.value if found else ""
