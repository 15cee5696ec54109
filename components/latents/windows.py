"""The windows that saliency chooses, found once per picture and bucket and kept as latents are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from components.catalog.encodings import locate
from components.curation.manifest import SampleRow
from components.curation.pixels import decode
from components.latents.buckets import Sizing
from components.latents.crews import Task, encode_by_crew
from components.latents.encoding import Encode
from components.latents.keys import Item, Windows, window_encoder_key, window_item
from components.latents.ragged import Tensors
from components.latents.reading import ShardReader
from components.latents.saliency import salient_corner
from components.stages import Bench

CHUNK = 4096  # windows read at once


def window_items(rows: Sequence[SampleRow], sizing: Sizing) -> list[Item]:
    """Every window that has to be chosen, each once: of pictures that stand out of their buckets."""
    if sizing.crop != "smart":
        return []
    items = (
        window_item(row, placement)
        for row in rows
        for placement in sizing.place(row.width, row.height)
        if placement.slack != (0, 0)
    )
    return list({item.key: item for item in items}.values())


def find_windows(
    bench: Bench, rows: Sequence[SampleRow], sizing: Sizing, on_progress: Callable[[int, int], None]
) -> Windows:
    """The windows of all rows; those that are not known yet are looked for in the pictures."""
    items, done = window_items(rows, sizing), 0
    if not items:
        return {}

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, len(items))

    encode_by_crew(bench, [Task(SalientWindows(), [items], advance)])
    return known_windows(bench, rows, sizing)


@dataclass(frozen=True, slots=True)
class SalientWindows:
    """Corners (left, top) of windows, int32; no model is asked."""

    @property
    def key(self) -> str:
        return window_encoder_key()

    def prepare(self, bench: Bench, item: Item) -> tuple[int, int]:
        assert item.placement is not None
        return salient_corner(decode(bench.store.read(item.bytes_sha256)), item.placement)

    def load(self) -> Encode:
        return _as_tensor


def _as_tensor(corners: list[tuple[int, int]]) -> Tensors:
    return {"window": torch.tensor(corners, dtype=torch.int32)}


def known_windows(bench: Bench, rows: Sequence[SampleRow], sizing: Sizing) -> Windows:
    """The windows of all rows that have been found."""
    places = locate(bench.catalog, window_encoder_key(), [item.key for item in window_items(rows, sizing)])
    reader, keys, windows = ShardReader(bench.store, places), list(places), {}
    for start in range(0, len(keys), CHUNK):
        part = keys[start : start + CHUNK]
        for key, (left, top) in zip(part, reader(part)["window"].tolist(), strict=True):
            windows[key] = (left, top)
    return windows
