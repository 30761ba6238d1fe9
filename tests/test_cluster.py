"""Scoring with Ray and with Spark: the results of ``clinora predict``, and nothing left behind."""

import csv
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest

import clinora
from clinora.cluster import environment, share_cpus
from clinora.commands import predict as command
from clinora.predict import Part, encode_part, score_part
from tests.conftest import lacking

ROOT = Path(__file__).parents[1]
CANARY = "Zebrafish-4711"
ROWS = 4_500  # of short notes: three parts
TOLERANCE = 1e-3  # of a confidence
FP32 = ("--precision", "fp32")  # with bfloat16, results depend on the batch


def machine(cpus: float, gpus: float = 0) -> dict:
    return {"Resources": {"CPU": cpus, "GPU": gpus, "memory": 1e9}, "Alive": True}


# --- without Ray ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cpus", [(1,), (2,), (7,), (16,), (8, 8), (16, 4), (1, 2, 3), (64, 5, 5)])
def test_the_actors_fit_on_the_machines_and_one_more_cpu_each_would_not(cpus):
    def fit(each: int) -> int:
        return sum(int(count / each) for count in cpus)

    for actors in range(1, sum(cpus) + 1):
        each = share_cpus([machine(count) for count in cpus], actors, 0)
        assert fit(each) >= actors > fit(each + 1)
    with pytest.raises(ValueError, match=f"Ray has {sum(cpus)} CPUs"):
        share_cpus([machine(count) for count in cpus], sum(cpus) + 1, 0)


@pytest.mark.parametrize(
    ("machines", "share", "room"),
    [
        ([machine(8)], 1, 0),
        ([machine(8, 1), machine(8, 2)], 1, 3),
        ([machine(8, 2)], 0.5, 4),
        ([machine(8, 2)], 0.4, 4),  # an actor is on one GPU
        ([machine(8, 1)], 0.1, 8),  # each needs a CPU, too
        ([machine(2, 4), machine(64)], 1, 2),
    ],
)
def test_actors_with_gpus_are_as_many_as_the_gpus_and_cpus_of_a_machine(machines, share, room):
    for actors in range(1, room + 1):
        assert share_cpus(machines, actors, share) == 1
    with pytest.raises(ValueError, match=f"enough for {room} actors"):
        share_cpus(machines, room + 1, share)


def test_a_part_has_a_result_for_each_row(classifier, tmp_path):
    texts = ["Severe chest pain.", None, "", "Fracture of the knee.", 12.0]
    wrong = [None, "has 1 field, the header has 2", None, None, None]
    kept = {"id": ["007", None, "8", None, "9"]}
    part = Part(tmp_path / "part", [11, 12, 13, 14, 15], texts, kept, wrong, 0.5)
    scored = score_part(classifier, part, encode_part(classifier, part))
    columns = scored.columns
    assert (scored.path, scored.rows, scored.share_read) == (part.path, 5, 0.5)
    assert columns["row"] == [11, 12, 13, 14, 15]
    assert columns["id"] == kept["id"]
    error = "the row has 1 field, the header has 2"
    assert columns["error"] == [None, error, "the note is empty", None, None]
    for i, text in ((0, texts[0]), (3, texts[3]), (4, "12")):
        (expected,) = classifier([text])
        assert columns["label"][i] == expected.label
        assert columns["tokens"][i] == expected.tokens
        assert columns["truncated"][i] is expected.truncated
    for i in (1, 2):
        assert {columns[name][i] for name in ("label", "confidence", "refer", "tokens")} == {None}


def test_a_part_whose_results_are_there_is_not_scored(tmp_path):
    part = Part(tmp_path / "part", [1, 2], None, {}, [None, None], 1.0)
    scored = score_part(None, part, encode_part(None, part))
    assert (scored.rows, scored.columns) == (2, None)


