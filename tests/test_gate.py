"""What is open, and that nothing else is: routes, events, inputs, and the files of a visit."""

import asyncio
import itertools
import json
import os
import re
import secrets
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gradio
import httpx
import psutil
import pytest
from fastapi.testclient import TestClient
from starlette.routing import Mount

import clinora
from clinora.serving import answering, gate, storage
from clinora.serving.app import create_app
from clinora.serving.flags import Flags
from clinora.serving.guard import MOST_BODY_BYTES, MOST_FILE_BYTES
from clinora.serving.words import EXAMPLES
from tests.served import CANARY, ENDLESS_LESSON, ROOT, Person, call, join, run_async
from tests.served import running as served_from_a_thread

TABLE = b"transcription\nKnee pain for two days.\n"
# Every route of the Gradio that was looked at. What a later one adds stays closed; here it shows.
KNOWN_ROUTES = (ROOT / "tests" / "gradio_routes.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def classifier(small_run):
    return clinora.Classifier.load(small_run)


@pytest.fixture(scope="module")
def flags_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gate") / "flagged"


@pytest.fixture(scope="module")
def app(classifier, flags_folder):
    return create_app(classifier, flags_folder)


@pytest.fixture(scope="module")
def running(app):
    with TestClient(app, "http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(running):
    """Somebody who has not visited yet."""
    running.cookies.clear()
    return running


def upload(client, content=TABLE, name="notes.csv"):
    client.get("/config")  # brings the visit's cookie
    answer = client.post("/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def file_data(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


# --- Routes ---


def routes_of(router):
    """List the routes of an app and of those inside it, as "METHOD path"."""
    for route in router.routes:
        if isinstance(route, Mount):
            yield from routes_of(route.app)
        elif hasattr(route, "effective_route_contexts"):  # of a router that was included
            for inner in route.effective_route_contexts():
                yield from (f"{method} {inner.path}" for method in inner.methods)
        else:
            yield from (f"{method} {route.path}" for method in route.methods or ["ANY"])


def test_gradio_has_no_route_that_was_not_looked_at(app):
    """A new one is closed; whoever updates Gradio decides whether the page needs it."""
    assert sorted(set(routes_of(app.state.gradio))) == KNOWN_ROUTES


def test_of_gradios_routes_those_alone_are_open_that_the_page_uses(app, client):
    open_routes = set(routes_of(app))
    fill = {"path": "x", "session": "one", "session_hash": "one", "api_name": "predict"}
    for route in KNOWN_ROUTES:
        method, path = route.split(" ")
        path = re.sub(r"\{(\w+)(:path)?\}", lambda m: fill.get(m[1], "x"), path)
        is_open = any(
            method == open_route.split(" ")[0]
            and re.fullmatch(re.sub(r"\{[^}]*\}", ".*", open_route.split(" ")[1]), path)
            for open_route in open_routes
        )
        if not is_open:
            answer = client.request("GET" if method == "ANY" else method, path)
            assert answer.status_code in (404, 405), route


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/dev/reload",
        "/gradio_api/deep_link",
        "/gradio_api/info",
        "/gradio_api/call/predict",
        "/gradio_api/run/predict",
        "/gradio_api/proxy=https://example.com/x",
        "/gradio_api/file/https://example.com/x",
        "/gradio_api/component_server",
        "/gradio_api/mcp",
        "/monitoring",
        "/redoc",
        "/docs/oauth2-redirect",
    ],
)
def test_what_was_used_against_it_is_closed(client, path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up a name"))
    assert client.get(path).status_code == 404
    assert client.post(path, json={"data": ["fever"]}).status_code == 404


@pytest.mark.parametrize("path", ["/config%0a", "/%0a", "/assets/" + "x" * 5_000, "/static/a%00"])
def test_a_path_that_no_file_can_have_does_not_exist(client, path, caplog):
    assert client.get(path).status_code == 404
    assert caplog.messages == []


def test_a_post_route_answers_get_with_405(client):
    for path in ("/gradio_api/queue/join", "/gradio_api/upload", "/v1/classify"):
        assert client.get(path).status_code == 405
    assert client.post("/").status_code == 405


def test_optional_parts_of_gradio_are_off_whatever_the_environment_says(
    classifier, tmp_path, monkeypatch, capfd
):
    for name in ("GRADIO_RUN_HISTORY", "GRADIO_MCP_SERVER", "GRADIO_SSR_MODE"):
        monkeypatch.setenv(name, "True")
    # To render pages on the server, Gradio would start Node; for MCP, it would import this module.
    monkeypatch.setenv("GRADIO_NODE_PATH", str(tmp_path / "there is no Node here"))
    mcp_was_imported = tmp_path / "mcp_was_imported"
    (tmp_path / "mcp.py").write_text(f"open({str(mcp_was_imported)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        config = client.get("/config").json()
    assert config["footer_links"] == []
    for name in ("analytics_enabled", "run_history", "mcp_server"):
        assert config[name] is False
    assert capfd.readouterr() == ("", "")  # Gradio prints a message when it cannot start Node
    assert not mcp_was_imported.exists()


@pytest.mark.slow
def test_the_service_listens_on_the_loopback_address_alone(served):
    sockets = psutil.Process(served.process.pid).net_connections()
    listening = [s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_the_query_of_a_page_reaches_nothing(client):
    """Gradio's deep link would read a file that anybody may have stored."""
    expected = re.sub(r"\d+\.\d+", "", client.get("/").text)
    assert re.sub(r"\d+\.\d+", "", client.get("/?deep_link=abc&x=y").text) == expected


# --- Events ---


def test_the_page_has_the_events_that_are_open_and_no_other(app):
    names = [event.api_name for event in app.state.gradio.get_blocks().fns.values()]
    assert sorted(names) == sorted(gate.EVENTS)


def test_an_unknown_event_does_not_exist(client):
    client.get("/")
    for number in (99, -1, 10**30):
        body = {"fn_index": number, "session_hash": "one", "data": []}
        assert client.post("/gradio_api/queue/join", json=body).status_code in (404, 422)


def test_an_event_that_is_not_listed_cannot_be_called(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "EVENTS", tuple(set(gate.EVENTS) - {"flag"}))
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        assert join(client, "flag", "fever", None, False, "Other", session="one").status_code == 404
        assert call(client, "predict", "fever", None)[0] == "complete"


def test_without_a_visit_nothing_can_be_asked_of_the_page(client):
    body = {"fn_index": 0, "session_hash": "one", "data": [0]}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 403
    assert client.post("/gradio_api/upload", files={"files": ("a", TABLE)}).status_code == 403
    for path in ("queue/data?session_hash=one", "heartbeat/one", "file=/etc/passwd"):
        assert client.get(f"/gradio_api/{path}").status_code == 403


def test_another_visit_cannot_read_the_events_of_this_one(app, client):
    assert join(client, "predict", CANARY, None, session="one").status_code == 200
    other = TestClient(app, "http://127.0.0.1")
    other.get("/")
    assert CANARY not in other.get("/gradio_api/queue/data?session_hash=one").text
    told = client.get("/gradio_api/queue/data?session_hash=one").text
    assert CANARY in told


def test_a_visit_is_known_by_a_cookie_that_scripts_and_other_sites_do_not_get(app):
    client = TestClient(app, "https://127.0.0.1")
    (cookie,) = client.get("/").headers.get_list("set-cookie")
    assert "set-cookie" not in client.get("/").headers
    value = re.match(r"clinora_visit=([\w-]+);", cookie)[1]
    assert len(value) >= 22  # 128 bits
    for word in ("HttpOnly", "SameSite=Lax", "Secure", "Path=/"):
        assert word in cookie
    assert "Secure" not in TestClient(app, "http://127.0.0.1").get("/").headers["set-cookie"]


@pytest.mark.slow
def test_a_link_on_another_site_does_not_end_the_visit(chromium, served):
    context = chromium.new_context()
    page = context.new_page()
    page.goto(served.url())
    visit = context.cookies()
    elsewhere = "http://elsewhere.example/"
    link = f'<a href="{served.url()}/">the classifier</a>'
    context.route(elsewhere, lambda route: route.fulfill(content_type="text/html", body=link))
    page.goto(elsewhere)
    page.get_by_text("the classifier").click()
    page.wait_for_url(f"{served.url()}/")
    page.locator("#note textarea").wait_for()  # closing a page that is loading may never end
    assert context.cookies() == visit
    context.close()


@pytest.mark.parametrize("value", [b"", b'"a"', b"\xff", b"a b", b"x" * 65, b'"' + b"\\" * 2_000])
def test_a_cookie_that_is_no_visits_is_none(client, value):
    headers = {"Cookie": b"clinora_visit=" + value}
    answer = client.get("/gradio_api/queue/data?session_hash=one", headers=headers)
    assert answer.status_code == 403
    assert "set-cookie" in client.get("/", headers=headers).headers


def test_cookies_and_passwords_do_not_reach_gradio():
    """Reading the cookies takes the standard library seconds if they are made for that."""
    seen = []

    async def gradio_app(scope, _receive, _send):
        seen.extend(name for name, _ in scope["headers"])

    async def not_called(*_):
        raise AssertionError

    headers = [(b"host", b"x"), (b"cookie", b"a=b"), (b"authorization", b"c"), (b"cookie", b"d=e")]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    run_async(gate.Forward(gradio_app)(scope, not_called, not_called))
    assert seen == [b"host"]


# --- Inputs ---

BAD = {
    gradio.Textbox: [1, True, ["x"], {"path": "/etc/passwd"}, "x" * 250_001],
    gradio.Checkbox: [None, 1, "true", []],
    gradio.Slider: [None, True, "3", -1, 1e9, float("nan"), float("inf"), [1]],
    gradio.Radio: ["another", 1, ["Other"], ""],
    gradio.CheckboxGroup: [None, "q_proj", ["another"], ["q_proj", "q_proj"], [["q_proj"]]],
    gradio.Dropdown: [1, True, {"x": 1}, "x" * 201, ["x", "x"], ["x" * 201], [["x"]], [None]],
    gradio.File: ["/etc/passwd", ["/etc/passwd"], {"path": ["/etc/passwd"]}, {}],
    gradio.Dataset: [-1, len(EXAMPLES), 0.0, True, None, "0"],
}
GOOD = {
    gradio.Textbox: [None, "", "fever", "x" * 250_000],
    gradio.Checkbox: [True, False],
    gradio.Slider: [1, 1.0],
    gradio.Radio: [None, "Other"],
    gradio.CheckboxGroup: [[], ["q_proj"], ["q_proj", "v_proj"]],
    gradio.Dropdown: [None],
    gradio.File: [None],
    gradio.Dataset: [0, len(EXAMPLES) - 1],
}


def inputs_of(app):
    """Give every input of every open event: (number of the event, event, place of the input)."""
    for number, event in app.state.gradio.get_blocks().fns.items():
        for place in range(len(event.inputs)):
            yield number, event, place


def ask(client, number, data):
    body = {"fn_index": number, "session_hash": secrets.token_hex(4), "data": data}
    content = json.dumps(body)
    headers = {"Content-Type": "application/json"}
    return client.post("/gradio_api/queue/join", content=content, headers=headers)


def test_each_input_takes_what_its_component_may_hold_and_nothing_else(app, client, monkeypatch):
    monkeypatch.setattr(gate, "Forward", lambda *_, **__: gate.PlainTextResponse("passed"))
    client.cookies[gate.VISIT_COOKIE] = "me"
    for number, event, place in inputs_of(app):
        good = [GOOD.get(type(component), [None])[0] for component in event.inputs]
        kind = type(event.inputs[place])
        accepted = GOOD.get(kind, [])
        if kind is gradio.Radio:
            accepted = [None, event.inputs[place].choices[0][1]]
        for values, status in ((BAD.get(kind, []), 422), (accepted, 200)):
            for value in values:
                data = [*good[:place], value, *good[place + 1 :]]
                answer = ask(client, number, data)
                assert answer.status_code == status, (event.api_name, kind, value)


def test_a_list_that_is_fixed_takes_its_choices_alone(app, client, monkeypatch):
    """The lists of a file's columns begin empty; this one has the names of the layers."""
    monkeypatch.setattr(gate, "Forward", lambda *_, **__: gate.PlainTextResponse("passed"))
    client.cookies[gate.VISIT_COOKIE] = "me"
    names = {event.api_name: number for number, event, _ in inputs_of(app)}
    layer = "model.layers.1.self_attn.q_proj"
    for value, status in ((layer, 200), ("model.layers.9.self_attn.q_proj", 422), ([layer], 422)):
        assert ask(client, names["show_weights"], [value, None]).status_code == status


def test_a_state_never_comes_from_the_browser(client):
    assert call(client, "predict", "fever", None)[0] == "complete"
    made_up = {"label": CANARY, "sha256": "0" * 64}
    assert call(client, "flag", "fever", made_up, False, "Other", session="two")[0] == "error"


def test_too_few_or_too_many_inputs_are_refused(client):
    for data in ([], ["fever"], ["fever", None, None]):
        assert join(client, "predict", *data, session="one").status_code == 422


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"null",
        b"[" * 100_000,
        b'{"fn_index": 1, "session_hash": "one", "data": ' + b"[" * 100_000,
        b'{"fn_index": 1, "session_hash": "../one", "data": ["fever"]}',
        b'{"fn_index": "predict", "session_hash": "one", "data": ["fever"]}',
        b'{"fn_index": 1, "session_hash": "one", "data": {"0": "fever"}}',
    ],
    ids=["empty", "bytes", "null", "nested", "nested data", "session", "name", "object"],
)
def test_what_is_no_event_is_told_what_was_expected(client, content):
    client.get("/")
    answer = client.post("/gradio_api/queue/join", content=content)
    assert answer.status_code == 422
    assert set(answer.json()) == {"detail"}


def test_an_input_without_a_check_stops_the_service_from_starting(tmp_path, classifier):
    with gradio.Blocks() as page:
        code = gradio.Code()
        code.change(lambda x: x, code, None, api_name=gate.EVENTS[0])
    with pytest.raises(ValueError, match="no check for the input"):
        gate.open_events(page)


def body_of(size):
    start, end = b'{"fn_index":0,"session_hash":"', b'","data":[0]}'
    return start + b"x" * (size - len(start) - len(end)) + end


def test_a_body_beyond_the_limit_is_refused(client):
    client.get("/")
    for size, status in [(MOST_BODY_BYTES, 422), (MOST_BODY_BYTES + 1, 413)]:
        answer = client.post("/gradio_api/queue/join", content=body_of(size))
        assert answer.status_code == status


@pytest.mark.slow
def test_a_body_in_chunks_beyond_the_limit_is_refused(served):
    """No Content-Length tells its size beforehand."""
    for size, status in [(MOST_BODY_BYTES, 422), (MOST_BODY_BYTES + 1, 413)]:
        body = body_of(size)
        chunks = (body[i : i + 200_000] for i in range(0, size, 200_000))
        with httpx.Client(base_url=served.url()) as client:
            client.get("/config")
            assert client.post("/gradio_api/queue/join", content=chunks).status_code == status


# --- Files ---


@pytest.mark.slow
def test_no_event_copies_a_file_or_gives_one_out(served, tmp_path):
    """Every open event, every input, and every file that is not this visit's own upload."""
    secret = tmp_path / "secret.csv"
    secret.write_text(f"transcription\n{CANARY} knee pain\n")
    scratch = served.folder / "tmp"
    own, other = (httpx.Client(base_url=served.url(), timeout=60) for _ in range(2))
    anothers = upload(other)
    mine = upload(own)
    link = Path(mine).with_name("link.csv")
    link.symlink_to(secret)
    paths = [secret, tmp_path, link, "https://127.0.0.1/secret.csv", f"file://{secret}", anothers]
    paths += [f"{mine}/../link.csv", Path(mine).parent, served.folder / "err"]
    config = own.get("/config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    good = {"textbox": "fever", "slider": 1, "checkbox": False, "checkboxgroup": [], "dataset": 0}
    for event, path in itertools.product(config["dependencies"], paths):
        for place, component in enumerate(event["inputs"]):
            data = [good.get(kinds[i]) for i in event["inputs"]]
            data[place] = file_data(path)
            session = secrets.token_hex(4)
            body = {"fn_index": event["id"], "session_hash": session, "data": data}
            answer = own.post("/gradio_api/queue/join", json=body)
            if kinds[component] != "state":
                assert answer.status_code == 422, (event["api_name"], path)
            elif answer.status_code == 200:  # what comes for a state is put aside
                params = {"session_hash": session}
                assert CANARY not in own.get("/gradio_api/queue/data", params=params).text
        answer = own.get(f"/gradio_api/file={path}")
        assert answer.status_code == 404
    link.unlink()
    files = [file for file in scratch.rglob("*") if file.is_file()]
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []
    assert own.get(f"/gradio_api/file={mine}").content == TABLE


def test_a_visit_reads_its_own_files_alone(app, client):
    path = upload(client)
    answer = client.get(f"/gradio_api/file={path}")
    assert answer.content == TABLE
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    other = TestClient(app, "http://127.0.0.1")
    other.get("/")
    assert other.get(f"/gradio_api/file={path}").status_code == 404
    assert call(other, "classify_file", None, "x", [])[0] == "error"
    answer = join(other, "classify_file", file_data(path), "transcription", [], session="one")
    assert answer.status_code == 422


def test_no_file_of_this_machine_is_served(client, flags_folder):
    Flags(flags_folder).add({})
    client.get("/")
    for file in ("/etc/passwd", flags_folder / "flags.jsonl", ROOT / "serve.py"):
        assert client.get(f"/gradio_api/file={file}").status_code == 404
        assert client.get(f"/static/{file}").status_code in (403, 404)
        assert client.get(f"/assets/..%2f..%2f{file}").status_code in (403, 404)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"", b"transcription\n", b"transcription\n" + b"x\n" * 2_001],
    ids=["binary", "empty", "no rows", "too many rows"],
)
def test_a_file_that_the_page_cannot_read_is_refused_and_not_kept(client, content):
    client.get("/")
    folder = Path(upload(client)).parents[1]
    kept = set(folder.rglob("*"))
    answer = client.post("/gradio_api/upload", files={"files": ("notes.csv", content)})
    assert answer.status_code == 422
    assert set(folder.rglob("*")) == kept


def test_an_upload_that_is_no_file_is_refused(client):
    client.get("/")
    url = "/gradio_api/upload"
    assert client.post(url, content=b"x").status_code == 422
    assert client.post(url, data={"files": "x"}).status_code in (400, 422)
    two = [("files", ("a.csv", TABLE)), ("files", ("b.csv", TABLE))]
    assert client.post(url, files=two).status_code == 400
    too_large = {"files": ("notes.csv", b"x" * (MOST_FILE_BYTES + 20_000))}
    assert client.post(url, files=too_large).status_code == 413


@pytest.mark.parametrize("charset", ["undefined", "punycode"])
def test_a_form_that_cannot_be_decoded_is_refused(client, charset):
    client.get("/")
    form = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a-9b"\r\n\r\nx\r\n--B--'
    headers = {"Content-Type": f"multipart/form-data; boundary=B; charset={charset}"}
    answer = client.post("/gradio_api/upload", content=form, headers=headers)
    assert answer.status_code == 422


def test_uploads_of_several_addresses_are_read_one_at_a_time(app, monkeypatch):
    running, most = 0, 0

    def read_slowly(_content):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.1)
        running -= 1

    monkeypatch.setattr(gate, "check_in_subprocess", read_slowly)

    async def upload_from(address):
        transport = httpx.ASGITransport(app, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/config")
            return await client.post("/gradio_api/upload", files={"files": ("a", TABLE)})

    async def upload_from_all():
        return await asyncio.gather(*(upload_from(f"192.0.2.{i}") for i in range(4)))

    answers = run_async(upload_from_all())
    assert [answer.status_code for answer in answers] == [200] * 4
    assert most == 1


@pytest.mark.parametrize(
    "name", ["../../x.csv", "/etc/passwd", "a\0b", "", ".", "x" * 300, "é\u202e", "患" * 300]
)
def test_a_file_stays_in_its_folder_whatever_its_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = storage.Storage()
    stored = files.add(storage.Owner("visit", "address"), name, TABLE)
    assert stored.path.parent.parent == files.folder
    assert stored.path.read_bytes() == TABLE
    files.close()


def test_what_is_stored_is_bounded_for_a_visit_and_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "MOST_BYTES_OF_A_VISIT", 100)
    monkeypatch.setattr(storage, "MOST_BYTES", 250)
    monkeypatch.setattr(storage, "LEAST_BYTES_OF_A_FILE", 1)
    files = storage.Storage()
    first = files.add(storage.Owner("one", "quiet"), "a", b"x" * 60)
    assert files.find(str(first.path), "one")
    second = files.add(storage.Owner("one", "quiet"), "b", b"x" * 60)
    assert not first.path.exists() and files.find(str(first.path), "one") is None
    greedy = [files.add(storage.Owner(f"g{i}", "greedy"), "c", b"x" * 60) for i in range(8)]
    assert second.path.exists()  # a greedy address loses its own files, not another's
    assert [file.path.exists() for file in greedy] == [False] * 5 + [True] * 3
    files.close()
    assert list(tmp_path.iterdir()) == []


