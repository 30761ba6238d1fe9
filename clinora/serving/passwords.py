"""Names and passwords of those who may use the page and the API, from beyond this machine.

    python -m clinora.serving.passwords alice >> passwords.txt

asks for alice's password and prints her line, ``name:salt:hash`` in hexadecimal: the hash is
scrypt's, and the file does not hold the password.
"""

import argparse
import base64
import getpass
import hashlib
import hmac
import secrets
import sys
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER

FEWEST_CHARACTERS = 12  # of a password
MOST_GUESSES = 8  # that wait for their turn
OPEN_TO_ALL = ("/health", "/ready")  # they tell nothing but that the service is well


def scrypt(password: str, salt: bytes) -> bytes:
    """Hash a password slowly: 2¹⁴ rounds, 16 MB (RFC 7914)."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def read_passwords(path: str | Path) -> dict[str, tuple[bytes, bytes]]:
    """Read salt and hash of each name.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is not ``name:salt:hash``, a name stands there twice, or there is none.
    """
    users = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, salt, expected = line.strip().split(":")
            salt, expected = bytes.fromhex(salt), bytes.fromhex(expected)
        except ValueError:
            name = ""
        if not name or len(expected) != 64 or name in users:
            raise ValueError(
                f"line {number} of {path}: expected name:salt:hash, each name once; "
                "python -m clinora.serving.passwords NAME makes such a line"
            )
        users[name] = salt, expected
    if not users:
        raise ValueError(f"{path} names nobody: python -m clinora.serving.passwords NAME >> {path}")
    return users


class Door:
    """ASGI middleware: HTTP Basic authentication (RFC 7617), for page and API alike."""

    def __init__(self, app: ASGIApp, users: dict[str, tuple[bytes, bytes]]) -> None:
        self.app, self.users = app, users
        self._nobody = secrets.token_bytes(16), secrets.token_bytes(64)
        self._known: set[bytes] = set()  # hashes of headers that were right
        self._guesses = 0  # under way; what the limiter counts as waiting comes a moment later
        self._turn = CapacityLimiter(1)  # one guess at a time, and none holds up who is known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_TO_ALL:
            header = Headers(scope=scope).get("authorization", "")
            if not self._knows(header) and (refusal := await self._refuse(header)):
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _refuse(self, header: str) -> JSONResponse | None:
        """Give the answer to someone who may not come in; None to one who may."""
        if self._guesses > MOST_GUESSES:  # one is being looked at, the others wait
            return JSONResponse({"detail": "Too many are trying to log in."}, 429, RETRY_AFTER)
        self._guesses += 1
        try:
            if await to_thread.run_sync(self.admits, header, limiter=self._turn):
                return None
        finally:
            self._guesses -= 1
        ask = {"WWW-Authenticate": 'Basic realm="Clinora", charset="UTF-8"'}
        return JSONResponse({"detail": "Name and password are needed."}, 401, ask)

    def admits(self, header: str) -> bool:
        """Tell whether an Authorization header holds a name and its password."""
        scheme, _, credentials = header.partition(" ")
        try:
            name, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
        except ValueError:
            return False
        if scheme.lower() != "basic":
            return False
        salt, expected = self.users.get(name, self._nobody)  # a stranger takes as long
        right = hmac.compare_digest(scrypt(password, salt), expected)
        if right:
            self._known.add(hashlib.sha256(header.encode()).digest())
        return right

    def _knows(self, header: str) -> bool:
        return hashlib.sha256(header.encode()).digest() in self._known


def main(argv: list[str] | None = None) -> int:
    """Ask for a password and print its line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clinora.serving.passwords",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="who may enter")
    name = parser.parse_args(argv).name
    if ":" in name or not name.isprintable() or not name or name != name.strip():
        parser.exit(2, f"passwords: {name!r}: expected a name without a colon or outer spaces\n")
    password = getpass.getpass(f"Password of {name}: ")  # asked on the terminal, not on stdout
    if len(password) < FEWEST_CHARACTERS:
        parser.exit(2, f"passwords: expected {FEWEST_CHARACTERS} characters or more\n")
    if getpass.getpass("Again: ") != password:
        parser.exit(2, "passwords: the two are not the same\n")
    salt = secrets.token_bytes(16)
    print(f"{name}:{salt.hex()}:{scrypt(password, salt).hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
