"""Score a file with Ray Data: several copies of a classifier, on one machine or on a cluster.

One task of Ray reads the file in parts, row by row as everywhere else in Clinora: the readers of
Ray Data change cells such as "007" and have no row for a line that is wrong. Actors, which loaded
the run once, score the parts. The process that started the job writes the results in the order of
the file, as ``predict_file`` does.

Notes stay private. Ray sees each part as bytes, so that none of its messages can quote a cell, and
no exception of a task or an actor reaches Ray. A Ray that is started here sends no statistics, has
no dashboard, and keeps its logs and spilled objects in a private folder that is removed at the end.
"""

import logging
import os
import pickle
import secrets
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from clinora.classifier import Classifier
from clinora.device import choose_dtype, keep_few_kernels, keep_freed_memory
from clinora.notes import TEXT_COLUMN
from clinora.predict import (
    Part,
    ScoredPart,
    check_kept,
    encode_part,
    identify,
    read_parts,
    run_job,
    score_part,
)
from clinora.tables import Table, TableError, open_table
from clinora.tables.writing import check_format

ADDRESS = "RAY_ADDRESS"  # Ray's own variable: the cluster to join
# What Ray reads from the environment when it is imported, and when it starts.
NO_START_BY_ITSELF = {"RAY_ENABLE_AUTO_CONNECT": "0"}
NO_STATISTICS = {"RAY_USAGE_STATS_ENABLED": "0"}
LOOPBACK = "127.0.0.1"
# Ray's sockets are in its folder, and the system allows 107 bytes for their paths.
LONGEST_FOLDER = 39
REMOVAL_SECONDS = 10.0  # Ray's processes may write logs for a moment after the end
ITEM = "item"  # column of the data sets: a part or what became of it, as bytes


def predict_with_ray(
    run: str | Path,
    source: Path,
    out: Path,
    *,
    base: str | None = None,
    precision: str = "auto",
    quantize: str = "auto",
    actors: int = 1,
    gpus_per_actor: float = 0.0,
    text_column: str = TEXT_COLUMN,
    keep: Sequence[str] = (),
    output_format: str = "csv",
    resume: bool = False,
    merge: bool = False,
) -> Path:
    """Score the rows of a file with Ray, and write the results as ``predict_file`` does.

    Ray is started on this machine; if the environment variable RAY_ADDRESS is set, that cluster is
    joined. The file and the output folder need to be on this machine alone, the run and its base
    on every machine at the same path. An actor computes on one GPU or a share of it; or on the CPU
    with as many threads as it has CPUs, which the actors divide equally.

    Args:
        run: The run: "bundled" or a folder.
        source: A CSV, JSON lines, Parquet or Excel file.
        out: The output folder.
        base: The base, if it is not where the run recorded it.
        precision: "auto", "bf16", "fp16" or "fp32".
        quantize: "auto", as in training; or "none", "nf4" or "nf4-double".
        actors: How many copies of the classifier compute.
        gpus_per_actor: GPUs of each actor: 0 (the CPU), 1, or a share of one.
        text_column: The column of the notes.
        keep: Columns of the file that the results have, too.
        output_format: "csv", "jsonl" or "parquet".
        resume: Whether to continue a job in ``out`` at its first missing part.
        merge: Whether to turn the parts into one file at the end.

    Returns:
        The folder of the parts, or the merged file.

    Raises:
        ValueError: Ray is not installed or failed, it does not have these CPUs or GPUs, the run
            cannot be loaded, or as for ``predict_file``.
        OSError: A file cannot be read or written, or the cluster cannot be reached.
    """
    check_format(output_format)
    check_kept(keep)
    if actors < 1:
        raise ValueError(f"{actors} actors: expected at least 1")
    if not 0 <= gpus_per_actor <= 1:
        raise ValueError(
            f"{gpus_per_actor:g} GPUs for each actor: expected 0 (the CPU), 1, or a share of one"
        )
    device = "cuda" if gpus_per_actor else "cpu"
    if precision == "auto" and device == "cpu":  # the same on all machines
        dtype = choose_dtype(torch.device(device))
        precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    run = absolute_if_folder(run)
    base = base and absolute_if_folder(base)
    job = identify(
        run,
        source,
        text_column=text_column,
        keep=keep,
        output_format=output_format,
        machine={
            "engine": "ray",
            "device": device,
            "precision": precision,
            "quantization": quantize,
        },
    )
    with running_ray():
        import ray

        cpus = share_cpus([node for node in ray.nodes() if node["Alive"]], actors, gpus_per_actor)
        load = {
            "run": run,
            "base": base,
            "device": device,
            "precision": precision,
            "quantize": quantize,
            "threads": cpus,
        }

        def score_table(table: Table) -> Generator[ScoredPart, None, None]:
            parts = make_dataset(source, table.columns, out, output_format)
            items = parts.map_batches(
                Scorer,
                fn_constructor_kwargs=load,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=cpus,
                num_gpus=gpus_per_actor,
                max_restarts=0,  # Ray would start an actor again for ever if memory runs out
                max_task_retries=0,
                **ONE_ITEM,
            )
            return read_results(items)

        return run_job(job, score_table, source, out, resume=resume, merge=merge)


