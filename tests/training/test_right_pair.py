"""Training sees the right pair: of every item of every batch, latent, mask, caption and name are the same picture's.

Looked at where they come together, as the objective is asked for a loss: after shuffling, resuming, sharing among two
processes, several resolutions, masks, caption wordings and dropped captions. Each of the four says by itself whose it
is: the latent decoded and compared with the pictures on disk, fitted by other code than ours; the mask, which is drawn
into the picture; the embedding, against fresh ones of every caption; the name, by the files' own digests.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageOps
from torch import Tensor

from components.config import BaseModelConfig, CurationConfig, DataConfig, DataSource, TrainingConfig
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate
from components.diffusion.draws import Draw
from components.errors import Stopped
from components.families.bases import BaseModel, resolve_base
from components.latents.caching import cache_latents
from components.latents.keys import training_sizing
from components.latents.wording import Wording
from components.stages import Bench
from components.training import finetune
from components.training.processes import ALONE, Processes, joined
from components.training.samples import CachedSamples
from components.workspace import Workspace
from tests.chain import ignore

ROOT = Path(__file__).parents[2]
NAMES = ("cat", "dog", "fish", "star", "tree", "house", "car", "apple", "moon", "sun", "book", "key")
SIZES = ((128, 128), (200, 104), (96, 150), (70, 80))  # square, wide, tall, and too small for the larger resolution
BRIGHT, DARK = (250, 225, 60), (25, 40, 110)
TRAINING = TrainingConfig(
    rank=1,
    lora_alpha=1,
    resolution=(96, 64),
    max_train_steps=6,
    train_batch_size=3,
    gradient_accumulation_steps=2,
    num_processes=2,
    checkpointing_steps=2,
    shuffle_caption=True,
    caption_wordings=4,
    keep_tokens=1,
    caption_tag_dropout_rate=0.3,
    caption_dropout_rate=0.25,
    masked_loss=True,
    preview_prompts=0,
)
ITEMS = 6 * 3 * 2 * 2  # that TRAINING sees


def write_pictures(folder: Path) -> None:
    """Each a pattern of its own, its mask where the pattern is bright; every third lies on its side."""
    folder.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        pattern = Image.fromarray(np.random.default_rng(i).integers(0, 2, (4, 4), dtype=np.uint8) * 255)
        mask = pattern.resize(SIZES[i % len(SIZES)], Image.Resampling.NEAREST)
        bright, dark = (Image.new("RGB", mask.size, colour) for colour in (BRIGHT, DARK))
        image = Image.composite(bright, dark, mask)
        exif = Image.Exif()
        if i % 3 == 0:
            image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
        image.save(folder / f"{name}.jpg", exif=exif.tobytes(), quality=95)
        mask.save(folder / f"{name}-masklabel.png")
        (folder / f"{name}.txt").write_text(f"{name}, red, small, round, old")


def write_base(folder: Path) -> None:
    """The embedded base, whose autoencoder and words are what matters here, with a denoiser that is soon through."""
    embedded = resolve_base(BaseModelConfig()).path
    shutil.copytree(embedded, folder, ignore=shutil.ignore_patterns("unet"))
    torch.manual_seed(0)
    own = UNet2DConditionModel.load_config(embedded / "unet")
    small = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    UNet2DConditionModel.from_config(own | small | kinds).save_pretrained(folder / "unet")  # type: ignore[union-attr]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the objective was given for a batch: latents (B, C, h, w), embeddings (B, L, D), cells (B, 1, h, w)."""

    step: int
    sample_ids: tuple[str, ...]
    latents: Tensor
    prompt_embeds: Tensor
    cells: Tensor


class Observed:
    """An objective that notes what it is given."""

    def __init__(self, objective: Any, notes: list[Seen]):
        self._objective, self._notes = objective, notes

    def per_sample(self, model: Any, latents: Tensor, cond: Any, draw: Draw, cells: Tensor) -> Tensor:
        note = Seen(draw.step, tuple(draw.sample_ids), latents.clone(), cond["prompt_embeds"].clone(), cells.clone())
        self._notes.append(note)
        return self._objective.per_sample(model, latents, cond, draw, cells)


