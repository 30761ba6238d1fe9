"""The checks that every request meets: its host, its origin, and the headers of its answer."""

import pytest
from fastapi.testclient import TestClient

from clinora.serving.app import create_app


@pytest.mark.parametrize("path", ["/", "/gradio_api/info", "/nothing"])
def test_the_host_name_of_another_site_is_refused(lasting_client, path):
    assert lasting_client.get(path, headers={"Host": "evil.example"}).status_code == 400
    assert lasting_client.get(path, headers={"Host": "localhost:7860"}).status_code != 400


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/nothing"])
def test_every_answer_carries_the_policy(lasting_client, path):
    for headers in [{}, {"Host": "evil.example"}, {"Origin": "https://evil.example"}]:
        answer = lasting_client.get(path, headers=headers).headers
        policy = answer["Content-Security-Policy"]
        for part in ("default-src 'self'", "connect-src 'self'", "form-action 'self'"):
            assert part in policy
        assert "unsafe-eval" not in policy
        assert answer["X-Content-Type-Options"] == "nosniff"
        assert answer["Referrer-Policy"] == "no-referrer"
        assert (answer.get("Cache-Control") == "no-store") == (path != "/theme.css")


@pytest.mark.parametrize("path", ["/", "/health", "/config"])
def test_a_request_from_the_page_of_another_site_is_refused(lasting_client, path):
    for origin, status in (
        ("https://evil.example", 403), ("http://127.0.0.1:9", 403), ("null", 403),
        ("http://127.0.0.1", 200),
    ):  # fmt: skip
        assert lasting_client.get(path, headers={"Origin": origin}).status_code == status


# What the browser is at, and the Host header that a proxy makes of it.
CHANGED_HOSTS = {
    "nginx's $host drops the port": ("https://notes.example:8443", "notes.example"),
    "nginx by default": ("https://notes.example", "127.0.0.1:7860"),
    "$host:$server_port": ("https://notes.example", "notes.example:443"),
}


@pytest.mark.parametrize(("origin", "host"), CHANGED_HOSTS.values(), ids=CHANGED_HOSTS)
def test_a_host_that_a_proxy_has_changed_is_explained(classifier, tmp_path, origin, host):
    app = create_app(classifier, tmp_path, hosts=["notes.example"], trusted_proxies=["127.0.0.1"])
    client = TestClient(app, "http://127.0.0.1", client=("127.0.0.1", 5000))
    headers = {"Origin": origin, "Host": host}
    reported = {"X-Forwarded-Host": origin.removeprefix("https://"), "X-Forwarded-Port": "8443"}
    for more in ({}, reported, {"Forwarded": f"host={reported['X-Forwarded-Host']}"}):
        answer = client.post("/v1/classify", json={"note": "fever"}, headers=headers | more)
        assert answer.status_code == 403
        for word in (origin, host, "Origin", "Host"):
            assert word in answer.json()["detail"]
    headers["Host"] = origin.removeprefix("https://")
    assert client.get("/health", headers=headers).status_code == 200