def test_the_environment_is_as_before_also_after_an_error(monkeypatch):
    monkeypatch.setenv("CLINORA_ONE", "1")
    before = dict(os.environ)
    with pytest.raises(KeyError), environment({"CLINORA_ONE": "2", "CLINORA_TWO": "2"}):
        assert os.environ["CLINORA_ONE"] == os.environ["CLINORA_TWO"] == "2"
        os.environ["CLINORA_THREE"] = "3"  # as a library may
        raise KeyError
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", "2"], "--actors: only with --engine ray"),
        (["--actors", "1", "--gpus-per-actor", "0"], "--actors and --gpus-per-actor: only with"),
        (["--engine", "ray", "--actors", "0"], "0 actors: expected at least 1"),
        (["--engine", "ray", "--gpus-per-actor", "2"], "2 GPUs for each actor: expected 0"),
        (["--engine", "ray", "--gpus-per-actor", "-1"], "-1 GPUs for each actor: expected 0"),
        (["--engine", "ray", "--device", "cuda"], "--device: not with --engine ray"),
        (["--engine", "ray"], r"pip install 'clinora\[cluster\]'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    options, message, small_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    (tmp_path / "notes.csv").write_text("transcription\nfever\n")
    files = ["--run", small_run, "--notes", tmp_path / "notes.csv", "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as caught:
        command.main([str(word) for word in (*files, *options)], "clinora predict")
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


# --- with Ray, started here -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_command():
    """The command that starts and stops nodes of Ray; without Ray the test is skipped."""
    if importlib.util.find_spec("ray") is None:
        lacking("ray", "it is not installed")
    return Path(sys.executable).parent / "ray"


@pytest.fixture
def private(tmp_path):
    """The environment of a process with a home and a folder for temporary files of its own."""
    (tmp_path / "home").mkdir()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="c") as temporary:  # short, for sockets
        yield os.environ | {
            "HOME": str(tmp_path / "home"),
            "TMPDIR": temporary,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }


def left(environment: dict[str, str]) -> list[Path]:
    return [path for name in ("HOME", "TMPDIR") for path in Path(environment[name]).rglob("*")]


def processes_of(folder: str) -> list[int]:
    """List the processes that have a folder in their command."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(folder in word for word in process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


def predict(environment, *options, status=0) -> str:
    """Run the command; gives what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "clinora", "predict", *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


def short_notes(path: Path) -> Path:
    """Write a file of short notes, with rows that are wrong and cells that others would change."""
    words = ["chest pain", "fracture", "knee", "heart", "cough", "CT scan", "diabetes", "fever"]
    pairs = itertools.product(words, repeat=5)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "transcription"])
        for i, five in enumerate(itertools.islice(pairs, ROWS)):
            text = f"{' '.join(five)}, {CANARY}\nsecond line"
            if i % 1_000 == 7:
                writer.writerow([f"{i:05}", text, "a third cell"])
            elif i % 1_000 == 8:
                writer.writerow([f"{i:05}", " "])
            else:
                writer.writerow([f"{i:05}", text])
    return path


def texts_of(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row[1] for row in itertools.islice(csv.reader(file), 1, None)]


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    return short_notes(tmp_path_factory.mktemp("notes") / "notes.csv")


@pytest.fixture(scope="module")
def expected(notes, small_run):
    """The results of the local engine."""
    out = notes.parent / "expected"
    options = ["--keep", "id", "--device", "cpu", "--merge"]
    files = ["--run", small_run, "--notes", notes, "--out", out]
    command.main([str(word) for word in (*files, *options)], "clinora predict")
    return pd.read_csv(out / "predictions.csv", dtype={"id": str})


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, classifier, texts) -> dict[str, int]:
    """Compare results by the row's number; gives how many labels and referrals differ at a tie."""
    assert found["row"].tolist() == list(range(1, len(expected) + 1))
    both = expected.merge(found, on="row", suffixes=("", "_found"), validate="1:1")
    assert len(both) == len(expected)
    assert both["error"].fillna("").tolist() == both["error_found"].fillna("").tolist()
    scored = both[both["error"].isna()]
    assert len(scored) > 0
    for column in ("tokens", "truncated"):
        assert scored[column].tolist() == scored[f"{column}_found"].tolist()
    differences = {"label": 0, "refer": 0}
    if scored["confidence"].notna().any():
        apart = (scored["confidence"] - scored["confidence_found"]).abs()
        assert apart.max() <= TOLERANCE
    for _, row in scored.iterrows():
        if row["label"] != row["label_found"]:
            first, second, *_ = sorted(
                classifier([texts[row["row"] - 1]])[0].probabilities, reverse=True
            )
            assert first - second <= TOLERANCE
            differences["label"] += 1
        elif pd.notna(row["refer"]) and row["refer"] != row["refer_found"]:
            assert abs(row["confidence"] - classifier.calibration.threshold) <= TOLERANCE
            differences["refer"] += 1
    return differences


