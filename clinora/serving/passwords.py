"""Names and passwords of the users who may open the page and the API from other machines.

    python -m clinora.serving.passwords alice >> passwords.txt

asks for alice's password and prints a line for the password file: ``name:salt:hash``, with the salt
and the scrypt hash in hexadecimal. The file does not contain the password.
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
from typing import NamedTuple

import anyio
from anyio import CapacityLimiter, to_thread
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from clinora.serving.api import RETRY_AFTER
from clinora.serving.proxy import network_of

FEWEST_CHARACTERS = 12  # in a password
# Control characters, and surrogates, which stand for bytes from the terminal that are not UTF-8.
NOT_IN_PASSWORDS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
MOST_GUESSES = 8  # waiting guesses of one address
MOST_WAITING_GUESSES = 64  # waiting guesses of all addresses
MOST_REMEMBERED = 10_000  # addresses whose last turn is remembered
OPEN_TO_ALL = ("/health", "/ready")  # they reveal only the status of the service


def scrypt(password: str, salt: bytes) -> bytes:
    """Hash a password slowly with scrypt (RFC 7914): 2¹⁴ rounds, 16 MB."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


def may_be_password(text: str) -> bool:
    """Return whether a text has no control characters, as a password must (RFC 7617, section 2).

    scrypt first computes an HMAC with the password as the key. HMAC pads a short key with NUL
    characters, so a password with NULs at its end would match the same lines as without them. HMAC
    replaces a key of more than 64 bytes by its SHA-256, so those 32 bytes would be a second
    password; about one in 10¹¹ such values is UTF-8 text without a control character.
    """
    return not NOT_IN_PASSWORDS.search(text)


class _User(NamedTuple):
    name: str
    salt: bytes
    expected: bytes


