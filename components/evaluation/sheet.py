"""The contact sheet of a gallery: a block of columns per prompt, rows of base, champion, candidate and a reference."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image

from components.curation.manifest import SampleRow
from components.curation.pixels import decode
from components.evaluation.generation import Picture, Request
from components.storage import Store

COLUMNS = 12
BLOCKS = 3
CELL = 96  # pixels
GAP = 4


def contact_sheet(
    store: Store,
    galleries: Mapping[str, Sequence[Picture]],
    requests: Sequence[Request],
    positions: Sequence[int],
    references: Sequence[SampleRow],
) -> Image.Image:
    """At most BLOCKS x COLUMNS prompts; under each the models' pictures and last the original of its caption."""
    by_caption = {row.text: row.sha256 for row in references}
    models = list(galleries)
    shown = min(len(requests), COLUMNS * BLOCKS)
    blocks = -(-shown // COLUMNS)
    height = (len(models) + 1) * (CELL + GAP) + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, blocks * height + GAP), "white")
    for i in range(shown):
        left, top = GAP + i % COLUMNS * (CELL + GAP), GAP + i // COLUMNS * height
        column = [galleries[role][positions[i]].sha256 for role in models] + [by_caption[requests[i].prompt]]
        for line, sha256 in enumerate(column):
            image = _open(store, sha256).resize((CELL, CELL), Image.Resampling.LANCZOS)
            sheet.paste(image, (left, top + line * (CELL + GAP)))
    return sheet


def _open(store: Store, sha256: str) -> Image.Image:
    data = store.read(sha256)
    return Image.open(io.BytesIO(data)).convert("RGB") if data.startswith(b"\x89PNG") else decode(data)
