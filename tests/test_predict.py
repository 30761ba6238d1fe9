"""Scoring tables of any size: every row once, in order, however often the job is killed."""

import csv
import json
import threading

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

import clinora
from clinora import predict
from clinora.commands import predict as command
from clinora.predict import RESULTS, ahead, predict_table
from tests import kill_and_resume_predict

SECRET = "HIV positive"
TEXTS = [
    "Severe chest pain. ECG: normal.",
    "",
    "The knee, swollen since a fall; fracture reduced.",
    "CT of the abdomen without contrast.",
    "​",
    f"A pleasant woman, {SECRET}. " * 60,
    "Cataract surgery of the left eye.",
]
EMPTY = [1, 4]  # positions in TEXTS


@pytest.fixture(scope="module")
def classifier():
    return clinora.Classifier.load("bundled", device="cpu", precision="fp32")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(predict, "ROWS_PER_PART", 3)


@pytest.fixture
def notes(tmp_path):
    frame = pd.DataFrame({"id": [f"00{i}" for i in range(len(TEXTS))], "transcription": TEXTS})
    frame.to_csv(tmp_path / "notes.csv", index=False)
    return tmp_path / "notes.csv"


def run(*options):
    return command.main([str(word) for word in (*options, "--device", "cpu")], "clinora predict")


