"""Reads a client's address and the scheme of its request from a trusted proxy's headers."""

import ipaddress
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

# Headers that a proxy sets. Gradio builds the page's own address from some of them.
PROXY_HEADERS = (b"forwarded", b"x-real-ip", b"x-gradio-server")
PROXY_PREFIX = b"x-forwarded-"


class Proxies:
    """ASGI middleware: applies X-Forwarded-For and X-Forwarded-Proto from trusted proxies only.

    The app then finds the client's address and scheme in ``scope["client"]`` and
    ``scope["scheme"]``. All proxy headers are removed. A proxy passes on headers that it does not
    set, so even the X-Forwarded-Host of a trusted proxy may come from the client.

    Args:
        app: The app that receives the requests.
        trusted: Networks of the proxies; a single address is a network too.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[IPv4Network | IPv6Network]) -> None:
        self._app = app
        networks = [str(network) for network in trusted]
        # Each proxy appends the address that it sees, so uvicorn reads X-Forwarded-For from the
        # right, up to the first address that is not trusted. A client can forge those to its left.
        self._apply_headers = ProxyHeadersMiddleware(self._remove_headers, networks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._apply_headers(dict(scope), receive, send)

    async def _remove_headers(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            headers = scope["headers"]
            scope["headers"] = [pair for pair in headers if not _is_proxy_header(pair[0])]
        await self._app(scope, receive, send)


def _is_proxy_header(name: bytes) -> bool:
    return name in PROXY_HEADERS or name.startswith(PROXY_PREFIX)


def network_of(client: tuple[str, int] | None) -> str:
    """Return the network that identifies a client where limits apply to each client.

    This is the IPv4 address or the /64 network of the IPv6 address. A customer of a provider has at
    least a /64 and can choose the rest of the address freely. All clients without an IP address
    count as one client, "".
    """
    if not client:
        return ""
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return ""
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))