@dataclass(frozen=True)
class Trial:
    """A workspace with a dozen pictures in its cache, and the embedded base with a tiny denoiser in its own's place."""

    folder: Path

    @classmethod
    def build(cls, folder: Path) -> "Trial":
        trial = cls(folder)
        write_pictures(folder / "pictures")
        write_base(folder / "base")
        trial.bench.catalog.migrate()
        data = DataConfig(sources=(DataSource(path=str(folder / "pictures"), masks="masklabel"),))
        curation = CurationConfig(near_duplicates=False, test_fraction=0)
        product = curate(trial.bench, data, curation, dataset="patterns", training_size=64)
        (folder / "snapshot").write_text(product.facts["digest"])
        sizing, wording = training_sizing(trial.base, TRAINING), Wording.of(TRAINING)
        cache_latents(trial.bench, trial.rows, trial.base, sizing, ignore, wording=wording)
        return trial

    @cached_property
    def bench(self) -> Bench:
        return Bench.open(Workspace(self.folder / "home"))

    @cached_property
    def base(self) -> BaseModel:
        return resolve_base(BaseModelConfig(model=str(self.folder / "base")))

    @cached_property
    def rows(self) -> list[SampleRow]:
        return read_manifest(self.bench.store, (self.folder / "snapshot").read_text())

    def train(
        self, work: str, training: TrainingConfig, processes: Processes = ALONE, stop_after: int | None = None
    ) -> list[Seen]:
        """What a training sees, as far as this process makes it."""
        notes: list[Seen] = []
        events: list[dict[str, Any]] = []
        objective_of = finetune.objective_of
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "objective_of", lambda *asked: Observed(objective_of(*asked), notes))
            try:
                finetune.fine_tune(
                    self.bench,
                    self.rows,
                    self.base,
                    training,
                    self.folder / work,
                    on_event=events.append,
                    should_stop=lambda: stop_after is not None and sum("loss" in e for e in events) >= stop_after,
                    processes=processes,
                )
            except Stopped:
                assert stop_after is not None
        return notes


# whose it is ------------------------------------------------------------------------------------------------------


class Witness:
    """Says to which picture latents, masks, embeddings and digests belong, from the folder and the base alone."""

    def __init__(self, trial: Trial):
        folder, base = trial.folder / "pictures", trial.base
        self.vae: Any = AutoencoderKL.from_pretrained(base.path / "vae")
        self.pictures = [ImageOps.exif_transpose(Image.open(folder / f"{name}.jpg")) for name in NAMES]
        self.masks = [Image.open(folder / f"{name}-masklabel.png") for name in NAMES]
        self.digests = [hashlib.sha256((folder / f"{name}.jpg").read_bytes()).hexdigest() for name in NAMES]
        wording = Wording.of(TRAINING)
        rows = {row.sha256: row for row in trial.rows}
        self.texts = [(text, i) for i, digest in enumerate(self.digests) for text in wording.texts(rows[digest])]
        assert all(text.startswith(NAMES[i]) for text, i in self.texts)
        encoder = base.architecture.load_prompt_encoder(base.path, "cpu")
        self.embeds = encoder.encode([text for text, _ in self.texts])["prompt_embeds"]
        self.null = encoder.encode([""])["prompt_embeds"][0]

    def check(self, seen: Seen) -> Iterator[tuple[int, bool]]:
        """Of each item the picture and whether its caption was dropped. Raises AssertionError for a wrong pair."""
        height, width = (8 * side for side in seen.latents.shape[-2:])
        pictures = torch.stack([_fitted(picture, width, height) for picture in self.pictures])
        masks = torch.stack([_fitted(mask.convert("RGB"), width, height) for mask in self.masks])[:, :1]
        with torch.no_grad():
            decoded = self.vae.decode(seen.latents / self.vae.config.scaling_factor).sample / 2 + 0.5
        for i, digest in enumerate(seen.sample_ids):
            name = self.digests.index(digest)
            assert _nearest(decoded[i], pictures) == name, "another picture's latent"
            assert _nearest(seen.cells[i], torch.nn.functional.avg_pool2d(masks, 8)) == name, "another picture's mask"
            dropped = torch.allclose(seen.prompt_embeds[i], self.null, atol=1e-4)
            if not dropped:
                place = _nearest(seen.prompt_embeds[i], self.embeds)
                assert self.texts[place][1] == name, "another picture's caption"
            yield name, dropped


def _fitted(image: Image.Image, width: int, height: int) -> Tensor:
    """(3, height, width) in [0, 1]: covering, the centre."""
    fitted = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(fitted, dtype=np.float32)).permute(2, 0, 1) / 255


