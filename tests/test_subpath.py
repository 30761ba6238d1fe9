"""The page and the API below a sub-path, behind a proxy that removes the sub-path."""

import hashlib
import socket
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse

from clinora.serving.app import create_app
from tests.served import Person, running, running_server

ALICE = ("alice", "correct horse")
SUB_PATH = "/clinora"
NOTE = {"note": "Severe chest pain."}


class Proxy:
    """Does what nginx does for ``location /clinora/ { proxy_pass http://127.0.0.1:PORT/; }``.

    Attributes:
        port: The port of the service.
        outside: The paths that were requested outside of the sub-path.
    """

    def __init__(self):
        self.port = None
        self.outside = []
        self._client = httpx.AsyncClient(timeout=60)

    async def __call__(self, scope, receive, send):
        answer = await self._answer(Request(scope, receive))
        await answer(scope, receive, send)

    async def _answer(self, request):
        path = request.scope["raw_path"].decode()
        if path == SUB_PATH:
            return RedirectResponse(f"{SUB_PATH}/", 301)
        if not path.startswith(f"{SUB_PATH}/"):
            self.outside.append(path)
            return Response(status_code=204)
        url = f"http://127.0.0.1:{self.port}{path.removeprefix(SUB_PATH)}?{request.url.query}"
        headers = [(k, v) for k, v in request.headers.raw if k != b"connection"]
        body = await request.body()
        forwarded = self._client.build_request(request.method, url, headers=headers, content=body)
        answer = await self._client.send(forwarded, stream=True)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code)
        # The server of this proxy writes headers of the connection itself.
        own = (b"connection", b"transfer-encoding")
        raw = [(name.lower(), value) for name, value in answer.headers.raw]
        response.raw_headers = [(name, value) for name, value in raw if name not in own]
        return response


@contextmanager
def proxied(classifier, folder, monkeypatch, root):
    """Serve an app with a password below the sub-path; gives its address and the proxy.

    ``root`` is what GRADIO_ROOT_PATH holds, with ``{origin}`` for the origin of the proxy.
    """
    proxy = Proxy()
    config = uvicorn.Config(
        proxy, lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    salt = b"0123456789abcdef"
    name, password = ALICE
    users = {name: (salt, hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1))}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("GRADIO_ROOT_PATH", root.format(origin=origin))
        app = create_app(classifier, folder, users=users, trusted_proxies=["127.0.0.1"])
        with running(app) as proxy.port, running_server(server, listener):
            yield f"{origin}{SUB_PATH}", proxy


ROOTS = ["/clinora", "/clinora/", "{origin}/clinora", "{origin}/clinora/"]


@pytest.mark.parametrize("root", ROOTS)
def test_page_api_and_login_work_below_the_sub_path(classifier, tmp_path, monkeypatch, root):
    with proxied(classifier, tmp_path, monkeypatch, root) as (url, _):
        for path in ("/", "/config", "/theme.css", "/v1/classify"):
            assert httpx.get(f"{url}{path}").status_code == 401
        assert httpx.head(f"{url}/health").status_code == 200
        with httpx.Client(auth=ALICE, timeout=60) as client:
            answer = client.post(f"{url}/v1/classify", json=NOTE)
            assert answer.json()["label"] == classifier([NOTE["note"]])[0].label
            config = client.get(f"{url}/config")
            assert config.json()["root"] == url
            assert f"Path={SUB_PATH};" in f"{config.headers['Set-Cookie']};"
            assert client.get(f"{url}/theme.css").status_code == 200


def test_an_address_is_the_one_that_the_examples_of_the_page_show(
    classifier, tmp_path, monkeypatch
):
    monkeypatch.setenv("GRADIO_ROOT_PATH", "https://notes.example/clinora")
    client = TestClient(create_app(classifier, tmp_path), "http://127.0.0.1")
    assert "curl -s https://notes.example/clinora/v1/classify" in client.get("/config").text


@pytest.mark.parametrize("root", ["", "/"])
def test_without_a_sub_path_the_page_is_at_the_root(classifier, tmp_path, monkeypatch, root):
    monkeypatch.setenv("GRADIO_ROOT_PATH", root)
    client = TestClient(create_app(classifier, tmp_path), "http://127.0.0.1")
    answer = client.get("/")
    assert answer.status_code == 200
    assert "Path=/;" in f"{answer.headers['Set-Cookie']};"
    assert client.get("/config").json()["root"] == "http://127.0.0.1"


@pytest.mark.parametrize(
    "root",
    ["clinora", "notes.example/clinora", "//clinora", "/a b", "/a;b", "/a?b", "/a#b", "ftp://a/b",
     "https://", "https://alice@a/b", "/<script>", "/a\n"],
)  # fmt: skip
def test_a_root_that_is_neither_address_nor_path_is_refused(
    classifier, tmp_path, monkeypatch, root
):
    monkeypatch.setenv("GRADIO_ROOT_PATH", root)
    with pytest.raises(ValueError, match="GRADIO_ROOT_PATH"):
        create_app(classifier, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("root", ["/clinora", "{origin}/clinora"])
def test_a_person_uses_the_page_below_the_sub_path(
    chromium, classifier, tmp_path, monkeypatch, root
):
    """After login: assets, events, an upload and a download."""
    from playwright.sync_api import expect

    file = tmp_path / "notes.csv"
    file.write_text("transcription\nKnee pain.\n")
    credentials = dict(zip(("username", "password"), ALICE, strict=True))
    with proxied(classifier, tmp_path, monkeypatch, root) as (url, proxy):
        context = chromium.new_context(http_credentials=credentials)
        page = context.new_page()
        person = Person(page, url)
        assert page.url == f"{url}/"
        person.submit(NOTE["note"])
        expect(person.text).to_have_value(classifier([NOTE["note"]])[0].as_text())
        person.open("Many notes")
        person.choose_file(file)
        person.press("Classify all")
        page.get_by_role("cell", name="notes-classes.csv").wait_for()
        with page.expect_download() as download:
            page.locator("a[download]").last.click()
        assert classifier(["Knee pain."])[0].label in Path(download.value.path()).read_text()
        (cookie,) = context.cookies()
        context.close()
    assert cookie["path"] == SUB_PATH
    assert person.complaints == []
    assert set(person.strangers) <= {url}  # the redirect that adds the slash
    assert set(proxy.outside) <= {"/favicon.ico"}  # browsers ask for it at every host's root