def read_passwords(path: str | Path) -> dict[str, tuple[bytes, bytes]]:
    """Read each user's salt and password hash from a password file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not UTF-8, a line is not ``name:salt:hash``, a name occurs twice, or
            the file has no users.
    """
    users = {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not UTF-8, perhaps UTF-16, as Windows PowerShell writes it with > and >>: "
            "save it as UTF-8"
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        user = _read_line(line.strip())
        if user is None or user.name in users:
            raise ValueError(
                f"line {number} of {path}: expected name:salt:hash, each name once; "
                "python -m clinora.serving.passwords NAME prints such a line"
            )
        users[user.name] = (user.salt, user.expected)
    if not users:
        raise ValueError(
            f"{path} has no users: add one with python -m clinora.serving.passwords NAME >> {path}"
        )
    return users


def _read_line(line: str) -> _User | None:
    """Parse a line of a password file; return None if it is malformed."""
    try:
        name, salt, expected = line.split(":")
        user = _User(name, bytes.fromhex(salt), bytes.fromhex(expected))
    except ValueError:
        return None
    # A name that nobody can type: a file that was appended may begin with a byte-order mark.
    if not name or not name.isprintable() or len(user.expected) != 64:
        return None
    return user


def read_header(header: str) -> tuple[str, str] | None:
    """Parse the name and the password of an Authorization header; None if it is malformed."""
    scheme, _, credentials = header.partition(" ")
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except ValueError:
        return None
    name, colon, password = decoded.partition(":")
    if scheme.lower() != "basic":
        return None
    if not colon or not may_be_password(password):
        return None
    return name, password


@dataclass(eq=False)
class Guess:
    """A login attempt that waits for its turn to be checked."""

    address: str
    decided: anyio.Event = field(default_factory=anyio.Event)  # set when it has a turn or none


class Turns:
    """Lets one guess run at a time. The address whose last turn is longest ago is next.

    Therefore a new address comes before all addresses that have had a turn. At most MOST_GUESSES
    guesses of one address wait. When more than MOST_WAITING_GUESSES wait in all, the address that
    had the most recent turn loses one, which counts as a turn. So there is always room for a guess
    of a new address.
    """

    def __init__(self) -> None:
        self._waiting: list[Guess] = []  # in the order of their arrival
        self._holder: Guess | None = None
        self._count = 0  # turns so far
        self._last: dict[str, int] = {}  # the number of each address's last turn, ascending

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[bool]:
        """Wait for a turn and hold it inside the ``with`` block; yields False if refused."""
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
        elif len(self._waiting) > MOST_WAITING_GUESSES:
            self._decide(max(self._waiting, key=self._last_turn))

    def _leave(self, guess: Guess) -> None:
        if guess in self._waiting:  # the request was cancelled while the guess waited
            self._waiting.remove(guess)
        if guess is self._holder:
            self._holder = None
            self._call_next()

    def _call_next(self) -> None:
        if self._waiting:
            self._holder = min(self._waiting, key=self._last_turn)
            self._decide(self._holder)

    def _last_turn(self, guess: Guess) -> int:
        """Return the number of the last turn of a guess's address, or 0 if none is remembered."""
        return self._last.get(guess.address, 0)

    def _decide(self, guess: Guess) -> None:
        """End the waiting of a guess, with or without a turn, and record a turn of its address."""
        self._waiting.remove(guess)
        guess.decided.set()
        self._count += 1
        self._last.pop(guess.address, None)
        self._last[guess.address] = self._count
        if len(self._last) > MOST_REMEMBERED:
            oldest = next(iter(self._last))
            del self._last[oldest]


class BasicAuth:
    """ASGI middleware: HTTP Basic authentication (RFC 7617) for the page and the API.

    The app finds the user's name in ``scope["user"]``. A header that was correct once is accepted
    immediately from then on. Every other header costs one scrypt; these run one at a time, in the
    order of ``Turns``. If more than MOST_WAITING_GUESSES addresses guess at the same time, new
    logins can be delayed or refused, but not users who are already logged in.
    """

    def __init__(self, app: ASGIApp, users: dict[str, tuple[bytes, bytes]]) -> None:
        self.app = app
        self.users = users
        self._unknown_user = (secrets.token_bytes(16), secrets.token_bytes(64))
        self._known: dict[bytes, str] = {}  # user of each header that was correct, by its hash
        self._turns = Turns()
        # A separate thread, since the page's handlers may occupy all others.
        self._thread = CapacityLimiter(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_TO_ALL:
            header = Headers(scope=scope).get("authorization", "")
            if not self._knows(header):
                refusal = await self._refuse(header, network_of(scope.get("client")))
                if refusal:
                    await refusal(scope, receive, send)
                    return
            scope["user"] = self._known[_digest(header)]
        await self.app(scope, receive, send)

    async def _refuse(self, header: str, address: str) -> JSONResponse | None:
        """Check a header; return the response that refuses it, or None if it is correct."""
        ask = {"WWW-Authenticate": 'Basic realm="Clinora", charset="UTF-8"'}
        wrong = JSONResponse({"detail": "A name and a password are required."}, 401, ask)
        credentials = read_header(header)
        if credentials is None:
            return wrong
        async with self._turns.turn(address) as has_turn:
            if not has_turn:
                busy = "There are too many attempts to log in; try again in a second."
                return JSONResponse({"detail": busy}, 429, RETRY_AFTER)
            if self._knows(header):  # another request with the same header was checked meanwhile
                return None
            is_right = await to_thread.run_sync(self.admits, *credentials, limiter=self._thread)
        if not is_right:
            return wrong
        name, _password = credentials
        self._known[_digest(header)] = name
        return None

    def admits(self, name: str, password: str) -> bool:
        """Return whether a user has this password. An unknown name takes the same time."""
        salt, expected = self.users.get(name, self._unknown_user)
        return hmac.compare_digest(scrypt(password, salt), expected)

    def _knows(self, header: str) -> bool:
        return _digest(header) in self._known


def _digest(header: str) -> bytes:
    return hashlib.sha256(header.encode()).digest()


def main(argv: list[str] | None = None) -> int:
    """Ask for a password, print the user's line, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clinora.serving.passwords",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="name of the user")
    name = parser.parse_args(argv).name
    has_outer_spaces = name != name.strip()
    if not name or ":" in name or not name.isprintable() or has_outer_spaces:
        parser.exit(2, f"passwords: {name!r}: expected a name without a colon or outer spaces\n")
    password = getpass.getpass(f"Password of {name}: ")  # prompts on the terminal, not on stdout
    if len(password) < FEWEST_CHARACTERS:
        parser.exit(2, f"passwords: expected {FEWEST_CHARACTERS} characters or more\n")
    if not may_be_password(password):
        parser.exit(2, "passwords: expected a password without control characters\n")
    if getpass.getpass("Again: ") != password:
        parser.exit(2, "passwords: the two passwords are not the same\n")
    salt = secrets.token_bytes(16)
    print(f"{name}:{salt.hex()}:{scrypt(password, salt).hex()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
