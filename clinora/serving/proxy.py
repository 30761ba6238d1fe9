"""The client's address and the scheme of a request, as a trusted proxy reports them."""

import ipaddress
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

# Gradio builds the page's own address from some of these.
REPORTS = (b"forwarded", b"x-real-ip", b"x-gradio-server")
REPORTS_PREFIX = b"x-forwarded-"


class Proxies:
    """ASGI middleware: believes X-Forwarded-For and X-Forwarded-Proto from a trusted proxy alone.

    Behind it, ``scope["client"]`` and ``scope["scheme"]`` are the reported ones, and no header of
    a proxy is left: a proxy passes on the headers that it does not set, so even a trusted proxy's
    X-Forwarded-Host may be the client's own words.

    Args:
        app: The app behind it.
        trusted: Networks of the proxies; one address is a network too.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[IPv4Network | IPv6Network]) -> None:
        self._app = app
        networks = [str(network) for network in trusted]
        # Each proxy appends the address that it sees, so uvicorn reads X-Forwarded-For from the
        # right, up to the first address that is not trusted. What stands left of it is unproven.
        self._believe = ProxyHeadersMiddleware(self._pass_on, networks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._believe(dict(scope), receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            scope["headers"] = [pair for pair in scope["headers"] if not _is_report(pair[0])]
        await self._app(scope, receive, send)


def _is_report(name: bytes) -> bool:
    return name in REPORTS or name.startswith(REPORTS_PREFIX)


def network_of(client: tuple[str, int] | None) -> str:
    """Give the network that stands for a client wherever each client has its part.

    This is the IPv4 address, or the /64 network of the IPv6 address: one customer has a /64 at
    least, and can change the rest of the address at will. All clients without an IP address count
    as one.
    """
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))
