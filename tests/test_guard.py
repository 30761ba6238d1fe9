"""The checks that every request meets: its host, its origin, and the headers of its answer."""

import pytest


@pytest.mark.parametrize("path", ["/", "/gradio_api/info", "/nothing"])
def test_the_host_name_of_another_site_is_refused(client, path):
    assert client.get(path, headers={"Host": "evil.example"}).status_code == 400
    assert client.get(path, headers={"Host": "localhost:7860"}).status_code != 400


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/nothing"])
def test_every_answer_carries_the_policy(client, path):
    for headers in [{}, {"Host": "evil.example"}, {"Origin": "https://evil.example"}]:
        answer = client.get(path, headers=headers).headers
        policy = answer["Content-Security-Policy"]
        for part in ("default-src 'self'", "connect-src 'self'", "form-action 'self'"):
            assert part in policy
        assert "unsafe-eval" not in policy
        assert answer["X-Content-Type-Options"] == "nosniff"
        assert answer["Referrer-Policy"] == "no-referrer"
        assert (answer.get("Cache-Control") == "no-store") == (path != "/theme.css")


@pytest.mark.parametrize("path", ["/", "/health", "/config"])
def test_a_request_from_the_page_of_another_site_is_refused(client, path):
    for origin, status in (
        ("https://evil.example", 403), ("http://127.0.0.1:9", 403), ("null", 403),
        ("http://127.0.0.1", 200),
    ):  # fmt: skip
        assert client.get(path, headers={"Origin": origin}).status_code == status
