"""Pieces: what one lease of items was encoded to, kept at once, until many pieces become one shard.

A kill therefore costs the lease at work, while shards stay large. Whoever notices that there is enough for a shard
makes it, of its own pieces and of those of others, living or killed. A shard is an object plus one catalog row per
item; the rows come in one transaction, which is the commit, and only then do its pieces go.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from safetensors.torch import load
from sqlalchemy import delete, insert
from sqlalchemy.exc import IntegrityError

from components.catalog.encodings import QUERY_ITEMS
from components.catalog.models import EncodedItem
from components.latents.ragged import Tensors, row_shape, stacked
from components.latents.reading import Held
from components.stages import Bench, canonical_json
from components.storage import atomic_write
from components.tensors import to_safetensors
from components.workspace import pieces_lock

SHARD_ITEMS = 1024
MAX_SHARD_ITEMS = 4096  # when several processes have brought more together
KEYS = "keys"  # in a piece's header: its rows' items, as JSON


class Pieces:
    """The pieces of one encoder, anybody's."""

    def __init__(self, bench: Bench, encoder: str, held: Held):
        self._bench, self._encoder, self._held = bench, encoder, held
        self._folder = bench.workspace.pieces / hashlib.sha256(encoder.encode()).hexdigest()[:32]
        self._lock = pieces_lock(bench.workspace, self._folder)
        self._keys: dict[Path, frozenset[str]] = {}

    def write(self, rows: Sequence[tuple[str, Tensors]]) -> None:
        """Keep the rows of some items, in a piece for each shape that they have."""
        for shape, of_shape in _by_shape(rows).items():
            tensors = stacked([row for _, row in of_shape])
            data = to_safetensors(tensors, {KEYS: json.dumps([key for key, _ in of_shape])})
            with atomic_write(self._folder / f"{shape}-{hashlib.sha256(data).hexdigest()}") as file:
                file.write(data)

    def keys(self) -> set[str]:
        """The items of all pieces. What is sealed meanwhile is in the catalog before it is missing here."""
        return {key for path in self._paths() for key in self.keys_of(path)}

    def seal(self, keys: set[str]) -> None:
        """Make shards of every piece with an item of `keys` and of whatever has the same shape."""
        with FileLock(self._lock):
            paths = self._paths()
            for shape in {_shape_of(path) for path in paths if keys & self.keys_of(path)}:
                self._seal([path for path in paths if _shape_of(path) == shape])

    def seal_alone(self, keys: set[str]) -> None:
        """Make shards of every piece with an item of `keys`, and of no other, whoever is writing some meanwhile."""
        with FileLock(self._lock):
            wanted = [path for path in self._paths() if keys & self.keys_of(path)]
            for shape in sorted({_shape_of(path) for path in wanted}):
                self._seal([path for path in wanted if _shape_of(path) == shape])

    def seal_full(self) -> None:
        """Make shards where there is enough for one, unless another process is at it."""
        rows: dict[str, int] = {}
        for path in self._paths():
            rows[_shape_of(path)] = rows.get(_shape_of(path), 0) + len(self.keys_of(path))
        full = [shape for shape, count in rows.items() if count >= SHARD_ITEMS]
        try:
            with FileLock(self._lock, blocking=False):
                for shape in full:
                    self._seal([path for path in self._paths() if _shape_of(path) == shape])
        except Timeout:
            return

    def _seal(self, paths: Sequence[Path]) -> None:
        """Make shards of the rows of some pieces, which are of one shape."""
        rows = {key: row for path in paths for key, row in _rows_in(path)}
        done = self._held(list(rows))  # by one who was killed before the pieces went
        keys = sorted(rows.keys() - done)
        shards = -(-len(keys) // MAX_SHARD_ITEMS)
        for i in range(shards):
            self._commit({key: rows[key] for key in keys[i::shards]})
        for path in paths:
            path.unlink(missing_ok=True)
            self._keys.pop(path, None)

    def _commit(self, rows: Mapping[str, Tensors]) -> None:
        tensors = stacked(list(rows.values()))
        ref = self._bench.store.put(to_safetensors(tensors, {"encoder": self._encoder}))
        keys = list(rows)
        with suppress(IntegrityError), self._bench.catalog.write() as session:  # a host of no common locks was faster
            for start in range(0, len(keys), QUERY_ITEMS):  # of shards that were damaged
                of_items = EncodedItem.item.in_(keys[start : start + QUERY_ITEMS])
                session.execute(delete(EncodedItem).where(EncodedItem.encoder == self._encoder, of_items))
            session.execute(
                insert(EncodedItem),
                [
                    {"encoder": self._encoder, "item": key, "shard": ref.sha256, "row": row}
                    for row, key in enumerate(keys)
                ],
            )

    def _paths(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(path for path in self._folder.iterdir() if not path.name.startswith("."))

    def keys_of(self, path: Path) -> frozenset[str]:
        """The items of one piece; none where it is gone or damaged."""
        if path not in self._keys:
            try:
                with path.open("rb") as file:
                    self._keys[path] = frozenset(_keys_in(file))
            except (FileNotFoundError, ValueError, KeyError, TypeError):  # sealed by another, or damaged
                return frozenset()
        return self._keys[path]


def _by_shape(rows: Sequence[tuple[str, Tensors]]) -> dict[str, list[tuple[str, Tensors]]]:
    """The rows by a digest of their shape without the length of texts: those that can be stacked."""
    found: dict[str, list[tuple[str, Tensors]]] = {}
    for key, row in rows:
        shape = row_shape({name: tensor[None] for name, tensor in row.items()})
        found.setdefault(hashlib.sha256(canonical_json(shape)).hexdigest()[:8], []).append((key, row))
    return found


def _shape_of(path: Path) -> str:
    return path.name.partition("-")[0]


def _rows_in(path: Path) -> Iterator[tuple[str, Tensors]]:
    """The rows of a piece; none where its bytes are not what its name says, or where it is gone."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    if hashlib.sha256(data).hexdigest() != path.name.partition("-")[2]:
        return
    tensors = load(data)
    for row, key in enumerate(_keys_in(BytesIO(data))):
        yield key, {name: tensor[row] for name, tensor in tensors.items()}


def _keys_in(piece: IO[bytes]) -> list[str]:
    """The items that a piece's header names. safetensors' own reader opens a file twice, and between may be its end."""
    header = json.loads(piece.read(int.from_bytes(piece.read(8), "little")))
    return json.loads(header["__metadata__"][KEYS])
