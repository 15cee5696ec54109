"""The process that has torch at work for curation: models look at pictures that they have not seen yet."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from components.latents.ahead import ahead
from components.latents.crews import WORTH_A_CREW, Task, bench_at, encode_by_crew, resident
from components.latents.encoding import Encode
from components.latents.keys import Item
from components.latents.ragged import Tensors
from components.shards import run_shards
from components.stages import Bench
from components.workspace import Workspace

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


class Wanted(NamedTuple):
    """A picture to score: what its score is kept under, and what a judge reads."""

    item: str
    sha256: str
    caption: str


@dataclass(frozen=True, slots=True)
class Part:
    """Pictures for one process to score by one check."""

    workspace: Workspace
    catalog_url: str
    name: str
    check: CheckConfig
    device: str
    pictures: tuple[Wanted, ...]

    def __str__(self) -> str:
        return f"{self.name} of {self.pictures[0].sha256[:12]}… and {len(self.pictures) - 1} more pictures"


def _score(bench: Bench, plugin: Plugin, check: CheckConfig, pictures: Pictures, device: str,
           on_progress: OnProgress) -> int:
    """Scores that are not known yet, by the workspace's crew where there are enough; the model is loaded only if there
    are such. A kill costs the parts at work."""
    name = measure_name(plugin.name, plugin.revision(check))
    asked = [Wanted(item_of(plugin, rgb_digest, caption), sha256, caption)
             for rgb_digest, sha256, captions in pictures for caption in captions]
    wanted = {one.item: one for one in asked}
    known = known_figures(bench.catalog, name, wanted)
    missing = [one for one in wanted.values() if one.item not in known]
    if not missing:
        return 0
    parts = [Part(bench.workspace, bench.workspace.catalog_url, plugin.name, check, device,
                  tuple(missing[start : start + CHUNK])) for start in range(0, len(missing), CHUNK)]
    looked = 0

    def commit(part: Part, scores: Sequence[float]) -> None:
        nonlocal looked
        for one, score in zip(part.pictures, scores, strict=True):
            if not math.isfinite(score):
                raise StageFailed(f"curation.checks.{plugin.name} gives {score} for the picture {one.sha256[:12]}…")
        remember_figures(bench.catalog, name, {one.item: np.array([score])
                                               for one, score in zip(part.pictures, scores, strict=True)})
        looked += len(part.pictures)
        on_progress(len(known) + looked, len(wanted))

    crew = bench.workspace.encoding_crew(torch.cuda.device_count())
    if crew.alone or len(missing) < WORTH_A_CREW:
        judge = plugin.load(check, device)
        for part in parts:
            commit(part, _scores(bench, judge, part.pictures))
    else:
        run_shards(score_part, parts, commit, crew, named=str)
    return looked


def score_part(part: Part) -> list[float]:
    """The score of each picture. Runs in a process of the crew."""
    plugin = plugins({part.name: part.check})[part.name]
    name = measure_name(plugin.name, plugin.revision(part.check))
    judge = resident(name, lambda: plugin.load(part.check, part.device))
    return _scores(bench_at(part.workspace, part.catalog_url), judge, part.pictures)


def _scores(bench: Bench, judge: Judge, pictures: Sequence[Wanted]) -> list[float]:
    images = [image for _, image in ahead(pictures, lambda one: decode(bench.store.read(one.sha256)))]
    return [float(score) for score in judge(images, [one.caption for one in pictures])]


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
