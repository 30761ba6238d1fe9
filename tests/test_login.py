"""Who may enter: passwords, floods of wrong ones, and what a proxy may report."""

import asyncio
import base64
import getpass
import hashlib
import json
import re
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.responses import PlainTextResponse

from clinora.serving import passwords
from clinora.serving.app import create_app
from clinora.serving.passwords import MOST_GUESSES, MOST_WAITING_GUESSES
from tests.served import CANARY, run_async

NOTE = "Severe chest pain."
RIGHT = "correct horse"
SALT = b"0123456789abcdef"
real_scrypt = hashlib.scrypt


def line(name, password):
    """Make a line of the file of passwords, with scrypt's parameters of the documentation."""
    found = real_scrypt(password.encode(), salt=SALT, n=16384, r=8, p=1)
    return f"{name}:{SALT.hex()}:{found.hex()}\n"


@pytest.fixture
def users(tmp_path):
    file = tmp_path / "passwords.txt"
    file.write_text(line("alice", RIGHT) + "\n" + line("bob", "pässword: 9"))
    return passwords.read_passwords(file)


@pytest.fixture
def guarded(classifier, users, tmp_path):
    app = create_app(classifier, tmp_path / "flagged", hosts=["notes.example"], users=users)
    with TestClient(app, "http://notes.example") as client:
        yield client


def basic(name, password):
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def admits(users, name, password):
    """Ask a door for a name and a password, as HTTP does."""
    door = passwords.BasicAuth(PlainTextResponse("in"), users)
    status = TestClient(door).get("/", headers={"Authorization": basic(name, password)}).status_code
    assert status in (200, 401)
    return status == 200


# --- Names and passwords ---


@pytest.mark.parametrize("path", ["/", "/gradio_api/info"])
def test_page_and_api_ask_for_name_and_password(guarded, path):
    right = basic("alice", RIGHT)
    attempts = [("alice", "wrong"), ("alice", ""), ("bob", RIGHT), ("carol", RIGHT)]
    wrong = [basic(*attempt) for attempt in attempts]
    wrong += ["Basic ###", "Basic", right.replace("Basic", "Digest")]
    wrong.append("Basic " + base64.b64encode(b"alice").decode())
    for headers in ({}, *({"Authorization": header} for header in wrong)):
        for answer in (
            guarded.get(path, headers=headers),
            guarded.post("/v1/classify", json={"note": CANARY}, headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Basic ")
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("user", [("alice", RIGHT), ("bob", "pässword: 9")])
def test_a_name_with_its_password_comes_in_each_time(guarded, user):
    headers = {"Authorization": basic(*user)}
    for _ in range(2):
        assert guarded.get("/", headers=headers).status_code == 200
        answer = guarded.post("/v1/classify", json={"note": NOTE}, headers=headers)
        assert answer.status_code == 200


def test_a_strangers_body_is_not_read(guarded):
    answer = guarded.post("/v1/classify", content=b"x" * 6_000_000)
    assert answer.status_code == 401


def test_health_tells_itself_to_all_and_unknown_hosts_are_refused(guarded):
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/ready").status_code == 200
    headers = {"Host": "evil.example", "Authorization": basic("alice", RIGHT)}
    assert guarded.get("/", headers=headers).status_code == 400


@pytest.mark.parametrize("ending", ["\0", "\0" * 51])
def test_a_password_with_a_nul_character_behind_it_is_another(users, ending):
    assert admits(users, "alice", RIGHT)
    assert not admits(users, "alice", RIGHT + ending)


def test_the_hash_that_hmac_puts_in_place_of_a_long_password_does_not_enter(tmp_path):
    # Found by trying 96 million numbers: most hashes are not UTF-8, so nobody can send them.
    long = "a long passphrase of more than sixty-four bytes, and a number: 000095735245"
    digest = hashlib.sha256(long.encode()).digest()
    file = tmp_path / "passwords.txt"
    file.write_text(line("alice", long))
    assert line("alice", digest.decode()) == line("alice", long)  # to scrypt they are one
    users = passwords.read_passwords(file)
    assert admits(users, "alice", long)
    assert not admits(users, "alice", digest.decode())
    assert not admits(users, "alice", long + " ")
    assert not admits(users, "alice", long[:64])


@pytest.mark.parametrize("password", ["x" * 64, "y" * 65, "ध" * 40])
def test_long_passwords_of_old_files_still_enter(tmp_path, password):
    file = tmp_path / "passwords.txt"
    file.write_text(line("alice", password))
    assert admits(passwords.read_passwords(file), "alice", password)


def test_a_known_and_an_unknown_name_cost_the_same_work(users, monkeypatch):
    work = []

    def note_work(password, *, salt, **parameters):
        work.append((len(password), len(salt), parameters))
        return real_scrypt(password, salt=salt, **parameters)

    monkeypatch.setattr(hashlib, "scrypt", note_work)
    for name in ("alice", "carol"):
        assert not admits(users, name, "a wrong guess")
    known, unknown = work
    assert known == unknown
    assert known[2] == {"n": 16384, "r": 8, "p": 1}


# --- The file and the tool that makes its lines ---


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "passwords.txt"),
        ("alice:correct horse\n", "line 1 of"),
        ("alice:00:zz\n", "line 1 of"),
        (line("alice", "a") + "bob:00:11\n", "line 2 of"),
        (line("alice", "a") + line("alice", "b"), "line 2 of"),
        (line("", "a"), "line 1 of"),
    ],
)
def test_a_file_of_passwords_that_is_none_is_refused_without_quoting_it(tmp_path, text, told):
    file = tmp_path / "passwords.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        passwords.read_passwords(file)
    assert "horse" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path, encoding):
    file = tmp_path / "passwords.txt"
    file.write_text(line("alice", RIGHT), encoding=encoding)
    assert admits(passwords.read_passwords(file), "alice", RIGHT)