@pytest.mark.slow
def test_ray_gives_the_results_of_the_local_engine_and_leaves_nothing(
    ray_command, private, notes, expected, small_run, classifier, tmp_path
):
    out = tmp_path / "out"
    files = ["--run", small_run, "--notes", notes, "--out", out, "--keep", "id"]
    said = predict(private, *files, "--engine", "ray", "--actors", "2")
    lines = said.replace("\r", "\n").splitlines()
    assert [line for line in lines if line and "%|" not in line] == [f"Results: {out}"]
    assert CANARY not in said
    assert left(private) == []
    assert processes_of(private["TMPDIR"]) == []
    parts = [pd.read_csv(part, dtype={"id": str}) for part in sorted(out.glob("part-*.csv"))]
    assert [len(part) for part in parts] == [2000, 2000, 500]
    found = pd.concat(parts, ignore_index=True)
    wrong = found["row"] % 1_000 == 8  # the eighth, with three cells; the ninth is empty
    assert found["id"].isna().tolist() == wrong.tolist()
    assert found["id"][~wrong].tolist() == [f"{row - 1:05}" for row in found["row"][~wrong]]
    assert found["error"].notna().sum() == 10
    assert_same(found, expected, classifier, texts_of(notes))


@pytest.mark.slow
def test_ctrl_c_stops_ray_and_resume_continues(
    ray_command, private, notes, small_run, tmp_path, expected
):
    out = tmp_path / "out"
    files = ["--run", small_run, "--notes", notes, "--out", out, "--keep", "id"]
    words = [*files, "--engine", "ray", "--format", "parquet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clinora", "predict", *map(str, words)],
        env=private,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 200
    while not (out / "part-000000.parquet").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("stopped; the same command with --resume continues")
    assert "Traceback" not in said
    assert left(private) == []
    assert processes_of(private["TMPDIR"]) == []
    first = (out / "part-000000.parquet").read_bytes()
    (out / "part-000001.parquet").unlink(missing_ok=True)
    predict(private, *words, "--resume")
    assert (out / "part-000000.parquet").read_bytes() == first
    parts = [pd.read_parquet(part) for part in sorted(out.glob("part-*.parquet"))]
    found = pd.concat(parts, ignore_index=True)
    assert found["row"].tolist() == expected["row"].tolist()
    assert found["label"].fillna("").tolist() == expected["label"].fillna("").tolist()
    assert json.loads((out / "predict.json").read_text())["rows"] == ROWS


FAILING = """
import os, sys
from clinora import cluster
from clinora.commands import predict

class Failing(cluster.Scorer):
    def __init__(self, **load):
        super().__init__(**load)
        def encode(text):
            raise RuntimeError(f"cannot read {text}")
        self.classifier.encode = encode

def keep(folder):
    os.rename(folder, sys.argv[1])

cluster.Scorer = Failing
cluster.remove = keep
sys.exit(predict.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_an_actor_that_fails_shows_no_note(ray_command, private, notes, small_run, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    kept = tmp_path / "logs"
    options = ["--run", small_run, "--notes", notes, "--out", tmp_path / "out", "--engine", "ray"]
    done = subprocess.run(
        [sys.executable, *map(str, (tmp_path / "failing.py", kept, *options))],
        env=private,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    said = done.stderr.replace("\r", "\n").splitlines()[-1]
    assert "scoring rows 1 to 2000 failed with RuntimeError in " in said
    assert kept.stat().st_mode & 0o777 == 0o700
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert any(path.name == "raylet.out" for path in files)
    for content in (done.stdout, done.stderr, *(path.read_bytes() for path in files)):
        assert CANARY not in str(content)
    assert left(private) == []


DYING = """
import os, sys
from clinora import cluster
from clinora.commands import predict

class Dying(cluster.Scorer):
    def __init__(self, **load):
        os._exit(1)  # as if the system had killed it

