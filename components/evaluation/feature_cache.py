"""Image features, embedded once per picture and embedder: the latent cache's way of keeping things, for metrics."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from components.evaluation.embedders import Embedder
from components.latents.encoding import ShardReader, Tensors, encode_missing, locate
from components.latents.keys import Item
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

    def encode(batch: list[Item]) -> Tensors:
        return {"features": torch.from_numpy(embedder([open_image(item) for item in batch]))}

    encode_missing(bench, encoder, items, encode, on_progress)
    keys = [item.key for item in items]
    return ShardReader(bench.store, locate(bench.catalog, encoder, keys))(keys)["features"].numpy()