def test_a_mark_within_the_file_is_no_part_of_a_name(tmp_path):
    file = tmp_path / "passwords.txt"
    file.write_text(f"{line('alice', RIGHT)}\ufeff{line('bob', RIGHT)}", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2"):
        passwords.read_passwords(file)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_file_in_another_encoding_is_named_with_the_one_to_use(tmp_path, encoding):
    file = tmp_path / "passwords.txt"
    file.write_text(line("jürgen", RIGHT), encoding=encoding)
    with pytest.raises(ValueError, match=r"passwords\.txt .*UTF-8") as caught:
        passwords.read_passwords(file)
    assert type(caught.value) is ValueError  # a UnicodeDecodeError would carry the bytes


def test_the_tools_line_admits_the_password_that_was_typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(getpass, "getpass", lambda _: RIGHT)
    assert passwords.main(["alice"]) == 0
    printed = capsys.readouterr().out
    assert RIGHT not in printed
    file = tmp_path / "passwords.txt"
    file.write_text(printed)
    users = passwords.read_passwords(file)
    assert admits(users, "alice", RIGHT)
    assert not admits(users, "alice", "correct horsf")


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        ("alice", ["short", "short"], "12 characters"),
        ("alice", [RIGHT, "correct hors"], "not the same"),
        ("alice", [RIGHT + "\0"] * 2, "control characters"),
        ("alice", [RIGHT + "\udcff"] * 2, "control characters"),
        ("al:ice", [], "without a colon"),
        (" alice", [], "or outer spaces"),
    ],
)
def test_what_makes_no_line_is_told(monkeypatch, capsys, name, typed, told):
    answers = iter(typed)
    monkeypatch.setattr(getpass, "getpass", lambda _: next(answers))
    with pytest.raises(SystemExit, match="2"):
        passwords.main([name])
    out, err = capsys.readouterr()
    assert out == "" and told in err


# --- Floods ---


