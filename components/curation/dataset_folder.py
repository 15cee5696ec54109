"""A snapshot as a folder that `datasets.load_dataset` opens as it is: Parquet shards per split, and a dataset card.

The pictures are the stored files, byte for byte. The folder is built beside its destination and renamed when it is
whole; an export that was cut off goes on behind its last whole shard.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from components.catalog.datasets import SnapshotRow
from components.curation.dataset_card import SplitFiles, write_card
from components.curation.manifest import SampleRow, read_manifest
from components.curation.memory import sizes_in_place
from components.errors import BadInput
from components.stages import Bench
from components.storage import Store, atomic_write, fsync_dir

FORMAT = 1  # raise when a shard is written otherwise: parts of an older export are then not continued
SHARD_BYTES = 256 << 20  # of pictures in one file
GROUP_BYTES = 32 << 20  # and in one row group: what is held in memory
GROUP_ROWS = 100
MARK = ".snapshot"  # in an unfinished folder: what it is made of
PICTURE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
TEXT = {"dtype": "string", "_type": "Value"}
NUMBER = {"dtype": "int32", "_type": "Value"}
COLUMNS: dict[str, tuple[pa.DataType, dict[str, Any]]] = {  # name -> Arrow's type, and the one that `datasets` reads
    "image": (PICTURE, {"_type": "Image"}),
    "text": (pa.string(), TEXT),
    "file_name": (pa.string(), TEXT),
    "sha256": (pa.string(), TEXT),
    "licence": (pa.string(), TEXT),
    "author": (pa.string(), TEXT),
    "source": (pa.string(), TEXT),
    "group": (pa.string(), TEXT),
    "component": (pa.string(), TEXT),
    "width": (pa.int32(), NUMBER),
    "height": (pa.int32(), NUMBER),
    "repeats": (pa.int32(), NUMBER),
    "mask": (PICTURE, {"_type": "Image"}),
    "variants": (pa.list_(pa.string()), {"_type": "List", "feature": TEXT}),
    "caption_by": (pa.string(), TEXT),
}
OPTIONAL = ("mask", "variants", "caption_by")  # only where a sample of the snapshot has one


@dataclass(frozen=True, slots=True)
class DatasetFolder:
    """What was written."""

    folder: Path
    splits: tuple[SplitFiles, ...]
    card: Path
    reused: int  # shards that an export which was cut off had left


def export_dataset(
    bench: Bench, snapshot: SnapshotRow, destination: Path, *, on_progress: Callable[[int, int], None]
) -> DatasetFolder:
    """Write a snapshot's pictures, captions and provenance into `destination`, which appears whole or not at all.

    `on_progress(done, total)` counts samples. Raises BadInput for a destination that holds something, DamagedArtifact
    for a picture whose bytes are gone, StorageFull.
    """
    destination = destination.expanduser().resolve()
    place = hashlib.sha256(str(destination).encode()).hexdigest()[:32]
    with FileLock(bench.workspace.locks / f"dataset-{place}.lock"):
        _require_free(destination)
        rows = read_manifest(bench.store, snapshot.digest)
        unfinished = destination.with_name(f".{destination.name}.partial")
        _open_unfinished(unfinished, snapshot.digest)
        sizes = _sizes(bench, rows)
        columns = [name for name in COLUMNS if name not in OPTIONAL or any(getattr(row, name) for row in rows)]
        splits, reused, done = [], 0, 0
        for split in dict.fromkeys(row.split for row in rows):
            shards = list(_shards([row for row in rows if row.split == split], sizes))
            for number, shard in enumerate(shards):
                path = unfinished / "data" / f"{split}-{number:05}-of-{len(shards):05}.parquet"
                if path.exists():
                    reused += 1
                else:
                    _write_shard(bench.store, path, shard, columns, sizes)
                done += len(shard)
                on_progress(done, len(rows))
            files = sorted((unfinished / "data").glob(f"{split}-*-of-{len(shards):05}.parquet"))
            splits.append(SplitFiles(split, sum(map(len, shards)), sum(file.stat().st_size for file in files)))
        features = {name: COLUMNS[name][1] for name in columns}
        write_card(bench.catalog, snapshot, rows, splits, features, unfinished / "README.md")
        (unfinished / MARK).unlink()
        unfinished.replace(destination)
        fsync_dir(destination.parent)
    return DatasetFolder(destination, tuple(splits), destination / "README.md", reused)


def _require_free(destination: Path) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if destination.exists() or destination.is_symlink():
        what = "holds something already" if destination.is_dir() else "is a file"
        raise BadInput(f"{destination}: {what}; give --out a folder that is empty or not there yet")


def _open_unfinished(folder: Path, digest: str) -> None:
    """The folder in which an export of this snapshot goes on; one of another snapshot is started anew."""
    mark = f"{FORMAT} {digest}\n".encode()
    if not ((folder / MARK).exists() and (folder / MARK).read_bytes() == mark):
        shutil.rmtree(folder, ignore_errors=True)
        with atomic_write(folder / MARK) as file:
            file.write(mark)
    for cut_off in folder.rglob("*.part"):
        cut_off.unlink()


def _sizes(bench: Bench, rows: Sequence[SampleRow]) -> dict[str, int]:
    """The bytes of each picture by its sha256; one that was not copied has those that its file had when it was seen."""
    copies = {row.sha256: bench.store.path(row.sha256) for row in rows}
    copied = {sha256: path.stat().st_size for sha256, path in copies.items() if path.exists()}
    return copied | sizes_in_place(bench.catalog, [sha256 for sha256 in copies if sha256 not in copied])


def _shards(rows: Sequence[SampleRow], sizes: Mapping[str, int]) -> Iterator[list[SampleRow]]:
    """The rows in their order, in stretches of about SHARD_BYTES of pictures."""
    return _stretches(rows, sizes, most_bytes=SHARD_BYTES, most_rows=len(rows))


def _groups(rows: Sequence[SampleRow], sizes: Mapping[str, int]) -> Iterator[list[SampleRow]]:
    """The rows of a shard in stretches that are held in memory."""
    return _stretches(rows, sizes, most_bytes=GROUP_BYTES, most_rows=GROUP_ROWS)


def _stretches(
    rows: Sequence[SampleRow], sizes: Mapping[str, int], *, most_bytes: int, most_rows: int
) -> Iterator[list[SampleRow]]:
    stretch: list[SampleRow] = []
    held = 0
    for row in rows:
        size = sizes.get(row.sha256, 0)  # gone from the catalog too: reading it says so
        if stretch and (len(stretch) == most_rows or held + size > most_bytes):
            yield stretch
            stretch, held = [], 0
        stretch.append(row)
        held += size
    yield stretch


def _write_shard(
    store: Store, path: Path, rows: Sequence[SampleRow], columns: Sequence[str], sizes: Mapping[str, int]
) -> None:
    features = {name: COLUMNS[name][1] for name in columns}
    schema = pa.schema(
        [pa.field(name, COLUMNS[name][0]) for name in columns],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="none", version="2.6") as writer:
        for group in _groups(rows, sizes):
            values = [_values(store, row, columns) for row in group]
            writer.write_table(pa.Table.from_pylist(values, schema=schema), row_group_size=len(group))


def _values(store: Store, row: SampleRow, columns: Sequence[str]) -> dict[str, Any]:
    name = PurePosixPath(row.file_name)
    values = {column: getattr(row, column) for column in columns if column != "image"}
    values["image"] = {"bytes": store.read(row.sha256), "path": name.name}
    if row.mask is not None:
        values["mask"] = {"bytes": store.read(row.mask), "path": f"{name.stem}-masklabel.png"}
    return values
