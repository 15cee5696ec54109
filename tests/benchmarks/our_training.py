"""Runs Safelight's caching and fine-tuning, in a process of its own, with the random numbers of another program.

    python -m tests.benchmarks.our_training request.json result.json

What the other program drew (noise, times, the autoencoder's sample, the order of samples, the adapter it starts with)
takes the place of what Safelight draws. Safelight still makes its own draws, so their cost stays in the measurement.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401  before the clock runs, as in the script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

from components.catalog.encodings import locate
from components.config import BaseModelConfig, load_recipe
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate, curate_key
from components.diffusion.draws import Draw, Draws
from components.families.bases import BaseModel, resolve_base
from components.latents.caching import cache_latents
from components.latents.encoding import encode_missing, pixels_of
from components.latents.keys import (
    Item,
    caption_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
    training_size,
    training_sizing,
)
from components.latents.reading import ShardReader
from components.stages import Bench
from components.training import finetune
from components.workspace import Workspace
from tests.benchmarks.paired import Steps, answer

TIMES = 1000


@dataclass(frozen=True, slots=True)
class Recording:
    """What another program drew in each of S steps of B samples."""

    noise: Tensor  # (S, B, C, h, w)
    posterior: Tensor  # (S, B, C, h, w)
    time: Tensor  # (S, B) int64, of TIMES
    batches: tuple[tuple[str, ...], ...]  # sha256 of each sample
    start: dict[str, Tensor]  # the adapter before the first step
    end: dict[str, Tensor]  # and after the last

    @classmethod
    def load(cls, path: Path, order: Sequence[Sequence[str]], rows: Sequence[SampleRow]) -> "Recording":
        tensors, sha256_of = load_file(path), {Path(row.file_name).name: row.sha256 for row in rows}
        return cls(
            tensors["noise"],
            tensors["posterior"],
            tensors["time"],
            tuple(tuple(sha256_of[name] for name in names) for names in order),
            *(
                {name.removeprefix(when): value for name, value in tensors.items() if name.startswith(when)}
                for when in ("start/", "end/")
            ),
        )

    def play(self) -> dict[str, nn.Parameter]:
        """Make this process's fine-tuning follow it; what this returns will hold the parameters that it trains."""
        ours, add_adapter, recording = finetune.batches_from, finetune.add_adapter, self
        trained: dict[str, nn.Parameter] = {}

        def batches_from(step: int, ids: Sequence[str], *args: Any, **options: Any) -> Iterator[list[int]]:
            place = {sample_id: i for i, sample_id in enumerate(ids)}
            for batch, _ in zip(recording.batches[step:], ours(step, ids, *args, **options), strict=False):
                yield [place[sample_id] for sample_id in batch]

        def added(denoiser: Any, *args: Any) -> list[tuple[str, nn.Parameter]]:
            trained.update(parameters := add_adapter(denoiser, *args))
            assert set(trained) == set(recording.start)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(recording.start[name])
            return parameters

        finetune.Draws = lambda seed, stratified: ReplayedDraws(seed, stratified, recording)
        finetune.batches_from, finetune.add_adapter = batches_from, added
        return trained

    def distance(self, trained: Mapping[str, Tensor]) -> float:
        """How far adapters ended apart, in units of how far they came; both by the largest change of any weight."""
        apart = max((trained[name] - end).abs().max().item() for name, end in self.end.items())
        return apart / max((self.start[name] - end).abs().max().item() for name, end in self.end.items())


@dataclass(frozen=True, slots=True)
class ReplayedDraw(Draw):
    recording: Recording | None = None

    def normal(self, shape: Sequence[int], purpose: str = "noise") -> Tensor:
        Draw.normal(self, shape, purpose)
        assert self.recording
        return {"noise": self.recording.noise, "posterior": self.recording.posterior}[purpose][self.step]

    def uniform(self, size: int, purpose: str = "time") -> Tensor:
        drawn = Draw.uniform(self, size, purpose)
        assert self.recording and self.sample_ids == self.recording.batches[self.step]
        return (self.recording.time[self.step].double() + 0.5) / TIMES if purpose == "time" else drawn