class Turns:
    """Stands in for scrypt: notes whose turn it was, and can hold the turns."""

    def __init__(self):
        self.passwords = []
        self.open = threading.Event()
        self.open.set()

    def scrypt(self, password, **parameters):
        self.passwords.append(password.decode())
        self.open.wait(30)
        # A wrong guess is not worth the time here.
        return real_scrypt(password, **parameters) if password == RIGHT.encode() else bytes(64)

    @contextmanager
    def held(self):
        """Let no turn end inside the ``with``."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def before(self, password):
        """How many had their turn before this password."""
        return self.passwords.index(password)


@pytest.fixture
def turns(monkeypatch):
    turns = Turns()
    monkeypatch.setattr(hashlib, "scrypt", turns.scrypt)
    return turns


@contextmanager
def listening(app):
    """Serve an app on a real socket; gives its URL and the addresses that asked, as they come."""
    came = []

    async def note_address(scope, receive, send):
        if scope["type"] == "http":
            came.append(scope["client"][0])
        await app(scope, receive, send)

    config = uvicorn.Config(note_address, port=0, log_level="warning", proxy_headers=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", came
    finally:
        server.should_exit = True
        thread.join(30)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def get(url, address, password):
    """Ask with a password from one of this machine's loopback addresses."""
    transport = httpx.HTTPTransport(local_address=address)
    with httpx.Client(transport=transport, timeout=60) as client:
        return client.get(url, headers={"Authorization": basic("alice", password)})


def test_a_flood_from_one_address_delays_another_by_one_turn(classifier, users, tmp_path, turns):
    guesses = 40
    refused = guesses - 1 - MOST_GUESSES  # one has its turn, the others wait
    app = create_app(classifier, tmp_path / "flagged", users=users)
    with listening(app) as (url, came), ThreadPoolExecutor(guesses + 1) as pool:
        with turns.held():
            flood = [
                pool.submit(get, f"{url}/config", "127.0.0.2", f"guess {i}") for i in range(guesses)
            ]
            wait_until(lambda: sum(answer.done() for answer in flood) == refused)
            login = pool.submit(get, f"{url}/config", "127.0.0.3", RIGHT)
            wait_until(lambda: "127.0.0.3" in came)
        assert login.result(30).status_code == 200
        answers = [answer.result(30) for answer in flood]
    assert turns.before(RIGHT) == 1
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(429), statuses.count(401)) == (refused, 1 + MOST_GUESSES)
    assert {a.headers["Retry-After"] for a in answers if a.status_code == 429} == {"1"}


def test_who_is_known_waits_for_nobody(guarded, turns):
    known = {"Authorization": basic("alice", RIGHT)}
    assert guarded.get("/config", headers=known).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        with turns.held():
            guess = {"Authorization": basic("alice", "guess")}
            guessing = pool.submit(guarded.get, "/config", headers=guess)
            wait_until(lambda: turns.passwords == [RIGHT, "guess"])
            assert guarded.get("/config", headers=known).status_code == 200
            assert guarded.get("/config").status_code == 401  # no password: nothing to look at
            assert guarded.get("/health").status_code == 200
            assert not guessing.done()
        assert guessing.result(30).status_code == 401
    assert turns.passwords == [RIGHT, "guess"]


async def ask(app, address, password, **headers):
    """Ask an app in this process, from any address."""
    transport = httpx.ASGITransport(app, client=(address, 5000))
    headers |= {"Authorization": basic("alice", password)}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = await client.get("/config", headers=headers)
    return answer.status_code


async def waiting(questions):
    """Start to ask, one after the other, until all have their answer or wait for their turn."""
    tasks = [asyncio.create_task(question) for question in questions]
    for _ in range(100):
        await asyncio.sleep(0)
    return tasks


def statuses_of_a_flood(app, turns, flood, login):
    """Have a login come after a flood; returns the statuses of both."""

    async def run():
        with turns.held():
            tasks = await waiting(ask(app, *guess) for guess in flood)
            (last,) = await waiting([ask(app, *login)])
        return await asyncio.gather(*tasks), await last

    return run_async(run())


@pytest.fixture
def door(users):
    return passwords.BasicAuth(PlainTextResponse("in"), users)


def test_a_new_address_has_a_place_when_all_are_taken(door, turns):
    flood = [(f"10.0.{i % 250}.{i // 250}", "guess") for i in range(3 * MOST_WAITING_GUESSES)]
    statuses, status = statuses_of_a_flood(door, turns, flood, ("192.0.2.1", RIGHT))
    assert status == 200
    assert turns.before(RIGHT) <= MOST_WAITING_GUESSES
    assert set(statuses) == {401, 429}


