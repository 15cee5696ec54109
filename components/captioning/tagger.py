"""The WD taggers, third version: scores of danbooru tags through ONNX Runtime, for drawings and anime.

Input (B, side, side, 3) float32, BGR in 0 to 255, the picture padded to a white square; output (B, tags) in [0, 1].
Source: the Space SmilingWolf/wd-tagger, app.py.
"""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from components.captioning.captioner import CaptionContext, CaptionResult, Generation
from components.captioning.weights import Weights
from components.catalog.captions import Tag
from components.errors import BadInput

if TYPE_CHECKING:
    import torch

CATEGORIES = {"0": "general", "4": "character", "9": "rating"}  # as danbooru numbers them
LEAST_SCORE = 0.1  # below, a tag is not kept: thresholds are the recipe's, and may change without a second look
WORD = re.compile(r"[^\W_]{2}")  # a tag without one is a face, such as >_<, whose underscore is its mouth


class WdTagger:
    """`model.onnx` with `selected_tags.csv`; needs no prompt."""

    name = "wd"
    kind = "tags"
    needs_gpu = False
    default_prompt = ""
    settings = ""

    def __init__(self, weights: Weights, generation: Generation):
        self.weights, self.revision, self.max_batch = weights, weights.revision, 64
        self._session: Any = None
        self._side = 0
        self._tags: list[tuple[str, str]] = []

    def load(self, device: str, dtype: "torch.dtype", offline: bool) -> None:
        """Raises BadInput where ONNX Runtime is missing, or the files are, or do not go together."""
        try:
            import onnxruntime
        except ImportError:
            raise BadInput("captioner wd: needs onnxruntime; pip install 'safelight[caption]'") from None
        folder = self.weights.fetched(offline)
        said = f"captioner wd={self.weights.source}"
        missing = [name for name in ("model.onnx", "selected_tags.csv") if not (folder / name).is_file()]
        if missing:
            raise BadInput(f"{said}: has no {missing[0]}; choose a WD tagger of the third version")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = onnxruntime.get_available_providers()
        wanted = ["CUDAExecutionProvider"] if device != "cpu" else []
        providers = [name for name in (*wanted, "CPUExecutionProvider") if name in providers]
        try:
            self._session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=providers)
        except Exception as error:  # onnxruntime's own classes share no base
            raise BadInput(f"{said}: model.onnx cannot be loaded: {' '.join(str(error).split())[:200]}") from None
        batch, self._side = self._session.get_inputs()[0].shape[:2]
        self.max_batch = batch if isinstance(batch, int) else self.max_batch
        self._tags = _read_tags(folder / "selected_tags.csv")
        scores = self._session.get_outputs()[0].shape[-1]
        if isinstance(scores, int) and scores != len(self._tags):
            raise BadInput(
                f"{said}: the model scores {scores} tags, selected_tags.csv lists {len(self._tags)}; fetch"
                " both from one commit"
            )

    def caption(self, images: "Sequence[Image.Image]", contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        pixels = np.stack([_prepared(image, self._side) for image in images])
        scores = self._session.run(None, {self._session.get_inputs()[0].name: pixels})[0]  # (B, tags)
        return [CaptionResult(tags=self._scored(row)) for row in scores]

    def _scored(self, scores: NDArray[np.float32]) -> tuple[Tag, ...]:
        order = np.argsort(-scores, kind="stable")
        return tuple(
            (self._tags[i][0], round(float(scores[i]), 4), self._tags[i][1]) for i in order if scores[i] >= LEAST_SCORE
        )


def _read_tags(path: Path) -> list[tuple[str, str]]:
    """(tag, category) in the order of the model's scores. Raises BadInput."""
    with path.open(encoding="utf-8", newline="") as file:
        try:
            return [
                (_spelled(row["name"]), CATEGORIES.get(row["category"], row["category"]))
                for row in csv.DictReader(file)
            ]
        except (KeyError, UnicodeDecodeError, csv.Error):
            raise BadInput(f"{path}: expected a table with the columns name and category; fetch it again") from None


def _spelled(tag: str) -> str:
    return tag.replace("_", " ") if WORD.search(tag) else tag


def _prepared(image: Image.Image, side: int) -> NDArray[np.float32]:
    """(side, side, 3), BGR: the picture in the middle of a white square."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (255, 255, 255))
    square.paste(image.convert("RGB"), ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.float32)[:, :, ::-1]