cluster.Scorer = Dying
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_actor_that_dies_ends_the_job(ray_command, private, notes, small_run, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    options = ["--run", small_run, "--notes", notes, "--out", tmp_path / "out", "--engine", "ray"]
    done = subprocess.run(
        [sys.executable, *map(str, (tmp_path / "dying.py", *options))],
        env=private,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "perhaps because memory ran out: continue with --resume" in done.stderr
    assert left(private) == []


@pytest.mark.slow
def test_errors_of_the_file_and_of_the_machine_are_a_line(
    ray_command, private, small_run, tmp_path
):
    notes = tmp_path / "notes.csv"
    rows = [f"fever {i}" for i in range(2_500)]
    notes.write_text("\n".join(["transcription", *rows, '"never closed']))
    files = ["--run", small_run, "--notes", notes, "--out", tmp_path / "out", "--engine", "ray"]

    said = predict(private, *files, "--actors", 10_000, status=2)
    assert "10000 actors: Ray has " in said
    assert len(said.splitlines()) == 1
    said = predict(private, *files, "--gpus-per-actor", 1, "--actors", 99, status=2)
    assert "99 actors with 1 GPUs each: Ray has " in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()

    said = predict(private, *files, status=2).replace("\r", "\n").splitlines()[-1]
    assert f"{notes} is not a CSV file: the row that begins in line 2502 has a quote" in said
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-000000.csv"]
    assert left(private) == []

    long = tmp_path / "a_long_name_of_a_folder"
    long.mkdir()
    said = predict(private | {"TMPDIR": str(long)}, *files, status=2)
    assert "is too long for Ray: set TMPDIR" in said
    assert list(long.iterdir()) == []
    private["RAY_ADDRESS"] = "ray://10.0.0.1:10001"
    said = predict(private, *files, status=2)
    assert "start the command on a machine of the cluster" in said


@contextmanager
def node(ray_command, environment, *options):
    """A machine of a cluster, with one CPU: its processes are children of one that waits."""
    quiet = ["--num-cpus=1", "--disable-usage-stats", "--block"]
    process = subprocess.Popen(
        [sys.executable, ray_command, "start", *quiet, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        processes = [*psutil.Process(process.pid).children(recursive=True), process]
        for one in processes:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


@pytest.mark.slow
def test_the_actors_of_a_cluster_take_every_cpu(
    ray_command, private, notes, expected, small_run, classifier, tmp_path
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    private |= {"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": address}
    temporary = f"--temp-dir={private['TMPDIR']}/ray"
    head = ["--head", f"--port={port}", "--include-dashboard=false", temporary]
    out = tmp_path / "out"
    files = ["--run", small_run, "--notes", notes, "--out", out, "--keep", "id", "--merge"]
    starting = {name: value for name, value in private.items() if name != "RAY_ADDRESS"}
    with (
        node(ray_command, starting, *head, "--node-ip-address=127.0.0.1"),
        node(ray_command, starting, f"--address={address}", "--node-ip-address=127.0.0.1"),
    ):
        said = ""
        end = time.monotonic() + 120
        while "3 actors: Ray has 2 CPUs" not in said:
            assert time.monotonic() < end, said
            time.sleep(1)
            said = predict(private, *files, "--engine", "ray", "--actors", "3", status=2)
        predict(private, *files, "--engine", "ray", "--actors", "2")
    found = pd.read_csv(out / "predictions.csv", dtype={"id": str})
    assert_same(found, expected, classifier, texts_of(notes))


# --- MTSamples ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mtsamples(data, tmp_path_factory):
    """The first 500 rows of MTSamples, the results of the local engine and the classifier."""
    folder = tmp_path_factory.mktemp("mtsamples")
    rows = pd.read_csv(data / "mtsamples.csv", dtype=str, keep_default_na=False).head(500)
    rows.to_csv(folder / "notes.csv", index=False)
    rows.to_parquet(folder / "notes.parquet")
    options = [
        "--notes",
        folder / "notes.csv",
        "--out",
        folder / "expected",
        "--device",
        "cpu",
        *FP32,
    ]
    command.main([str(word) for word in (*options, "--merge")], "clinora predict")
    expected = pd.read_csv(folder / "expected" / "predictions.csv")
    classifier = clinora.Classifier.load("bundled", device="cpu", precision="fp32")
    return folder, expected, classifier, rows["transcription"].tolist()


@pytest.mark.slow
def test_ray_agrees_on_mtsamples(ray_command, private, mtsamples, tmp_path):
    folder, expected, classifier, texts = mtsamples
    out = tmp_path / "out"
    files = [
        "--notes",
        folder / "notes.parquet",
        "--out",
        out,
        "--format",
        "parquet",
        "--merge",
        *FP32,
    ]
    predict(private, *files, "--engine", "ray", "--actors", "2")
    found = pd.read_parquet(out / "predictions.parquet")
    print("Ray:", assert_same(found, expected, classifier, texts))


@pytest.fixture(scope="module")
def pyspark():
    """Skip the tests that need PySpark where it is not installed."""
    if importlib.util.find_spec("pyspark") is None:
        lacking("pyspark", "it is not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("pyspark")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_spark_agrees_on_mtsamples(private, mtsamples, tmp_path, kind):
    folder, expected, classifier, texts = mtsamples
    out = tmp_path / "out"
    files = ["--notes", folder / f"notes.{kind}", "--out", out, "--workers", "2", *FP32]
    script = ROOT / "examples" / "predict_on_spark.py"
    subprocess.run(
        [sys.executable, script, *files, "--keep", "sample_name"],
        env=private,
        check=True,
        timeout=300,
    )
    found = pd.read_parquet(out)
    assert found["sample_name"].notna().all()
    assert not any(Path(private["TMPDIR"]).glob("clinora-*"))
    print("Spark:", assert_same(found, expected, classifier, texts))