def absolute_if_folder(path: str | Path) -> str:
    """Give a folder's absolute path, because actors run elsewhere; other names stay."""
    if str(path) in ("bundled", "smollm2") or not Path(path).is_dir():
        return str(path)
    return str(Path(path).absolute())


# --- Ray -----------------------------------------------------------------------------------------


@contextmanager
def running_ray() -> Iterator[None]:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS gives, until the end.

    Raises:
        ValueError: Ray is not installed, or failed.
        OSError: The cluster cannot be reached.
    """
    try:
        # Otherwise a thread of Ray Data that ends late would start another Ray.
        with environment(NO_START_BY_ITSELF):
            import ray
            import ray.data
            from ray.exceptions import RayError
    except ImportError:
        raise ValueError(
            "Ray is not installed: pip install 'clinora[cluster]', or choose --engine local"
        ) from None
    if ray.is_initialized():
        raise ValueError("this process already uses Ray: call ray.shutdown() first")
    address = os.environ.get(ADDRESS, "local")
    if "://" in address:
        raise ValueError(
            f"{ADDRESS} is {address}: start the command on a machine of the cluster, with "
            f"{ADDRESS}=auto"
        )
    # Messages of Ray would break the progress bar, and its errors are told in one line.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="clinora-"))  # mode 0700
    try:
        if address == "local" and len(os.fsencode(folder)) > LONGEST_FOLDER:
            raise ValueError(
                f"the path of the folder for temporary files, {folder.parent}, is too long for "
                "Ray: set TMPDIR to a shorter one, such as /tmp"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                join_or_start(address, folder)
            except OSError:
                raise
            except Exception as error:  # Ray raises several kinds
                raise ValueError(f"Ray could not be started or joined: {error}") from None
            yield
    except RayError as error:
        raise ValueError(
            f"Ray failed ({type(error).__name__}), perhaps because memory ran out: continue with "
            "--resume, if need be with fewer --actors"
        ) from None
    finally:
        ray.shutdown()
        remove(folder)


def join_or_start(address: str, folder: Path) -> None:
    """Join a cluster, or start Ray on this machine with its files in a folder.

    Raises:
        OSError: The cluster cannot be reached.
        Exception: Ray's own errors.
    """
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address != "local":
        ray.init(address, **quiet)
        return
    with environment(NO_STATISTICS | {"RAY_AUTH_TOKEN": token()}):
        ray.init(
            address,
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            # Ray lets everybody read its folder, which is inside the private one.
            _temp_dir=str(folder / "ray"),
            **quiet,
        )


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables; afterwards the environment is as before."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # Ray may have set more
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


@cache
def token() -> str:
    """Draw the secret without which no other process can use a Ray that is started here.

    It is the same whenever this process starts Ray, which remembers it. Without it Ray would make
    one and leave it in the home folder.
    """
    return secrets.token_hex(32)


def remove(folder: Path) -> None:
    """Remove a folder, into which ending processes may still write."""
    end = time.monotonic() + REMOVAL_SECONDS
    while folder.exists() and time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
    if folder.exists():
        warnings.warn(f"{folder} could not be removed and may hold notes", stacklevel=2)


def share_cpus(nodes: Sequence[dict], actors: int, gpus_per_actor: float) -> int:
    """Choose how many CPUs each actor gets, so that Ray can start all actors.

    On the CPU it is the largest number with which they fit on the machines; beside a GPU it is 1.
    Actors may take all CPUs: the task that reads takes none of those that Ray counts, because Ray
    Data waits forever for a reading task if actors have taken the last CPU.

    Args:
        nodes: The machines, as ``ray.nodes`` gives them.
        actors: How many actors are wanted.
        gpus_per_actor: GPUs of each: 0, 1, or a share of one.

    Raises:
        ValueError: The machines do not have the CPUs or GPUs.
    """
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    if gpus_per_actor:
        sharing = int(1 / gpus_per_actor + 1e-9)  # actors on a GPU
        room = sum(min(cpus[i], gpus[i] * sharing) for i in range(len(nodes)))
        if room < actors:
            raise ValueError(
                f"{actors} actors with {gpus_per_actor:g} GPUs each: Ray has {sum(gpus)} GPUs and "
                f"{sum(cpus)} CPUs, enough for {room} actors"
            )
        return 1
    if sum(cpus) < actors:
        raise ValueError(
            f"{actors} actors: Ray has {sum(cpus)} CPUs, and each actor needs at least one"
        )
    each = max(cpus)
    while sum(count // each for count in cpus) < actors:
        each -= 1
    return each


# --- the data set --------------------------------------------------------------------------------

# Ray Data neither joins nor divides the items: each is a block and a batch by itself.
ONE_ITEM: dict[str, Any] = {"batch_size": 1, "batch_format": "pandas"}


def make_dataset(source: Path, columns: Sequence[str], out: Path, output_format: str) -> Any:
    """Give Ray's data set of the parts of a file, which a task on this machine reads in order."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # byte: a task gives each item at once
    here = ray.get_runtime_context().get_node_id()
    return ray.data.from_pandas(pd.DataFrame({ITEM: [b""]})).map_batches(
        read_items,
        fn_kwargs={
            "source": source.absolute(),
            "columns": list(columns),
            "out": out.absolute(),
            "output_format": output_format,
        },
        num_cpus=0,
        label_selector={"ray.io/node-id": here},
        **ONE_ITEM,
    )


