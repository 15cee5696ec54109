"""Text in the picture: what PP-OCR finds and can read, with the weights that `rapidocr` carries (Apache-2.0)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.config import CheckConfig
from components.curation.judges.plugins import Plugin, package_revision

PACKAGES = ("rapidocr", "onnxruntime")
SURE = 0.8        # of what is read in a box; texture that only looks like lines of text reads as nothing
READ_SIDE = 960   # px; larger pictures are reduced before text is looked for


class TextArea:
    """Share of the picture, 0 to 1, that boxes around legible text take. A number plate counts like a watermark."""

    def __init__(self) -> None:
        from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]  # of the extra

        self._reader = RapidOCR(params={"Global.log_level": "error", "Global.text_score": SURE})

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [self._share(image) for image in images]

    def _share(self, image: Image.Image) -> float:
        reduced = image.convert("RGB")
        reduced.thumbnail((READ_SIDE, READ_SIDE))
        found: Any = self._reader(np.asarray(reduced)[:, :, ::-1], use_det=True, use_cls=False, use_rec=True)
        boxes = found.boxes   # (n, 4, 2) corners in order, or None
        if boxes is None or not len(boxes):
            return 0.0
        return min(1.0, float(_areas(np.asarray(boxes)).sum()) / (reduced.width * reduced.height))


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of quadrilaterals (n, 4, 2), by the shoelace formula, (n,)."""
    x, y = boxes[..., 0], boxes[..., 1]
    return np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1)) / 2


def _revision(check: CheckConfig) -> str:
    return package_revision("text_area", PACKAGES[0])


def _load(check: CheckConfig, device: str) -> TextArea:
    for package in PACKAGES:
        package_revision("text_area", package)
    return TextArea()


TEXT_AREA = Plugin("text_area", "above", "Text takes {score:.1%} of it, above {threshold:.1%}.", reads_caption=False,
                   revision=_revision, load=_load)
