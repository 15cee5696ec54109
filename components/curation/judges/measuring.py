"""The process that has torch at work for curation: models look at pictures that they have not seen yet."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from components.config import CheckConfig
from components.curation.judges.plugins import Judge, Plugin, plugins
from components.curation.judging import item_of, measure_name
from components.curation.measured import known_figures, remember_figures
from components.curation.pixels import decode
from components.errors import StageFailed
from components.evaluation.embedders import load_embedder
from components.evaluation.model_sources import feature_key
from components.latents.crews import Task, encode_by_crew
from components.latents.encoding import Encode
from components.latents.keys import Item
from components.latents.ragged import Tensors
from components.stages import Bench

CHUNK = 64   # pictures scored per commit: what a kill can cost

Pictures = Sequence[tuple[str, str, Sequence[str]]]   # digest of the pixels, stored bytes, captions
OnProgress = Callable[[int, int], None]


def measure(bench: Bench, work: str, device: str, on_progress: OnProgress) -> int:
    """Do what `judging.describe_work` wrote down; returns how many pictures a model looked at."""
    asked: Mapping[str, Any] = json.loads(bench.store.read(work))
    pictures = [(rgb_digest, sha256, captions) for rgb_digest, sha256, captions in asked["pictures"]]
    checks = {name: CheckConfig(**body) for name, body in asked["checks"].items()}
    looked = sum(_score(bench, plugin, checks[name], pictures, device, on_progress)
                 for name, plugin in plugins(checks).items())
    if asked["embedder"] is not None:
        looked += _embed(bench, asked["embedder"], pictures, device, on_progress)
    return looked


def _score(bench: Bench, plugin: Plugin, check: CheckConfig, pictures: Pictures, device: str,
           on_progress: OnProgress) -> int:
    """Scores that are not known yet; the model is loaded only if there are such."""
    name = measure_name(plugin.name, plugin.revision(check))
    wanted = {item_of(plugin, rgb_digest, caption): (sha256, caption)
              for rgb_digest, sha256, captions in pictures for caption in captions}
    known = known_figures(bench.catalog, name, wanted)
    missing = iter([(item, *wanted[item]) for item in wanted if item not in known])
    judge: Judge | None = None
    looked = 0
    while chunk := list(islice(missing, CHUNK)):
        judge = judge or plugin.load(check, device)
        scores = judge([decode(bench.store.read(sha256)) for _, sha256, _ in chunk], [said for *_, said in chunk])
        for (_, sha256, _), score in zip(chunk, scores, strict=True):
            if not math.isfinite(score):
                raise StageFailed(f"curation.checks.{plugin.name} gives {score} for the picture {sha256[:12]}…")
        remember_figures(bench.catalog, name,
                         {item: np.array([score]) for (item, *_), score in zip(chunk, scores, strict=True)})
        looked += len(chunk)
        on_progress(len(known) + looked, len(wanted))
    return looked


@dataclass(frozen=True, slots=True)
class Features:
    """What a recipe's embedder makes of pictures as they are, one row each."""

    embedder: str
    device: str

    @property
    def key(self) -> str:
        return feature_key(self.embedder)

    def prepare(self, bench: Bench, item: Item) -> Image.Image:
        return decode(bench.store.read(item.bytes_sha256))

    def load(self) -> Encode:
        embedder = load_embedder(self.embedder, device=self.device)

        def encode(images: list[Image.Image]) -> Tensors:
            return {"features": torch.from_numpy(embedder(images))}

        return encode


def _embed(bench: Bench, name: str, pictures: Pictures, device: str, on_progress: OnProgress) -> int:
    items, done = [Item(rgb_digest, sha256) for rgb_digest, sha256, _ in pictures], 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(done, len(items))

    return encode_by_crew(bench, [Task(Features(name, device), [items], advance)])[0]
