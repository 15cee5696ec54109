"""Cached rows: which shards are intact, and reading rows out of memory-mapped ones."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence

from safetensors import SafetensorError
from safetensors.torch import load_file

from components.catalog.encodings import Places, locate
from components.errors import DamagedArtifact, LatentCacheMismatch
from components.latents.ragged import Tensors, stacked
from components.stages import Bench, intact
from components.storage import ObjectRef, Store, sha256_of


class Held:
    """Which items lie in shards that are intact; a shard that is counts as such for the life of this."""

    def __init__(self, bench: Bench, encoder: str):
        self._bench, self._encoder = bench, encoder
        self._intact: set[str] = set()

    def __call__(self, keys: Sequence[str]) -> set[str]:
        places = locate(self._bench.catalog, self._encoder, keys)
        if unknown := {shard for shard, _ in places.values()} - self._intact:
            self._intact |= intact(self._bench, unknown)
        return {key for key, (shard, _) in places.items() if shard in self._intact}


def shard_refs(store: Store, places: Iterable[tuple[str, int]]) -> dict[str, ObjectRef]:
    """The objects behind some places, for a stage's manifest."""
    return {
        shard: ObjectRef(shard, store.path(shard).stat().st_size) for shard in sorted({shard for shard, _ in places})
    }


class ShardReader:
    """Reads cached rows by key from memory-mapped shards: only the rows that are asked for come into memory.

    A shard's size is checked when it is first opened, and its bytes against its name: by `check`, which may take its
    time (see Watch), else at once.
    """

    def __init__(self, store: Store, places: Places, check: Callable[[str], None] | None = None):
        self._store, self._places = store, places
        self._check = check or self._require_intact
        self._open: dict[str, Tensors] = {}

    def __call__(self, keys: Sequence[str]) -> Tensors:
        """The rows of `keys`, in that order, each tensor (B, ...).

        Raises LatentCacheMismatch when a key is unknown, DamagedArtifact when its shard is gone or altered.
        """
        return stacked([self._row(key) for key in keys])

    def _row(self, key: str) -> Tensors:
        if key not in self._places:
            raise LatentCacheMismatch(f"no cached item {key}; run the caching stage again")
        shard, row = self._places[key]
        if shard not in self._open:
            self._open[shard] = self._opened(shard)
        return {name: tensor[row] for name, tensor in self._open[shard].items()}

    def _opened(self, shard: str) -> Tensors:
        try:
            tensors = load_file(self._store.path(shard))
        except FileNotFoundError:
            raise DamagedArtifact(
                f"object {shard} is gone from {self._store.root}; run the stage that made it again"
            ) from None
        except SafetensorError:  # its header, or a size that is not what the header says
            raise altered(self._store, shard) from None
        self._check(shard)
        return tensors

    def _require_intact(self, shard: str) -> None:
        if sha256_of(self._store.path(shard)) != shard:
            raise altered(self._store, shard)


def altered(store: Store, sha256: str) -> DamagedArtifact:
    return DamagedArtifact(f"object {sha256} in {store.root} was altered; run the stage that made it again")


class Watch:
    """Checks shards against their names in a thread of its own while they are read already; unchanged ones are known.

    What was read of them must not be published before `require_intact()`.
    """

    def __init__(self, bench: Bench):
        self._bench = bench
        self._asked: queue.Queue[str] = queue.Queue()
        self._seen: set[str] = set()
        self._failed: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def __call__(self, shard: str) -> None:
        """Have a shard checked. Raises what an earlier one was found to be."""
        self._raise_found()
        if shard in self._seen:
            return
        self._seen.add(shard)
        self._asked.put(shard)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="verification", daemon=True)
            self._thread.start()

    def require_intact(self) -> None:
        """Wait until every shard that was opened is checked. Raises DamagedArtifact when one is gone or altered."""
        self._asked.join()
        self._raise_found()

    def _raise_found(self) -> None:
        if self._failed:
            raise self._failed[0]

    def _work(self) -> None:
        while True:
            shard = self._asked.get()
            try:
                if not intact(self._bench, [shard]):
                    self._failed.append(altered(self._bench.store, shard))
            except BaseException as error:  # whoever waits for this thread is told
                self._failed.append(error)
            finally:
                self._asked.task_done()
