"""How a recipe's pictures come to their buckets, as `safelight plan` tells it: from known sizes and headers alone."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image
from sqlalchemy import select

from components.catalog.database import Catalog
from components.catalog.models import ExaminedImage
from components.config import Recipe
from components.curation.checks import EXAMINE_VERSION
from components.curation.pixels import FORMATS, MAX_PIXELS, UnreadableImage, decode
from components.curation.scanning import ScannedFile
from components.curation.sources import Item, picture_file, read_picture
from components.latents.buckets import Bucket, Sizing, buckets
from components.latents.crops import Crop, crop_sheet
from components.latents.saliency import salient_corner
from components.storage import atomic_write

WORST = 20  # crops on the sheet
ORIENTATION = 0x0112  # the EXIF tag; from 5 on width and height change places
EXIF_LAST = "PNG"  # the format that may state it behind the pixels, where reading it would decode them
QUERY_ITEMS = 500  # digests in one SQL statement
LISTED: tuple[str, ...] = ("file_name", "width", "height", "bucket", "scale", "cropped", "padded")


@dataclass(frozen=True, slots=True)
class Placed:
    """A usable picture: how it comes to its bucket at each resolution, and how many samples it is of an epoch there."""

    item: Item
    crops: tuple[Crop, ...]
    samples: float  # its repeats; less by the share that is held out where the data names no split

    @property
    def worst(self) -> Crop:
        return max(self.crops, key=lambda crop: crop.loss)


@dataclass(frozen=True)
class Placing:
    """All usable pictures of a recipe in their buckets."""

    recipe: Recipe
    sizing: Sizing
    pictures: tuple[Placed, ...]

    @cached_property
    def samples(self) -> float:
        """Of an epoch, which shows a picture at each resolution."""
        return sum(one.samples * len(one.crops) for one in self.pictures)

    @property
    def cropped(self) -> float:
        """Mean share of the pictures that is cut off."""
        return mean(crop.share for one in self.pictures for crop in one.crops) if self.pictures else 0.0

    def smaller(self) -> dict[str, int]:
        """For each resolution, how many pictures are too small for its own buckets and take those of a smaller one."""
        found = {}
        for i, resolution in enumerate(self.sizing.resolutions):
            own = set(buckets(resolution, self.sizing.geometry))
            count = sum(one.crops[i].placement.bucket not in own for one in self.pictures)
            found |= {str(resolution): count} if count else {}
        return found

    def enlarged(self) -> dict[str, Any]:
        """How many pictures are enlarged somewhere, and the twenty that are most."""
        found = [(max(crop.scale for crop in one.crops), one) for one in self.pictures]
        found = sorted(((scale, one) for scale, one in found if scale > 1), key=lambda x: (-x[0], x[1].item.file_name))
        worst = [{"file_name": one.item.file_name, "scale": scale} for scale, one in found[:WORST]]
        return {"pictures": len(found), "worst": worst}

    def buckets(self) -> list[dict[str, Any]]:
        """For each bucket its share of training: samples and the batches that they fill in an epoch, steps of all.

        A bucket's batches go on from one epoch to the next, so nothing is dropped and no batch is short. `repeated` are
        the places of a batch that a picture takes which is in it already: the bucket has fewer samples than a batch.
        `unseen` are samples that training ends before it comes to.
        """
        members: dict[Bucket, list[tuple[Crop, Placed]]] = {}
        for one in self.pictures:
            for crop in one.crops:
                members.setdefault(crop.placement.bucket, []).append((crop, one))
        return [self._bucket(bucket, inside) for bucket, inside in sorted(members.items())]

    def _bucket(self, bucket: Bucket, inside: Sequence[tuple[Crop, Placed]]) -> dict[str, Any]:
        training = self.recipe.training
        batch = training.train_batch_size
        samples = sum(one.samples for _, one in inside)
        steps = training.max_train_steps * samples / self.samples if self.samples else 0.0
        seen = steps * batch * training.gradient_accumulation_steps * training.num_processes
        shares, padding = zip(*((crop.share, crop.padding) for crop, _ in inside), strict=True)
        return {
            "width": bucket.width,
            "height": bucket.height,
            "pictures": len(inside),
            "repeats": sum(one.item.repeats for _, one in inside),
            "samples": samples,
            "batches": math.ceil(samples / batch),
            "steps": round(steps),
            "repeated": max(0, batch - max(1, math.floor(samples))),
            "unseen": max(0, math.floor(samples - seen)),
            "cropped": {"mean": mean(shares), "worst": max(shares)},
            "padded": {"mean": mean(padding), "worst": max(padding)},
            "upscaled": sum(crop.scale > 1 for crop, _ in inside),
        }

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """A table of every picture's loss and a sheet of the worst, written into the folder; what they say."""
        if not self.pictures:
            return {"sheet": None, "table": None, "pictures": []}
        order = sorted(self.pictures, key=lambda one: (-one.worst.loss, one.item.file_name))
        table, sheet = folder / f"{name}-crops.csv", folder / f"{name}-crops.png"
        with atomic_write(table) as file:
            file.write(_csv(order).encode())
        worst = [one for one in order[:WORST] if one.worst.loss > 0]
        drawn = self._drawn(worst)
        if drawn is not None:
            with atomic_write(sheet) as file:
                file.write(drawn)
        return {
            "sheet": str(sheet) if drawn is not None else None,
            "table": str(table),
            "pictures": [_listed(one, one.worst) for one in worst],
        }

    def _drawn(self, worst: Sequence[Placed]) -> bytes | None:
        """The sheet as PNG; a picture whose pixels cannot be read is not on it."""
        shown = []
        for one in worst:
            try:
                image = decode(read_picture(one.item))
            except (OSError, UnreadableImage):
                continue
            shown.append((image, self._seen(image, one.worst), one.item.file_name))
        if not shown:
            return None
        what = "padded" if self.sizing.crop == "pad" else "cut"
        title = f"{self.recipe.name}: the {len(shown)} of {len(self.pictures)} pictures that are {what} most"
        data = io.BytesIO()
        crop_sheet(shown, title).save(data, "PNG")
        return data.getvalue()

    def _seen(self, image: Image.Image, crop: Crop) -> Crop:
        """With the window that training will see, which saliency finds in the pixels."""
        if self.sizing.crop != "smart":
            return crop
        return replace(crop, placement=crop.placement.at(salient_corner(image, crop.placement)))


