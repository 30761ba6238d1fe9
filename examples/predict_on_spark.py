"""Predict the class of every note in a CSV or Parquet file with Apache Spark.

The result is a folder with one Parquet file: a row for each row of the file, in its order, with the
row's number from 1, the columns of --keep, label, confidence, refer, tokens, truncated and error.
It never contains a note, unless its column is kept.

On this machine, with two Python workers, after "pip install clinora pyspark" (Spark needs Java):

    python examples/predict_on_spark.py --run runs/demo --notes archive.parquet --out results \
        --keep id --workers 2

On a cluster, where every machine has Clinora, and the run and its base at the same paths:

    spark-submit --master yarn examples/predict_on_spark.py --run /data/runs/demo --workers 8 …

Spark is less strict than "clinora predict" with a CSV row that has too few or too many cells, and
gives it no error for that. Spark's temporary files contain notes: here they are in a private folder
that is removed at the end; on a cluster its administrator decides.
"""

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Iterator

import pandas as pd
import torch
from pyspark import SparkConf
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as sql
from pyspark.sql.types import StructType

from clinora import Classifier
from clinora.predict import ROW, check_kept, predict_table

ROWS_TOGETHER = 2_000  # given to the classifier at a time; it batches notes of similar length
RESULT_TYPES = {
    "label": "string",
    "confidence": "double",
    "refer": "boolean",
    "tokens": "long",
    "truncated": "boolean",
    "error": "string",
}


def main(argv: list[str] | None = None) -> int:
    """Score the file, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--run", default="bundled", help="folder of a trained run (default: %(default)s)")
    add("--notes", required=True, help="a .csv or .parquet file")
    add("--out", required=True, help="output folder, which must not exist")
    add("--text-column", default="transcription", help="column of the texts (default: %(default)s)")
    add("--keep", nargs="+", default=[], help="columns that the results have, too (default: none)")
    add("--precision", default="auto", help="auto, bf16, fp16 or fp32 (default: %(default)s)")
    add("--workers", type=int, default=1, help="Python workers that compute (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        check_kept(args.keep)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory(prefix="clinora-") as folder:  # readable by this user alone
        spark = start_spark(args.workers, folder)
        try:
            rows = read_rows(spark, args.notes, [args.text_column, *args.keep])
            compute = functools.partial(
                score, args.run, args.precision, args.text_column, args.keep
            )
            types = result_schema(rows, args.keep)
            results = rows.repartition(args.workers, ROW).mapInPandas(compute, types)
            # The results are small: one file, in the order of the rows.
            results.repartition(1).sortWithinPartitions(ROW).write.parquet(args.out)
        finally:
            spark.stop()
    return 0


def start_spark(workers: int, folder: str) -> SparkSession:
    """Start Spark on this machine, or use what spark-submit has set."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark would take python3
    settings = SparkConf()
    settings.setIfMissing("spark.master", f"local[{workers}]")
    settings.setIfMissing("spark.local.dir", folder)
    settings.setIfMissing("spark.ui.enabled", "false")
    settings.set("spark.sql.execution.arrow.maxRecordsPerBatch", str(ROWS_TOGETHER))
    return SparkSession.builder.appName("clinora").config(conf=settings).getOrCreate()


def read_rows(spark: SparkSession, path: str, columns: list[str]) -> DataFrame:
    """Read columns of a file, with the number of each row from 1."""
    if path.endswith(".parquet"):
        rows = spark.read.parquet(path)
        number = rows["_metadata.row_index"] + 1
    else:
        # Texts have line breaks. So Spark reads the file in one piece, and its ids count rows.
        rows = spark.read.csv(path, header=True, multiLine=True, escape='"')
        number = sql.monotonically_increasing_id() + 1
    # With backquotes, a dot in a name is no field of a struct.
    return rows.select(number.alias(ROW), *[f"`{column}`" for column in columns])


def result_schema(rows: DataFrame, keep: list[str]) -> StructType:
    """Give the types of the results' columns."""
    types = StructType([rows.schema[column] for column in (ROW, *keep)])
    for column, kind in RESULT_TYPES.items():
        types = types.add(column, kind)
    return types


def score(
    run: str,
    precision: str,
    text_column: str,
    keep: list[str],
    tables: Iterator[pd.DataFrame],
) -> Iterator[pd.DataFrame]:
    """Score the tables of a worker, which loads the run once."""
    torch.set_num_threads(1)  # Spark runs a worker for each CPU
    classifier = Classifier.load(run, precision=precision)
    for table in tables:
        results = predict_table(classifier, table, text_column, keep)
        results.insert(0, ROW, table[ROW])
        yield results


if __name__ == "__main__":
    sys.exit(main())