@dataclass(frozen=True, slots=True)
class ReplayedDraws(Draws):
    recording: Recording | None = None

    def __call__(self, step: int, sample_ids: Sequence[str], earlier: Sequence[str] = ()) -> Draw:
        return ReplayedDraw(self.seed, step, tuple(sample_ids), tuple(earlier), recording=self.recording)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A curated data set in a workspace, and the base to train."""

    bench: Bench
    base: BaseModel
    rows: tuple[SampleRow, ...]
    training: Any

    @classmethod
    def open(cls, home: Path, recipe_path: Path) -> "Prepared":
        """Curated on the first opening, read after that."""
        recipe, bench = load_recipe(recipe_path), Bench.open(Workspace(home))
        bench.catalog.migrate()
        base = resolve_base(BaseModelConfig(model=recipe.base.model))
        size = training_size(base, recipe.training)
        key, scanned = curate_key(bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=size)
        product = curate(
            bench, recipe.data, recipe.curation, dataset=recipe.name, training_size=size, scanned=scanned, key=key
        )
        rows = tuple(read_manifest(bench.store, product.facts["digest"]))
        return cls(bench, base, rows, recipe.training)

    def items(self) -> dict[str, Item]:
        """By file name."""
        sizing = training_sizing(self.base, self.training)
        return {Path(row.file_name).name: sample_item(row, *placements(row, sizing)) for row in self.rows}

    def cache(self) -> None:
        """The caching stage; latents in float32, where its own are float16, so that losses can be compared."""
        encoder = None

        def encode(batch: list[Item]) -> dict[str, Tensor]:
            nonlocal encoder
            encoder = encoder or self.base.architecture.load_pixel_encoder(self.base.path, "cpu")
            return encoder.encode(pixels_of(self.bench.store, batch))

        encode_missing(
            self.bench, pixel_encoder_key(self.base), list(self.items().values()), encode, lambda count: None
        )
        cache_latents(
            self.bench, self.rows, self.base, training_sizing(self.base, self.training), lambda done, total: None
        )

    def write_latents(self, path: Path) -> None:
        """Each picture's moments (2 C, h, w), as the autoencoder puts them, and its prompt embedding (L, D)."""
        items, captions = self.items(), {Path(row.file_name).name: row.text for row in self.rows}
        latents, prompts = (
            ShardReader(self.bench.store, locate(self.bench.catalog, encoder, keys))
            for encoder, keys in (
                (pixel_encoder_key(self.base), [item.key for item in items.values()]),
                (prompt_encoder_key(self.base), [caption_item(text).key for text in captions.values()]),
            )
        )
        tensors = {}
        for name, item in items.items():
            posterior = latents([item.key])
            tensors[f"{name}/moments"] = torch.cat([posterior["mean"][0], posterior["logvar"][0]])
            tensors[f"{name}/prompt_embeds"] = prompts([caption_item(captions[name]).key])["prompt_embeds"][0]
        save_file(tensors, path)


def run(request: dict[str, Any]) -> dict[str, Any]:
    prepared = Prepared.open(Path(request["home"]), Path(request["recipe"]))
    recording = Recording.load(Path(request["recording"]), request["order"], prepared.rows)
    trained = recording.play()
    steps = Steps()

    def look_on(event: dict[str, Any]) -> None:
        if "loss" in event:
            steps.note(event["loss"])

    steps.begin()
    prepared.cache()
    finetune.fine_tune(
        prepared.bench,
        prepared.rows,
        prepared.base,
        prepared.training,
        Path(request["home"]) / "work",
        on_event=look_on,
        should_stop=lambda: False,
    )
    return steps.facts() | {"adapter_distance": recording.distance(trained)}


if __name__ == "__main__":
    answer(run)