def _nearest(found: Tensor, candidates: Tensor) -> int:
    """The place of the candidate that is nearest by far: twice as near as any that differs from it."""
    errors = (candidates - found).square().flatten(1).mean(1)
    best = int(errors.argmin())
    other = errors[(candidates - candidates[best]).abs().flatten(1).amax(1) > 1e-3]
    assert errors[best] < other.min() / 2, "nobody's for sure"
    return best


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    return Trial.build(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def witness(trial: Trial) -> Witness:
    return Witness(trial)


# one of two processes ---------------------------------------------------------------------------------------------


def stopped_and_resumed(rank: int, folder: Path) -> list[list[Seen]]:
    """What each of two processes sees of a training that is stopped after three steps, and of its rest."""
    trial = Trial(folder)
    with joined(rank, 2, folder) as processes:
        first = trial.train("work", TRAINING, processes, stop_after=3)
        processes.any(False)  # by now the first has written its checkpoint
        return [first, trial.train("work", TRAINING, processes)]


SECOND = """
import sys, torch
from pathlib import Path
from tests.training.test_right_pair import stopped_and_resumed
folder = Path(sys.argv[1])
torch.save([[(s.step, s.sample_ids, s.latents, s.prompt_embeds, s.cells) for s in part]
            for part in stopped_and_resumed(1, folder)], folder / "second.pt")
"""


def test_every_item_of_every_batch_is_one_pictures_latent_mask_caption_and_name(trial: Trial, witness: Witness):
    other = subprocess.Popen([sys.executable, "-c", SECOND, trial.folder], cwd=ROOT)
    ours = stopped_and_resumed(0, trial.folder)
    assert other.wait() == 0
    theirs = [[Seen(*fields) for fields in part] for part in torch.load(trial.folder / "second.pt")]
    before, after = ([*mine, *others] for mine, others in zip(ours, theirs, strict=True))
    assert {seen.step for seen in before} == {0, 1, 2} and {seen.step for seen in after} == {3, 4, 5}
    assert all(len(part) == 3 * 2 for part in (*ours, *theirs))  # steps by accumulated batches, in each process

    checked = [(name, seen, dropped) for seen in before + after for name, dropped in witness.check(seen)]
    assert len(checked) == ITEMS
    assert {name for name, _, _ in checked} == set(range(len(NAMES)))
    assert len({tuple(seen.latents.shape[-2:]) for _, seen, _ in checked}) >= 4  # buckets
    assert 0 < sum(dropped for *_, dropped in checked) < ITEMS / 2
    alone = TRAINING.model_copy(update={"num_processes": 1, "gradient_accumulation_steps": 4})
    unbroken = trial.train("unbroken", alone)
    assert _content(before + after) == _content(unbroken)  # shared and resumed, it is the same training


def _content(notes: Sequence[Seen]) -> list[tuple[Any, ...]]:
    """What was seen in which step, whoever saw it."""
    return sorted(
        (seen.step, seen.sample_ids, *(t.numpy().tobytes() for t in (seen.latents, seen.prompt_embeds, seen.cells)))
        for seen in notes
    )


# the test can fail ------------------------------------------------------------------------------------------------


def turned(values: Sequence[Any], samples: CachedSamples) -> tuple[Any, ...]:
    """Each row's value given to the next row of the same bucket: nothing else would tell that it is wrong."""
    wrong = list(values)
    for bucket in set(samples.buckets):
        rows = [i for i, other in enumerate(samples.buckets) if other == bucket]
        for row, following in zip(rows, rows[1:] + rows[:1], strict=True):
            wrong[following] = values[row]
    return tuple(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda s: replace(s, latent_keys=turned(s.latent_keys, s)), "another picture's latent"),
        (lambda s: replace(s, mask_keys=turned(s.mask_keys, s)), "another picture's mask"),
        (lambda s: replace(s, wordings=turned(s.wordings, s)), "another picture's caption"),
        (lambda s: replace(s, rows=turned(s.rows, s)), "another picture's latent"),
    ],
    ids=["latents", "masks", "captions", "names"],
)
def test_a_wrong_pair_is_noticed(
    trial: Trial,
    witness: Witness,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[CachedSamples], CachedSamples],
    said: str,
):
    cached_samples = finetune.cached_samples
    monkeypatch.setattr(finetune, "cached_samples", lambda *asked, **more: wrong(cached_samples(*asked, **more)))
    settings = {"num_processes": 1, "max_train_steps": 1, "checkpointing_steps": 1, "caption_dropout_rate": 0.0}
    notes = trial.train(str(tmp_path / "work"), TRAINING.model_copy(update=settings))
    with pytest.raises(AssertionError, match=said):
        for seen in notes:
            list(witness.check(seen))
