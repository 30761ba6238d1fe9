"""``clinora serve``: its options, its errors, and how its process starts and ends."""

import json
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request

import httpx
import pytest

import clinora
from clinora.commands import serve as serve_command
from clinora.serving.server import DEFAULT_LIMITS
from tests.checkpoint_files import edit_json
from tests.served import ROOT

# --- Options ---


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """The command's ``main``, in a new working directory; signal handlers are restored."""
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield serve_command.main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--run", "missing"], "there is no run missing"),
        (["--run", "{run}", "--base", "{run}"], "model.safetensors"),
        (["--run", "{run}", "--device", "abacus"], "device 'abacus'"),
        (["--run", "{run}", "--precision", "fp1"], "precision 'fp1'"),
        (["--port", "{taken}"], "in use"),
        (["--port", "99999"], "99999"),
        (["--host", "notes.example"], "--host notes.example"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0"),
        (["--host", "0.0.0.0", "--auth-file", "x"], "--allow-host"),
        (["--allow-host", "notes.example"], "--auth-file"),
        (["--allow-host", "*", "--auth-file", "x"], "--allow-host *"),
        (["--allow-host", "https://a", "--auth-file", "x"], "--allow-host https://a"),
        (["--auth-file", "missing"], "missing"),
        (["--adapter", "{run}"], "expected NAME=RUN"),
        (["--adapter", "two words={run}"], "--adapter two words="),
        (["--adapter", "a={run}", "--adapter", "a={run}"], "--adapter a="),
        (["--adapter", "a=missing"], "there is no run missing"),
        (["--run", "{run}", "--adapter", "a=bundled"], "trained on"),
        (["--trusted-proxy", "*"], "--trusted-proxy"),
        (["--rate-limit", "0"], "--rate-limit 0"),
        (["--run", "{run}", "--log", "missing/access.log"], "--log missing/access.log"),
        (["--run", "{run}", "--log", "."], "--log ."),
        (["--trusted-proxy", "10.0.0.1/8"], "10.0.0.1/8"),
        (["--trusted-proxy", "127.0.0.1", "--trusted-proxy", "a.example"], "a.example"),
    ],
)
def test_a_wrong_option_gives_a_message_of_one_line_and_status_2(
    serve, small_run, capsys, options, words
):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        values = {"run": small_run, "taken": listener.getsockname()[1]}
        options = [option.format(**values) for option in options]
        with pytest.raises(SystemExit) as ended:
            serve(["--port", "0", *options])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("clinora serve: ")
    assert words in err


def test_the_examples_of_a_service_use_options_that_exist():
    unit = (ROOT / "examples" / "clinora.service").read_text()
    (start,) = re.findall(r"^ExecStart=\S+ \S+serve\.py (.*)$", unit, re.MULTILINE)
    containerfile = (ROOT / "examples" / "Containerfile").read_text()
    (command,) = re.findall(r"^CMD (\[.*\])$", containerfile, re.MULTILINE)
    for words in (start.split(), json.loads(command)):
        args = serve_command.build_parser().parse_args(words)
        assert args.host == "0.0.0.0" and args.auth_file and args.allow_host
    seconds = int(re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[1])
    assert seconds > DEFAULT_LIMITS.shutdown_seconds


# --- The process ---


@pytest.mark.slow
def test_importing_the_command_prints_nothing_and_does_not_import_gradio():
    code = "import sys, clinora.commands.serve; print([m for m in sys.modules if 'gradio' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.slow
def test_a_missing_run_ends_the_process_with_one_line(start):
    served = start("--run", "missing", "--port", "0")
    assert served.process.wait(120) == 2
    assert served.read("out") == ""
    assert re.fullmatch(r"serve\.py: there is no run missing.*\n", served.read("err"))


@pytest.mark.slow
def test_a_request_chooses_one_of_the_adapters_that_are_served(small_run, start, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(small_run, other)
    edit_json(other / "clinora.json", labels=["v", "w", "x", "y", "z"])
    served = start("--run", small_run, "--adapter", f"other={other}", "--port", "0")
    url = f"{served.url()}/v1/classify"
    first = httpx.post(url, json={"note": "fever"}).json()
    second = httpx.post(url, json={"note": "fever", "adapter": "other"}).json()
    assert first["label"] in clinora.PUBLISHED_CLASSES
    assert second["label"] == "vwxyz"[first["predicted_class"]]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_the_process_cleanly_while_a_page_is_open(
    small_run, start, tmp_path, number, status
):
    served = start("--run", small_run, "--port", "0")
    cookie = {"Cookie": "clinora_visit=me"}
    heartbeat = urllib.request.Request(f"{served.url()}/gradio_api/heartbeat/one", headers=cookie)
    with urllib.request.urlopen(heartbeat) as stream:
        stream.readline()
        temporary = next(p for p in (tmp_path / "tmp").glob("clinora-*") if p.is_dir())
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
        assert served.end(number) == status
    assert served.read("err") == ""
    assert re.fullmatch(r"Clinora: http://127\.0\.0\.1:\d+\n", served.read("out"))
    assert not temporary.exists()


@pytest.mark.slow
def test_a_signal_ends_the_process_cleanly_while_it_starts(small_run, start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    served = start("--run", small_run, "--port", str(port))
    for _ in range(1200):
        time.sleep(0.05)
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            pass
    assert served.end() == 0
    assert (served.read("out"), served.read("err")) == ("", "")