def read_items(
    _: pd.DataFrame, source: Path, columns: list[str], out: Path, output_format: str
) -> Iterator[pd.DataFrame]:
    """Read the parts of a file; the last item may be the error that ended reading."""
    try:
        with source.open("rb") as file:
            for part in read_parts(open_table(file, columns), out, output_format):
                yield as_item(part)
    except (TableError, OSError) as error:
        yield as_item(error)
    except Exception as error:  # its text may quote a note
        yield as_item(ValueError(f"reading {source} failed with {describe(error)}"))


class Scorer:
    """An actor: a classifier that was loaded once and scores parts."""

    def __init__(
        self,
        run: str,
        base: str | None,
        device: str,
        precision: str,
        quantize: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        keep_few_kernels()
        self.classifier: Classifier | None = None
        self.error: ValueError | None = None
        try:
            self.classifier = Classifier.load(
                run, base=base, device=device, precision=precision, quantize=quantize
            )
        except Exception as error:  # Ray would show a traceback
            self.error = ValueError(f"the run cannot be loaded on {socket.gethostname()}: {error}")

    def __call__(self, items: pd.DataFrame) -> pd.DataFrame:
        """Score the part of an item; an error takes the place of the result."""
        (item,) = items[ITEM]
        part = pickle.loads(item)
        if not isinstance(part, Part):
            return items  # the error that ended reading
        if self.classifier is None:
            return as_item(self.error)
        try:
            notes = encode_part(self.classifier, part)
            return as_item(score_part(self.classifier, part, notes))
        except Exception as error:  # its text may quote a note
            rows = f"rows {part.numbers[0]} to {part.numbers[-1]}"
            return as_item(ValueError(f"scoring {rows} failed with {describe(error)}"))


def describe(error: Exception) -> str:
    """Give the kind of an unexpected error and the line of code, but not its text."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}"
    return f"{type(error).__name__} in {place}"


def as_item(content: Part | ScoredPart | Exception) -> pd.DataFrame:
    """Give an item of a data set."""
    return pd.DataFrame({ITEM: [pickle.dumps(content)]})


def read_results(items: Any) -> Generator[ScoredPart, None, None]:
    """Give the results of a data set in order.

    Raises:
        ValueError: Reading or scoring failed.
        OSError: The file cannot be read.
    """
    with closing(iter(items.iter_batches(prefetch_batches=0, **ONE_ITEM))) as batches:
        for batch in batches:
            (item,) = batch[ITEM]
            result = pickle.loads(item)
            if isinstance(result, Exception):
                raise result
            yield result