def test_tiny_files_stored_before_large_ones_are_no_way_round_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = storage.Storage()
    owner = storage.Owner("one", "address")
    for size in [1] * 500 + [storage.MOST_BYTES_OF_A_VISIT // 3] * 10:
        files.add(owner, "a", b"x" * size)
    left = [file for file in files.folder.rglob("*") if file.is_file()]
    assert len(left) == 3
    assert sum(file.stat().st_size for file in left) <= storage.MOST_BYTES_OF_A_VISIT
    files.close()


def test_the_number_of_tiny_files_is_bounded(tmp_path, monkeypatch):
    """Each takes a folder and an entry of the file system's table."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = storage.Storage()
    for _ in range(600):
        files.add(storage.Owner("one", "address"), "a", b"x")
    assert len(list(files.folder.iterdir())) <= 500
    files.close()


def test_a_file_that_cannot_be_written_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = storage.Storage()

    def fail(*_):
        raise OSError

    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError):
            files.add(storage.Owner("one", "address"), "a", b"x")
    assert list(files.folder.iterdir()) == []
    files.close()


def test_old_files_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    now = time.monotonic()
    files = storage.Storage()
    old = files.add(storage.Owner("one", ""), "a", TABLE)
    later = SimpleNamespace(monotonic=lambda: now + storage.KEPT_SECONDS + 60)
    monkeypatch.setattr(storage, "time", later)  # in that module alone: servers run beside it
    new = files.add(storage.Owner("one", ""), "b", TABLE)
    files.remove_old()
    assert not old.path.exists() and new.path.exists()
    files.close()


def test_the_folder_is_its_owners_alone_and_ends_with_the_app(classifier, tmp_path):
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1") as client:
        path = Path(upload(client))
        assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
        path.with_name("folder.csv").mkdir()  # a folder in place of a file
    assert not path.parents[1].exists()


# Keeps a file as a server does, until it is killed.
KEEP_A_FILE = """
import time
from clinora.serving.storage import Owner, Storage

print(Storage().add(Owner("visit", "address"), "notes.csv", b"knee pain").path, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_servers_folder_is_removed_by_the_next_and_no_others(
    classifier, served, tmp_path, monkeypatch
):
    """One server is killed, another runs; a third, starting, removes the killed one's folder."""
    temporary = served.folder / "tmp"
    with httpx.Client(base_url=served.url()) as client:
        living = Path(upload(client)).parents[1]
    keeping = subprocess.Popen(
        [sys.executable, "-c", KEEP_A_FILE], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    with keeping:
        killed = Path(keeping.stdout.readline().strip()).parents[1]
        keeping.kill()
    assert killed.parent == living.parent == temporary
    assert killed.exists()
    not_ours = killed.with_name(f"{storage.PREFIX}file")
    not_ours.write_text("a file, no folder")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with TestClient(create_app(classifier, tmp_path), "http://127.0.0.1"):
        assert not killed.exists()
        assert living.exists() and not_ours.exists()


def test_the_pages_content_is_not_written_to_a_file(client):
    folder = Path(upload(client)).parents[1]
    call(client, "predict", CANARY, None)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


# --- The page uses what is open ---


@pytest.mark.slow
def test_the_page_uses_every_open_route_and_event_and_no_other(
    chromium, classifier, tmp_path, monkeypatch
):
    """A person uses every control; then the server is started anew under the open page."""
    from playwright.sync_api import expect

    monkeypatch.setattr(answering, "MOST_PARAMETERS", 100)  # explanations on request
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    used, events = set(), set()

    def look(request):
        path = request.url.removeprefix(url).partition("?")[0]
        if request.url.startswith(url):
            used.add(f"{request.method} {path}")
        if path.endswith("queue/join"):
            events.add(request.post_data_json["fn_index"])

    page.on("request", look)
    app = create_app(classifier, tmp_path)
    app.state.lessons.command = [sys.executable, "-c", ENDLESS_LESSON]
    with served_from_a_thread(app) as port:
        url = f"http://127.0.0.1:{port}"
        person = Person(page, url)
        config = httpx.get(f"{url}/config").json()
        names = {event["id"]: event["api_name"] for event in config["dependencies"]}
        downloaded = use_every_control(person, tmp_path)
    used.add(f"GET {downloaded.removeprefix(url)}")  # a download is no request of the page
    assert {names[number] for number in events} == set(gate.EVENTS)

    person.submit("fever")  # the page finds that nobody answers, and asks until somebody does
    again = create_app(classifier, tmp_path)
    with served_from_a_thread(again, port=port):
        expect(person.note).to_have_value("", timeout=60_000)  # the page has reloaded itself
        person.wait_until_open()  # closing a page that is loading may never end
        person.submit("cough")
        expect(person.text).to_have_value(re.compile("Predicted Label"))
        context.close()
    open_routes = {
        route for route in routes_of(again) if not route.startswith("HEAD") and "/v1/" not in route
    } - {"GET /health", "GET /ready", "GET /metrics", "GET /openapi.json", "GET /docs"}
    patterns = {route: re.sub(r"\{[^}]*\}", ".+", route) for route in open_routes}
    used.add("GET /favicon.ico")  # a browser asks for it by itself; its tools do not show that
    used.add("GET /config")  # the same as in "/", for programs that use the page's protocol
    for route, pattern in patterns.items():
        assert any(re.fullmatch(pattern, request) for request in used), f"not used: {route}"
    for request in used:
        assert any(re.fullmatch(p, request) for p in patterns.values()), f"not open: {request}"


def use_every_control(person, tmp_path):
    from playwright.sync_api import expect

    page = person.page
    person.press("Submit")  # an empty note fails
    page.get_by_text("Enter a clinical note first").first.wait_for()
    page.locator("#examples").get_by_role("button").first.click()
    expect(person.note).to_have_value(EXAMPLES[0])
    person.press("Submit")
    expect(person.text).to_have_value(re.compile("Predicted Label"))
    person.press("Explain this answer")
    expect(person.explanation).to_contain_text("percentage points")
    person.choose_reason("Other")
    person.press("Flag")
    page.get_by_text("The prediction was flagged").first.wait_for()
    person.press("Clear")
    expect(person.text).to_have_value("")
    person.press("Undo")
    expect(person.text).to_have_value(re.compile("Predicted Label"))
    page.get_by_role("button", name="The last ten notes").click()
    person.press("Make a CSV file")
    page.get_by_role("cell", name="last-notes.csv").wait_for()

    person.open("LoRA internals")
    table = page.get_by_role("grid", name="What LoRA would train")
    before = table.inner_text()
    page.get_by_role("slider", name="Rank r").focus()
    page.keyboard.press("ArrowRight")
    expect(table).not_to_have_text(before, use_inner_text=True)
    before = table.inner_text()
    page.get_by_role("checkbox", name="k_proj").check()
    expect(table).not_to_have_text(before, use_inner_text=True)
    person.press("Train 20 steps")
    page.get_by_text("Step 1 of 20").wait_for()
    person.press("Stop")
    page.get_by_text("Stopped. Step 1 of 20").wait_for()
    expect(page.locator("img")).to_have_count(11)  # two of the lesson
    page.get_by_role("radio", name="1", exact=True).check()
    page.get_by_text("Rank 1:").wait_for()
    page.get_by_label("Layer whose matrices").click()
    page.get_by_role("option", name="model.layers.1.self_attn.v_proj").click()
    page.get_by_role("slider", name="Strength").focus()
    page.keyboard.press("Home")
    person.press("Compare strengths")
    person.press("Show attention")
    for slider in ("Layer of the attention", "Head"):
        page.get_by_role("slider", name=slider).focus()
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowRight")
    person.press("Merge and compare")
    page.get_by_text("Largest difference of a probability").wait_for()

    person.open("Many notes")
    file = tmp_path / "notes.csv"
    file.write_text("id,label,transcription\n1,2,fever\n")
    person.choose_file(file)
    page.get_by_label("Clear").click()
    expect(page.get_by_label("Column of the notes")).to_have_value("")
    person.choose_file(file)
    expect(page.get_by_label("Column of the notes")).to_have_value("transcription")
    person.choose_column("Columns to keep", "label")
    person.press("Classify all")
    page.get_by_text("cannot be kept").first.wait_for()
    page.get_by_label("Columns to keep").press("Backspace")
    person.press("Classify all")
    page.get_by_role("cell", name="notes-classes.csv").wait_for()
    with page.expect_download() as download:
        page.locator("a[download]").last.click()
    for tab in ("API", "Model card", "Classify"):
        person.open(tab)
    return download.value.url
