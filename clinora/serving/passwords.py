"""Names and passwords of those who may use the page and the API from other machines.

    python -m clinora.serving.passwords alice >> passwords.txt

asks for alice's password and prints her line, ``name:salt:hash`` in hexadecimal: the hash is
scrypt's, and the file does not hold the password.
"""

import argparse
import base64
import getpass
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER
from clinora.serving.proxy import network_of

FEWEST_CHARACTERS = 12  # of a password
# Control characters, and surrogates: a terminal's bytes that are not UTF-8.
NOT_IN_PASSWORDS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
MOST_GUESSES = 8  # of one address that wait for their turn
MOST_WAITING = 64  # guesses of all addresses that wait for their turn
MOST_REMEMBERED = 10_000  # addresses whose last turn is remembered
OPEN_TO_ALL = ("/health", "/ready")  # they tell nothing but whether the service is well


def scrypt(password: str, salt: bytes) -> bytes:
    """Hash a password slowly: 2¹⁴ rounds, 16 MB (RFC 7914)."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def may_be_password(text: str) -> bool:
    """Tell whether a text may be a password: it holds no control character (RFC 7617, section 2).

    scrypt's first step is HMAC with the password as key. HMAC appends NUL characters to a short
    key, so with a NUL at its end a password would open the same lines as without. HMAC also
    replaces a key of more than 64 bytes by its SHA-256, which would then be a second password:
    of these 32 bytes, about one in 10¹¹ is UTF-8 text without a control character.
    """
    return not NOT_IN_PASSWORDS.search(text)


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


def read_header(header: str) -> tuple[str, str] | None:
    """Read name and password from an Authorization header; None if no user could have sent it."""
    scheme, _, credentials = header.partition(" ")
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except ValueError:
        return None
    name, colon, password = decoded.partition(":")
    if scheme.lower() != "basic" or not colon or not may_be_password(password):
        return None
    return name, password


@dataclass(eq=False)
class Guess:
    """A guess that asks for a turn."""

    address: str
    decided: anyio.Event = field(default_factory=anyio.Event)  # it has its turn, or is refused


class Turns:
    """Gives guesses their turn, one at a time; the address whose turn is longest ago is next.

    A new address so comes before all that have had a turn. Each address has at most MOST_GUESSES
    guesses that wait. When more than MOST_WAITING wait in all, a guess of the address whose turn
    was last loses its place, which counts as a turn: a new address always has a place.
    """

    def __init__(self) -> None:
        self._waiting: list[Guess] = []  # in the order of their arrival
        self._holder: Guess | None = None
        self._count = 0  # of turns
        self._last: dict[str, int] = {}  # number of each address' last turn, in rising order

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[bool]:
        """Wait for a turn and hold it inside the ``with``; yields False to a refused guess."""
        guess = Guess(address)
        self._join(guess)
        try:
            await guess.decided.wait()
            yield guess is self._holder
        finally:
            self._leave(guess)

    def _join(self, guess: Guess) -> None:
        own = [other for other in self._waiting if other.address == guess.address]
        if len(own) == MOST_GUESSES:
            guess.decided.set()
            return
        self._waiting.append(guess)
        if self._holder is None:
            self._call_next()
        elif len(self._waiting) > MOST_WAITING:
            self._decide(max(self._waiting, key=self._last_turn))

    def _leave(self, guess: Guess) -> None:
        if guess in self._waiting:  # its request was cancelled
            self._waiting.remove(guess)
        if guess is self._holder:
            self._holder = None
            self._call_next()

    def _call_next(self) -> None:
        if self._waiting:
            self._holder = min(self._waiting, key=self._last_turn)
            self._decide(self._holder)

    def _last_turn(self, guess: Guess) -> int:
        """Number of the last turn that the guess' address had; 0: none is remembered."""
        return self._last.get(guess.address, 0)

    def _decide(self, guess: Guess) -> None:
        """End the waiting of a guess, with or without a turn, and remember its address."""
        self._waiting.remove(guess)
        guess.decided.set()
        self._count += 1
        self._last.pop(guess.address, None)
        self._last[guess.address] = self._count
        if len(self._last) > MOST_REMEMBERED:
            oldest = next(iter(self._last))
            del self._last[oldest]


class Door:
    """ASGI middleware: HTTP Basic authentication (RFC 7617), for page and API alike.

    A header that was right once is admitted at once from then on. Any other costs a scrypt, one
    at a time, in the order of ``Turns``. A flood from thousands of addresses can still delay or
    refuse new logins, but not people who are already logged in.
    """

    def __init__(self, app: ASGIApp, users: dict[str, tuple[bytes, bytes]]) -> None:
        self.app, self.users = app, users
        self._nobody = secrets.token_bytes(16), secrets.token_bytes(64)
        self._known: set[bytes] = set()  # hashes of headers that were right
        self._turns = Turns()
        self._thread = CapacityLimiter(1)  # its own, since the page's handlers may hold all others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_TO_ALL:
            header = Headers(scope=scope).get("authorization", "")
            if not self._knows(header):
                refusal = await self._refuse(header, network_of(scope.get("client")))
                if refusal:
                    await refusal(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    async def _refuse(self, header: str, address: str) -> JSONResponse | None:
        """Give the answer to someone who may not come in; None to one who may."""
        ask = {"WWW-Authenticate": 'Basic realm="Clinora", charset="UTF-8"'}
        wrong = JSONResponse({"detail": "Name and password are needed."}, 401, ask)
        credentials = read_header(header)
        if credentials is None:
            return wrong
        async with self._turns.turn(address) as has_turn:
            if not has_turn:
                busy = "There are too many attempts to log in; try again in a second."
                return JSONResponse({"detail": busy}, 429, RETRY_AFTER)
            if self._knows(header):  # another request with it had its turn before
                return None
            right = await to_thread.run_sync(self.admits, *credentials, limiter=self._thread)
        if not right:
            return wrong
        self._known.add(_digest(header))
        return None

    def admits(self, name: str, password: str) -> bool:
        """Tell whether a name has this password; takes as long for a name that is unknown."""
        salt, expected = self.users.get(name, self._nobody)
        return hmac.compare_digest(scrypt(password, salt), expected)

    def _knows(self, header: str) -> bool:
        return _digest(header) in self._known


def _digest(header: str) -> bytes:
    return hashlib.sha256(header.encode()).digest()


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
    if not may_be_password(password):
        parser.exit(2, "passwords: expected a password without control characters\n")
    if getpass.getpass("Again: ") != password:
        parser.exit(2, "passwords: the two are not the same\n")
    salt = secrets.token_bytes(16)
    print(f"{name}:{salt.hex()}:{scrypt(password, salt).hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