def test_a_new_address_comes_before_many_that_have_guessed(door, turns):
    flood = [(f"10.0.0.{i}", "guess") for i in range(2 * MOST_WAITING_GUESSES)]

    async def guess_once():
        for guess in flood:
            assert await ask(door, *guess) == 401

    run_async(guess_once())
    turns.passwords.clear()
    _, status = statuses_of_a_flood(door, turns, flood, ("192.0.2.1", RIGHT))
    assert status == 200
    assert turns.before(RIGHT) == 1


def test_addresses_take_turns(door, turns):
    flood = [("10.0.0.1", f"first {i}") for i in range(3)]
    flood += [("10.0.0.2", f"second {i}") for i in range(3)]
    statuses_of_a_flood(door, turns, flood, ("10.0.0.3", "third"))
    expected = ["first 0", "second 0", "third", "first 1", "second 1", "first 2", "second 2"]
    assert turns.passwords == expected


def test_who_has_just_guessed_wrong_waits_for_one_turn_of_a_flood(door, turns):
    assert run_async(ask(door, "10.0.0.2", "a wrong guess")) == 401
    flood = [("10.0.0.1", f"guess {i}") for i in range(40)]
    _, status = statuses_of_a_flood(door, turns, flood, ("10.0.0.2", RIGHT))
    assert status == 200
    assert turns.passwords.index(RIGHT) == 2  # the wrong guess, one of the flood, this one


def test_the_addresses_of_an_ipv6_network_count_as_one(door, turns):
    flood = [(f"2001:db8:0:1::{i:x}", "guess") for i in range(1, 41)]
    statuses, status = statuses_of_a_flood(door, turns, flood, ("2001:db8:0:2::1", RIGHT))
    assert statuses.count(429) == 40 - 1 - MOST_GUESSES
    assert status == 200
    assert turns.before(RIGHT) == 1


def test_ipv4_addresses_written_as_ipv6_count_for_themselves(door, turns):
    flood = [("::ffff:10.0.0.1", "guess")] * 40
    statuses, status = statuses_of_a_flood(door, turns, flood, ("::ffff:10.0.0.2", RIGHT))
    assert statuses.count(429) == 40 - 1 - MOST_GUESSES
    assert status == 200


def test_a_password_that_was_found_right_is_not_looked_at_again(door, turns):
    login = [("10.0.0.1", RIGHT)] * MOST_GUESSES
    statuses, _ = statuses_of_a_flood(door, turns, login, ("10.0.0.2", "guess"))
    assert statuses == [200] * MOST_GUESSES
    assert turns.passwords.count(RIGHT) == 1


def test_a_cancelled_guess_leaves_its_place_and_its_turn(door, turns):
    async def run():
        with turns.held():
            first, second = await waiting(ask(door, "10.0.0.1", f"guess {i}") for i in range(2))
            second.cancel()
            first.cancel()
        return await asyncio.wait_for(ask(door, "10.0.0.1", RIGHT), 30)

    assert run_async(run()) == 200
    assert "guess 1" not in turns.passwords


def test_the_memory_of_many_addresses_is_bounded(monkeypatch):
    monkeypatch.setattr(passwords, "MOST_REMEMBERED", 1_000)
    turns = passwords.Turns()

    async def flood():
        for i in range(10_000):
            async with turns.turn(f"10.0.{i // 250}.{i % 250}"):
                pass

    tracemalloc.start()
    run_async(flood())
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 500_000  # bytes; 10,000 remembered addresses take more than 1 MB


# --- Behind a proxy ---

PROXY = "10.0.0.1"


@pytest.fixture
def proxied(classifier, users, tmp_path):
    return create_app(classifier, tmp_path / "flagged", users=users, trusted_proxies=[PROXY])


def flood_through(app, turns, peer, flooder, person):
    """Have one flood and another log in, both through ``peer``; statuses of both."""

    async def run():
        with turns.held():
            tasks = await waiting(
                ask(app, peer, "guess", **{"X-Forwarded-For": flooder(i)}) for i in range(40)
            )
            (login,) = await waiting([ask(app, peer, RIGHT, **{"X-Forwarded-For": person})])
        return await asyncio.gather(*tasks), await login

    return run_async(run())