def place_pictures(catalog: Catalog, files: Sequence[ScannedFile], recipe: Recipe, sizing: Sizing) -> Placing:
    """The usable pictures, each in its buckets. Sizes are what a curation found; other files' headers are read."""
    known = _known_sizes(catalog, [file.sha256 for file in files if file.sha256])
    stated = any(file.item.split for file in files if not file.item.is_reg)
    placed = []
    for file in files:
        item = file.item
        if item.problem is not None or item.location is None:
            continue
        size = known[file.sha256] if file.sha256 in known else _size_in_header(item)
        if size is None:
            continue
        trained = float(item.split != "test") if stated or item.is_reg else 1 - recipe.curation.test_fraction
        crops = tuple(Crop(*size, placement) for placement in sizing.place(*size))
        placed.append(Placed(item, crops, item.repeats * trained))
    return Placing(recipe, sizing, tuple(placed))


def _known_sizes(catalog: Catalog, digests: Sequence[str]) -> dict[str | None, tuple[int, int] | None]:
    """Upright width and height by sha256 of the files that were examined; None: unreadable."""
    sizes: dict[str | None, tuple[int, int] | None] = {}
    facts = ExaminedImage.facts
    columns = ExaminedImage.sha256, facts["width"].as_integer(), facts["height"].as_integer()
    with catalog.read() as session:
        for start in range(0, len(digests), QUERY_ITEMS):
            query = select(*columns).where(
                ExaminedImage.version == EXAMINE_VERSION, ExaminedImage.sha256.in_(digests[start : start + QUERY_ITEMS])
            )
            sizes |= {sha256: (width, height) if width else None for sha256, width, height in session.execute(query)}
    return sizes


def _size_in_header(item: Item) -> tuple[int, int] | None:
    """Upright width and height, or None where it cannot be used."""
    try:
        with Image.open(picture_file(item), formats=FORMATS) as image:
            width, height = image.size
            if image.format != EXIF_LAST and image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    return (width, height) if 0 < width * height <= MAX_PIXELS else None


def _csv(order: Iterable[Placed]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, LISTED)
    writer.writeheader()
    for one in order:
        for crop in one.crops:
            listed = _listed(one, crop)
            writer.writerow(listed | {key: f"{listed[key]:.4f}" for key in ("scale", "cropped", "padded")})
    return text.getvalue()


def _listed(one: Placed, crop: Crop) -> dict[str, Any]:
    bucket = crop.placement.bucket
    values = crop.width, crop.height, f"{bucket.width}x{bucket.height}", crop.scale, crop.share, crop.padding
    return dict(zip(LISTED, (one.item.file_name, *values), strict=True))