def refused(capsys, *options):
    """Give the message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as caught:
        run(*options)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def results(folder):
    """Read all parts, with everything as text."""
    parts = sorted(folder.glob("part-*.csv"))
    frames = [pd.read_csv(part, dtype=str, keep_default_na=False) for part in parts]
    return pd.concat(frames, ignore_index=True)


# --- a table in memory ----------------------------------------------------------------------------


def test_each_row_has_the_prediction_of_its_note_alone(classifier):
    frame = pd.DataFrame({"text": TEXTS, "id": range(7)}, index=list("gfedcba"))
    scored = predict_table(classifier, frame, "text", ["id"])
    assert list(scored.index) == list(frame.index)
    assert list(scored.columns) == ["id", *RESULTS]
    assert scored["id"].tolist() == list(range(7))
    for i, text in enumerate(TEXTS):
        row = scored.iloc[i]
        if i in EMPTY:
            assert row["error"] == "the note is empty"
            assert row[["label", "confidence", "refer", "tokens", "truncated"]].isna().all()
            continue
        (alone,) = classifier([text])
        assert pd.isna(row["error"])
        assert (row["label"], row["refer"], row["tokens"]) == (
            alone.label, alone.refer, alone.tokens
        )  # fmt: skip
        assert row["truncated"] == alone.truncated
        assert row["confidence"] == pytest.approx(alone.confidence, abs=1e-5)


def test_a_table_without_rows_gives_the_same_columns(classifier):
    full = predict_table(classifier, pd.DataFrame({"text": ["fever"]}), "text")
    empty = predict_table(classifier, pd.DataFrame({"text": []}), "text")
    assert dict(empty.dtypes) == dict(full.dtypes)


@pytest.mark.parametrize(
    "cell", [None, np.nan, pd.NA, pd.NaT, "", b"fever", ["fever"], {}], ids=repr
)
def test_a_cell_without_text_is_an_error_of_its_row(classifier, cell):
    frame = pd.DataFrame({"text": pd.Series(["fever", cell], dtype=object)})
    scored = predict_table(classifier, frame, "text")
    assert scored["error"].isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("note",), "0 columns 'note'"),
        (("text", ["label"]), "'label' cannot be kept"),
        (("text", ["row"]), "'row' cannot be kept"),
        (("text", ["text", "text"]), "'text' cannot be kept"),
        (("text", ["id"]), "0 columns 'id'"),
    ],
)
def test_columns_that_cannot_be_are_refused(classifier, options, words):
    frame = pd.DataFrame({"text": ["a"], "label": ["b"], "row": [1]})
    with pytest.raises(ValueError, match=words):
        predict_table(classifier, frame, *options)


# --- a file ---------------------------------------------------------------------------------------


def test_every_row_of_a_file_gives_one_row_in_order(small_parts, notes, tmp_path, classifier):
    assert run("--notes", notes, "--out", tmp_path / "out", "--keep", "id") == 0
    scored = results(tmp_path / "out")
    assert list(scored.columns) == ["row", "id", *RESULTS]
    assert scored["row"].tolist() == [str(i) for i in range(1, 8)]
    assert scored["id"].tolist() == [f"00{i}" for i in range(7)]
    labels = [p.label for p in classifier([t for i, t in enumerate(TEXTS) if i not in EMPTY])]
    assert scored["label"][~scored.index.isin(EMPTY)].tolist() == labels
    assert scored["error"].tolist() == ["the note is empty" if i in EMPTY else "" for i in range(7)]
    sizes = [len(pd.read_csv(part)) for part in sorted((tmp_path / "out").glob("part-*"))]
    assert sizes == [3, 3, 1]


def test_no_note_is_in_the_results_or_messages(small_parts, notes, tmp_path, capfd):
    run("--notes", notes, "--out", tmp_path / "out", "--keep", "id")
    for file in (tmp_path / "out").iterdir():
        assert SECRET not in file.read_text()
    assert SECRET not in "".join(capfd.readouterr())


def test_a_note_is_in_the_results_if_it_is_kept(notes, tmp_path):
    run("--notes", notes, "--out", tmp_path / "out", "--keep", "transcription")
    assert results(tmp_path / "out")["transcription"].tolist() == TEXTS


def test_a_wrong_row_is_a_row_with_an_error(small_parts, tmp_path):
    path = tmp_path / "notes.csv"
    path.write_text(f"id,transcription\n1,fever\n2,pain,{SECRET}\n3,cough\n")
    run("--notes", path, "--out", tmp_path / "out", "--keep", "id")
    scored = results(tmp_path / "out")
    assert scored["id"].tolist() == ["1", "", "3"]
    assert scored["error"].tolist()[1].startswith("the row has 3 fields")
    assert scored["error"].tolist()[::2] == ["", ""]


@pytest.mark.parametrize("output_format", ["csv", "jsonl", "parquet"])
def test_a_merged_file_has_the_rows_of_the_parts(small_parts, notes, tmp_path, output_format):
    options = ["--notes", notes, "--keep", "id", "--format", output_format]
    run(*options, "--out", tmp_path / "parts")
    run(*options, "--out", tmp_path / "merged", "--merge")
    read = {
        "csv": lambda path: pd.read_csv(path, dtype=str),
        "jsonl": lambda path: pd.read_json(path, lines=True, dtype=False, convert_dates=False),
        "parquet": pd.read_parquet,
    }[output_format]
    parts = sorted((tmp_path / "parts").glob("part-*"))
    assert len(parts) == 3
    merged = tmp_path / "merged" / f"predictions.{output_format}"
    pd.testing.assert_frame_equal(
        read(merged), pd.concat(map(read, parts), ignore_index=True), check_dtype=False
    )
    assert len(read(merged)) == len(TEXTS)


def test_formats_hold_the_same_results(notes, tmp_path):
    for output_format in ("csv", "jsonl", "parquet"):
        options = ["--format", output_format, "--out", tmp_path / output_format, "--merge"]
        run("--notes", notes, "--keep", "id", *options)
    with (tmp_path / "csv" / "predictions.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    lines = (tmp_path / "jsonl" / "predictions.jsonl").read_text().splitlines()
    from_json = [json.loads(line) for line in lines]
    from_parquet = pd.read_parquet(tmp_path / "parquet" / "predictions.parquet")
    assert from_json == from_parquet.astype(object).where(from_parquet.notna(), None).to_dict(
        "records"
    )
    as_words = {None: "", True: "true", False: "false"}
    for words, values in zip(from_csv, from_json, strict=True):
        for column, value in values.items():
            if isinstance(value, float):
                assert float(words[column]) == value
            elif isinstance(value, int) and not isinstance(value, bool):
                assert words[column] == str(value)
            else:
                assert words[column] == as_words.get(value, value)


def test_a_kept_column_of_a_parquet_file_keeps_its_type(tmp_path):
    frame = pd.DataFrame(
        {
            "transcription": ["a", "b"],
            "number": [2**60 + 1, 3],
            "day": pd.to_datetime(["2024-03-01", None]),
        }
    )
    frame.to_parquet(tmp_path / "notes.parquet")
    options = ["--keep", "number", "day", "--format", "parquet", "--merge"]
    run("--notes", tmp_path / "notes.parquet", "--out", tmp_path / "out", *options)
    scored = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    pd.testing.assert_frame_equal(scored[["number", "day"]], frame[["number", "day"]])


def test_a_kept_formula_is_quoted_and_a_number_is_not(tmp_path):
    ids = ["=1+1", "@a", "-3", "+2.5", "-a", "\t=1"]
    frame = pd.DataFrame({"id": ids, "transcription": ["fever"] * 6})
    frame.to_json(tmp_path / "notes.jsonl", orient="records", lines=True)
    run("--notes", tmp_path / "notes.jsonl", "--out", tmp_path / "out", "--keep", "id")
    expected = ["'=1+1", "'@a", "-3", "+2.5", "'-a", "'\t=1"]
    assert results(tmp_path / "out")["id"].tolist() == expected


def test_a_file_without_rows_gives_a_header(tmp_path):
    (tmp_path / "notes.csv").write_text("id,transcription\n")
    run("--notes", tmp_path / "notes.csv", "--out", tmp_path / "out", "--merge")
    text = (tmp_path / "out" / "predictions.csv").read_text()
    assert text == ",".join(["row", *RESULTS]) + "\n"


def test_padding_stays_under_a_twentieth(classifier, monkeypatch):
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(4, 1, 2000).astype(int) + 1, 400)
    frame = pd.DataFrame({"text": [" ".join(["fever"] * n) for n in lengths]})
    computed = []
    real = 0

    def count(ids, lengths):
        nonlocal real
        computed.append(ids.numel())
        real += int(lengths.sum())
        return classifier.model.score.weight.new_zeros(len(ids), len(classifier.labels))

    monkeypatch.setattr(classifier.model, "forward", count)
    predict_table(classifier, frame, "text")
    assert sum(computed) < real / 0.95
    assert len(computed) > 3


def test_the_next_item_is_computed_while_the_caller_works():
    computed = threading.Event()

    def items():
        yield 1
        computed.set()
        yield 2

    result = ahead(items())
    assert next(result) == 1
    assert computed.wait(10)  # nobody has asked for the second
    assert list(result) == [2]


# --- stopping and resuming ------------------------------------------------------------------------


def stop_at_part(monkeypatch, number):
    """Let the writing of a part fail as if the process had ended."""
    write = predict.write_table

    def stop(path, *rest):
        if f"{number:06d}" in path.name:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(predict, "write_table", stop)


def test_a_stopped_job_continues_with_the_same_bytes(
    small_parts, notes, tmp_path, monkeypatch, capsys
):
    whole = ["--notes", notes, "--keep", "id", "--merge", "--out", tmp_path / "whole"]
    run(*whole)
    options = [*whole[:-1], tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at_part(patch, 1)
        with pytest.raises(SystemExit, match="130"):
            run(*options)
    assert "--resume" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("part*")] == ["part-000000.csv"]
    first = (tmp_path / "out" / "part-000000.csv").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(predict, "merge_parts", lambda out, _format: out)
        run(*options, "--resume")
    assert (tmp_path / "out" / "part-000000.csv").stat().st_mtime_ns == first
    run(*options, "--resume")
    merged = "predictions.csv"
    assert (tmp_path / "out" / merged).read_bytes() == (tmp_path / "whole" / merged).read_bytes()


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_job_that_was_stopped_after_merging_is_complete(small_parts, notes, tmp_path, left):
    options = ["--notes", notes, "--out", tmp_path / "out"]
    run(*options)
    parts = sorted((tmp_path / "out").glob("part-*"))
    contents = [part.read_bytes() for part in parts]
    run(*options, "--merge", "--resume")
    merged = (tmp_path / "out" / "predictions.csv").read_bytes()
    for part, content in zip(parts[left:], contents[left:], strict=True):
        part.write_bytes(content)
    run(*options, "--merge", "--resume")
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == merged
    assert not list((tmp_path / "out").glob("part-*"))


def test_a_job_is_only_resumed_with_what_it_was_begun_with(small_parts, notes, tmp_path, capsys):
    options = ["--notes", notes, "--out", tmp_path / "out", "--keep", "id", "--precision", "fp32"]
    run(*options)
    other = tmp_path / "other.csv"
    other.write_text(notes.read_text().replace("knee", "foot"))
    changes = {
        "input": ["--notes", other],
        "keep": ["--keep", "id", "transcription"],
        "format": ["--format", "jsonl"],
        "precision": ["--precision", "bf16"],
        "quantization": ["--quantize", "nf4"],
    }
    for name, change in changes.items():
        assert name in refused(capsys, *options, *change, "--resume")


def test_other_files_are_not_overwritten(notes, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "not empty" in refused(capsys, "--notes", notes, "--out", tmp_path / "out")
    assert "other files" in refused(capsys, "--notes", notes, "--out", tmp_path / "out", "--resume")
    assert "not empty" in refused(capsys, "--notes", notes, "--out", notes)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_two_jobs_in_one_folder_are_refused(notes, tmp_path, capsys):
    options = ["--notes", notes, "--out", tmp_path / "out"]
    run(*options)
    with FileLock(tmp_path / "out" / ".lock"):
        assert "another process" in refused(capsys, *options, "--resume")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id,note\n1,a\n", "'transcription'.*--text-column"),
        (b"transcription\na\n", "'id'.*--keep"),
        (b"id,transcription\n1,\xe9\n", "UTF-8"),
        (b"", "empty"),
    ],
    ids=["text column", "kept column", "encoding", "empty"],
)
def test_a_file_that_is_no_table_is_refused_before_anything_is_written(
    tmp_path, capsys, content, words
):
    path = tmp_path / "notes.csv"
    path.write_bytes(content)
    message = refused(capsys, "--notes", path, "--out", tmp_path / "out", "--keep", "id")
    assert message.count("\n") == 1
    assert pd.Series([message]).str.contains(words).all()
    assert not (tmp_path / "out").exists()


def test_what_was_done_before_a_file_ends_wrongly_is_kept(small_parts, tmp_path, capsys):
    path = tmp_path / "notes.csv"
    rows = "".join(f"{i},fever\n" for i in range(7))
    path.write_text(f'id,transcription\n{rows}8,"never closed\n')
    message = refused(capsys, "--notes", path, "--out", tmp_path / "out")
    assert "line 9" in message
    assert len(results(tmp_path / "out")) == 6


def test_a_missing_part_is_scored_again(small_parts, notes, tmp_path):
    options = ["--notes", notes, "--out", tmp_path / "out"]
    run(*options)
    second = tmp_path / "out" / "part-000001.csv"
    content = second.read_bytes()
    second.unlink()
    run(*options, "--resume")
    assert second.read_bytes() == content


def test_a_job_that_was_killed_before_its_first_part_can_be_started_again(notes, tmp_path):
    (tmp_path / "out").mkdir()
    for name in (".lock", ".predict.json.abc", ".part-000000.csv.abc"):
        (tmp_path / "out" / name).write_text("half")
    run("--notes", notes, "--out", tmp_path / "out", "--resume")
    assert len(results(tmp_path / "out")) == len(TEXTS)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == [".lock", "part-000000.csv", "predict.json"]


def test_a_line_end_in_a_kept_name_does_not_disturb_merging(small_parts, tmp_path):
    frame = pd.DataFrame({"transcription": ["fever"] * 5, "the\nid": range(5)})
    frame.to_csv(tmp_path / "notes.csv", index=False)
    options = ["--keep", "the\nid", "--out", tmp_path / "out", "--merge"]
    run("--notes", tmp_path / "notes.csv", *options)
    merged = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert merged["the\nid"].tolist() == list(range(5))


def test_a_row_whose_note_cannot_be_read_keeps_its_id(tmp_path):
    (tmp_path / "notes.jsonl").write_text(
        '{"id": 1, "transcription": "fever"}\n{"id": 2, "transcription": ["a"]}\n{"id": 3}\n'
    )
    run("--notes", tmp_path / "notes.jsonl", "--out", tmp_path / "out", "--keep", "id")
    scored = results(tmp_path / "out")
    assert scored["id"].tolist() == ["1", "2", "3"]
    assert [bool(error) for error in scored["error"]] == [False, True, True]


@pytest.mark.slow
def test_a_killed_job_ends_with_the_same_bytes(tmp_path):
    report = kill_and_resume_predict.show(tmp_path, rows=600, rows_per_part=25, kills=4, seed=0)
    assert report == {"rows": 600, "kills": 4, "identical": True}