@pytest.mark.parametrize(
    "flooder",
    [
        lambda i: "203.0.113.5",
        lambda i: f"203.0.113.5:{1000 + i}",
        lambda i: f"198.51.100.{i}, 203.0.113.5",  # the left one is the flooder's own claim
        lambda i: f"2001:db8::{i:x}",
        lambda i: f"[2001:db8::{i:x}]:443",
        lambda i: f"no address {i}",
    ],
)
def test_behind_a_trusted_proxy_the_address_that_it_reports_counts(proxied, turns, flooder):
    statuses, status = flood_through(proxied, turns, PROXY, flooder, "203.0.113.6")
    assert statuses.count(429) == 40 - 1 - MOST_GUESSES
    assert status == 200
    assert turns.before(RIGHT) == 1


def test_what_anyone_else_reports_does_not_count(proxied, turns):
    statuses, status = flood_through(
        proxied, turns, "10.0.0.9", lambda i: f"203.0.113.{i}", "198.51.100.1"
    )
    assert statuses.count(429) == 40 - 1 - MOST_GUESSES
    assert status == 429


REPORTS = {
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-For": "203.0.113.5",
    "X-Forwarded-Port": "9",
    "X-Forwarded-Server": "evil.example",
    "X-Real-IP": "203.0.113.5",
    "Forwarded": "for=203.0.113.5;host=evil.example;proto=https",
    "X-Gradio-Server": "https://evil.example",
}


@pytest.fixture(scope="module")
def behind_proxy(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flagged")
    trusted = [PROXY, "10.1.0.0/28", "2001:db8::1"]
    return create_app(classifier, folder, trusted_proxies=trusted)


def root_of_page(text):
    """Read the root that the page itself holds."""
    return json.loads(re.search(r'"root":("[^"]*")', text)[1])


@pytest.mark.parametrize("peer", ["127.0.0.1", "10.0.0.2", "10.1.0.16", "2001:db8::2"])
def test_a_strangers_reports_change_nothing(behind_proxy, peer):
    client = TestClient(behind_proxy, "http://127.0.0.1", client=(peer, 5000))
    for name, value in REPORTS.items():
        headers = {name: value}
        assert client.get("/config", headers=headers).json()["root"] == "http://127.0.0.1"
        assert root_of_page(client.get("/", headers=headers).text) == "http://127.0.0.1"


@pytest.mark.parametrize("peer", [PROXY, "10.1.0.15", "2001:db8::1", "2001:db8:0::0:1"])
def test_the_scheme_that_a_trusted_proxy_reports_is_the_pages(behind_proxy, peer):
    client = TestClient(behind_proxy, "http://127.0.0.1", client=(peer, 5000))
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.5"}
    assert client.get("/config", headers=headers).json()["root"] == "https://127.0.0.1"
    assert root_of_page(client.get("/", headers=headers).text) == "https://127.0.0.1"


def test_a_header_that_a_trusted_proxy_only_passes_on_changes_nothing(behind_proxy):
    client = TestClient(behind_proxy, "http://127.0.0.1", client=(PROXY, 5000))
    passed_on = {k: v for k, v in REPORTS.items() if k != "X-Forwarded-Proto"}
    assert client.get("/config", headers=passed_on).json()["root"] == "http://127.0.0.1"


@pytest.mark.parametrize("address", ["*", "proxy.example", "10.0.0.1/8"])
def test_a_trusted_proxy_is_an_address_or_a_network(classifier, tmp_path, address):
    with pytest.raises(ValueError, match=re.escape(address)):
        create_app(classifier, tmp_path, trusted_proxies=[address])


@pytest.mark.slow
def test_the_command_believes_the_proxies_that_it_is_given_and_no_other(small_run, start):
    trusted = ["--trusted-proxy", "127.0.0.1", "--trusted-proxy", "127.0.0.2"]
    url = start("--run", small_run, "--port", "0", *trusted).url()
    for address, scheme in (("127.0.0.1", "https"), ("127.0.0.2", "https"), ("127.0.0.3", "http")):
        transport = httpx.HTTPTransport(local_address=address)
        with httpx.Client(transport=transport, timeout=60) as client:
            answer = client.get(f"{url}/config", headers={"X-Forwarded-Proto": "https"})
        assert answer.json()["root"] == url.replace("http", scheme, 1), address
