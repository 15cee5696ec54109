"""Encoding by a crew: processes of this machine, one to each GPU, or Ray's, fill the cache together.

They encode shares of the items to pieces (see `pieces.py`); the process that asked makes shards of them in the order of
the items, so that shards are the same to the byte however many work, and whatever they run on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeVar

import torch

from components.families.placement import release_memory
from components.heap import keep_freed_memory
from components.latents.encoding import LEASE_ITEMS, Encode, encode_missing, encode_pieces, without
from components.latents.keys import Item
from components.latents.pieces import SHARD_ITEMS, Pieces
from components.latents.ragged import Tensors
from components.latents.reading import Held
from components.shards import run_shards
from components.stages import Bench
from components.workspace import Workspace

SHARE_ITEMS = 2 * LEASE_ITEMS  # handed to a process at once; a whole number of them makes a shard
WORTH_A_CREW = 2 * SHARE_ITEMS  # items; fewer are encoded before other processes have loaded a model

Model = TypeVar("Model")


class Encoding(Protocol):
    """What encodes items, as it can be handed to another process: a frozen dataclass of plain values."""

    @property
    def key(self) -> str:
        """The encoder's, see `keys.py`."""
        ...

    def prepare(self, bench: Bench, item: Item) -> Any:
        """An item's input, made in a thread ahead of the encoder."""
        ...

    def load(self) -> Encode:
        """The encoder itself, in memory."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """Items to encode, in groups whose items are encoded to tensors of one shape."""

    encoding: Encoding
    groups: Sequence[Sequence[Item]]
    on_progress: Callable[[int], None] = lambda count: None  # called with the number of items that are done more


@dataclass(frozen=True, slots=True)
class Share:
    """Items for one process to encode."""

    workspace: Workspace
    catalog_url: str  # processes of other hosts do not have this one's environment
    encoding: Encoding
    items: tuple[Item, ...]
    task: int  # whose share it is, by number
    ends_shard: bool

    def __str__(self) -> str:
        first, last = (item.file_name or item.caption[:40] or item.key for item in (self.items[0], self.items[-1]))
        return f"{first} to {last} ({len(self.items)} items to encode)"


def encode_by_crew(bench: Bench, tasks: Sequence[Task]) -> list[int]:
    """`encode_missing` for each group of each task; returns how many items of each task were encoded.

    Where there is enough to do, the workspace's crew does it. Raises what `encode_missing` and `run_shards` raise.
    """
    crew = bench.workspace.encoding_crew(torch.cuda.device_count())
    if crew.alone:
        return [_encode_here(bench, task) for task in tasks]
    work = [_Work(bench, task) for task in tasks]
    if sum(one.left for one in work) < WORTH_A_CREW:
        return [_encode_here(bench, task) for task in tasks]
    for one in work:
        one.task.on_progress(one.total - one.left)

    def commit(share: Share, count: int) -> None:
        work[share.task].commit(share, count)

    while any(one.left for one in work):
        shares = (share for number, one in enumerate(work) for share in one.shares(number))
        run_shards(encode_share, shares, commit, crew, named=str)
        for one in work:
            one.look_again()  # nothing is left, unless a piece was damaged
    return [one.encoded for one in work]


class _Work:
    """What is left of a task, and how far it is."""

    def __init__(self, bench: Bench, task: Task):
        self.task, self.encoded = task, 0
        self._bench, self._held = bench, Held(bench, task.encoding.key)
        self._pieces = Pieces(bench, task.encoding.key, self._held)
        self._groups = [list({item.key: item for item in group}.values()) for group in task.groups]
        self._unsealed: set[str] = set()
        self.total = sum(map(len, self._groups))
        self.look_again()

    def look_again(self) -> None:
        missing = (without(group, self._held([item.key for item in group])) for group in self._groups)
        self._missing = [group for group in missing if group]

    @property
    def left(self) -> int:
        return sum(map(len, self._missing))

    def shares(self, number: int) -> Iterator[Share]:
        workspace = self._bench.workspace
        for items in self._missing:
            for start in range(0, len(items), SHARE_ITEMS):
                part = tuple(items[start : start + SHARE_ITEMS])
                end = start + len(part)
                ends_shard = end % SHARD_ITEMS == 0 or end == len(items)
                yield Share(workspace, workspace.catalog_url, self.task.encoding, part, number, ends_shard)

    def commit(self, share: Share, count: int) -> None:
        self.encoded += count
        self._unsealed |= {item.key for item in share.items}
        if share.ends_shard:
            self._pieces.seal_alone(self._unsealed)
            self._unsealed = set()
        self.task.on_progress(len(share.items))


def encode_share(share: Share) -> int:
    """Encode a share's items to pieces, as far as nobody has; returns how many. Runs in a process of the crew."""
    bench, encoding = bench_at(share.workspace, share.catalog_url), share.encoding
    held = Held(bench, encoding.key)

    def encode(inputs: list[Any]) -> Tensors:
        return resident(encoding.key, encoding.load)(inputs)

    return encode_pieces(
        bench, encoding.key, share.items, encode, lambda _: None, lambda item: encoding.prepare(bench, item), held
    )


def _encode_here(bench: Bench, task: Task) -> int:
    encoding, encoder = task.encoding, None

    def encode(inputs: list[Any]) -> Tensors:
        nonlocal encoder
        if encoder is None:
            keep_freed_memory()
            encoder = encoding.load()
        return encoder(inputs)

    def prepare(item: Item) -> Any:
        return encoding.prepare(bench, item)

    try:
        return sum(
            encode_missing(bench, encoding.key, group, encode, task.on_progress, prepare=prepare)
            for group in task.groups
        )
    finally:
        if encoder is not None:
            encoder = None
            release_memory()


@cache
def bench_at(workspace: Workspace, catalog_url: str) -> Bench:
    """Of a process of the crew, opened once."""
    return Bench.at(workspace, catalog_url)


_resident: dict[str, Any] = {}


def resident(key: str, load: Callable[[], Model]) -> Model:
    """The model of this key, which stays in the memory of a process of the crew until it is asked for another."""
    if key not in _resident:
        _resident.clear()
        release_memory()
        _resident[key] = load()
    return _resident[key]
