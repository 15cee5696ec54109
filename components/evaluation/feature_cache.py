"""Image features, embedded once per picture and embedder: the latent cache's way of keeping things, for metrics."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from components.catalog.encodings import locate
from components.curation.manifest import SampleRow
from components.curation.pixels import decode
from components.evaluation.embedders import Embedder
from components.evaluation.generation import Picture
from components.families.bases import BaseModel
from components.latents.buckets import fit
from components.latents.encoding import encode_missing
from components.latents.keys import Item, placements, sample_item, usual_sizing
from components.latents.ragged import Tensors
from components.latents.reading import ShardReader
from components.stages import Bench


def features_of(
    bench: Bench,
    embedder: Embedder,
    items: Sequence[Item],
    open_image: Callable[[Item], Image.Image],
    on_progress: Callable[[int], None],
) -> NDArray[np.float32]:
    """(n, dim) features of `items`, in their order; only those not yet embedded are opened."""
    if not items:
        return np.empty((0, embedder.dim), dtype=np.float32)
    encoder = f"features:{embedder.name}:{embedder.revision}"

    def encode(images: list[Image.Image]) -> Tensors:
        return {"features": torch.from_numpy(embedder(images))}

    encode_missing(bench, encoder, items, encode, on_progress, prepare=open_image)
    keys = [item.key for item in items]
    return ShardReader(bench.store, locate(bench.catalog, encoder, keys))(keys)["features"].numpy()


def features_of_gallery(bench: Bench, embedder: Embedder, pictures: Sequence[Picture]) -> NDArray[np.float32]:
    """(n, dim) features of drawn pictures, in their order."""
    drawn = {picture.sha256: picture for picture in pictures}
    items = [Item(picture.sha256, picture.sha256) for picture in pictures]
    return features_of(bench, embedder, items, lambda item: open_drawn(bench, drawn[item.bytes_sha256]), lambda _: None)


def open_drawn(bench: Bench, picture: Picture) -> Image.Image:
    """A drawn picture's pixels, RGB."""
    return Image.open(io.BytesIO(bench.store.read(picture.sha256))).convert("RGB")


class EmbeddedSamples:
    """Samples of a split with the features of their pixels at training size, and their concepts.

    The picture's centre is looked at however training crops: references stay the same when that changes.
    """

    def __init__(self, bench: Bench, embedder: Embedder, rows: Sequence[SampleRow], base: BaseModel, resolution: int):
        self.rows = list(rows)
        sizing = usual_sizing(base, resolution)
        items = [sample_item(row, *placements(row, sizing)) for row in self.rows]

        def open_image(item: Item) -> Image.Image:
            assert item.placement is not None
            return fit(decode(bench.store.read(item.bytes_sha256)), item.placement)

        self.features = features_of(bench, embedder, items, open_image, lambda _: None)
        self.concepts = [row.group or row.text for row in self.rows]
