"""A snapshot's manifest: the kept samples as Parquet bytes, the same for the same rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.storage import Store

ROWS_AT_ONCE = 10_000  # that are Python's objects
GROUP_ROWS = 50_000  # that are Arrow's


@dataclass(frozen=True, slots=True)
class SampleRow:
    """A kept sample, as the manifest lists it."""

    sha256: str
    rgb_digest: str
    file_name: str
    text: str
    group: str | None
    component: str
    split: str
    width: int
    height: int
    licence: str | None
    author: str | None
    source: str | None
    repeats: int
    mask: str | None = None  # sha256 of a grey PNG of the picture's size
    variants: tuple[str, ...] = ()  # captions besides `text`
    is_reg: bool = False  # a picture of the class, for prior preservation
    caption_by: str | None = None  # who wrote `text`, where it is not the source's


MANIFEST_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("sha256", "rgb_digest", "file_name", "text")]
    + [pa.field("group", pa.string())]
    + [pa.field(name, pa.string(), nullable=False) for name in ("component", "split")]
    + [pa.field(name, pa.int32(), nullable=False) for name in ("width", "height")]
    + [pa.field(name, pa.string()) for name in ("licence", "author", "source")]
    + [pa.field("repeats", pa.int32(), nullable=False)]
)
OPTIONAL_FIELDS = (  # only in the manifest of a set where a row has one
    pa.field("mask", pa.string()),
    pa.field("variants", pa.list_(pa.string())),
    pa.field("is_reg", pa.bool_()),
    pa.field("caption_by", pa.string()),
)
SKIPPED_SCHEMA = pa.schema([pa.field(name, pa.string(), nullable=False) for name in ("source", "file_name", "reason")])
VERDICT_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("file_name", "check", "version", "decision")]
    + [pa.field("sha256", pa.string()), pa.field("score", pa.float64()), pa.field("threshold", pa.float64())]
    + [pa.field("reason", pa.string(), nullable=False)]
)


def read_manifest(store: Store, digest: str) -> list[SampleRow]:
    """The samples of a snapshot, sorted by (split, file name, sha256). Raises DamagedArtifact."""
    with pq.ParquetFile(pa.BufferReader(store.read(digest))) as file:
        return [SampleRow(**row | {"variants": tuple(row.get("variants") or ())})
                for part in file.iter_batches(ROWS_AT_ONCE) for row in part.to_pylist()]


def cells(row: Any) -> dict[str, Any]:
    """A dataclass's values by their names, as they are: `asdict` would copy each, a hundred times slower."""
    return {field.name: getattr(row, field.name) for field in fields(row)}


def parquet(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    """Equal rows give equal bytes: row groups of GROUP_ROWS, no compression library's whims, no timestamps.

    Rows are taken as they come, so that not all of them have to be there at once.
    """
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="none", version="2.6") as writer:
        for table in _tables(rows, schema):
            writer.write_table(table, row_group_size=GROUP_ROWS)
    return sink.getvalue().to_pybytes()


def _tables(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """One of each GROUP_ROWS, in one piece, since where pieces end shows in the file; an empty one of no rows."""
    coming = iter(rows)
    parts = iter(lambda: list(islice(coming, ROWS_AT_ONCE)), [])
    batches = (pa.RecordBatch.from_pylist(part, schema=schema) for part in parts)
    pieces = list(islice(batches, GROUP_ROWS // ROWS_AT_ONCE))
    while True:
        yield pa.Table.from_batches(pieces, schema=schema).combine_chunks()
        pieces = list(islice(batches, GROUP_ROWS // ROWS_AT_ONCE))
        if not pieces:
            return
