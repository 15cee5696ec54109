"""Pictures like photographs, some with planted defects and twins, and the truth about them; a seed, a set."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

SIZE = (640, 480)
SHARE = 0.02  # of the pictures, for each defect and each kind of twin
FALLOFF = (0.55, 0.3, 0.18, 0.1)  # of texture from coarse to fine, as in photographs
Picture = Image.Image


@dataclass
class Truth:
    """File names by what was planted in them; pairs of names, the original first."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    exact: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str]] = field(default_factory=list)
    unlike: list[tuple[str, str]] = field(default_factory=list)  # hard negatives
    kinds: dict[str, str] = field(default_factory=dict)  # of a twin, by its name


def scene(seed: int, *, moved: int = 0) -> Picture:
    """Ground and objects with texture at several scales. `moved` shifts the objects, as between frames of a burst."""
    g = np.random.default_rng(seed)
    image = _texture(g, SIZE, (3, 12, 60))
    for number in range(g.integers(4, 9)):
        side = int(g.integers(60, 260))
        x, y = g.integers(-side // 2, SIZE[0] - side // 2), g.integers(-side // 2, SIZE[1] - side // 2)
        mask = Image.new("L", (side, side))
        outline = (0, 0, side - 1, int(side * g.uniform(0.5, 1)) - 1)
        (ImageDraw.Draw(mask).ellipse if g.random() < 0.6 else ImageDraw.Draw(mask).rectangle)(outline, fill=255)
        step = moved * (1 if number % 2 else -1)
        image.paste(_texture(g, (side, side), (2, 20)), (int(x) + step, int(y) + step // 2), mask)
    return ImageEnhance.Contrast(image.filter(ImageFilter.GaussianBlur(g.uniform(0, 0.8)))).enhance(g.uniform(0.8, 1.4))


def _texture(g: np.random.Generator, size: tuple[int, int], sides: tuple[int, ...]) -> Picture:
    image = Image.new("RGB", size, tuple(g.integers(30, 226, 3).tolist()))
    for weight, side in zip(FALLOFF, (*sides, max(size) // 2), strict=False):
        noise = Image.fromarray(g.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize(size, Image.Resampling.BICUBIC), weight)
    return image


DEFECTS: dict[str, Callable[[Picture], Picture]] = {
    "dark": lambda image: image.point(lambda value: int(value * 0.18)),
    "bright": lambda image: image.point(lambda value: 243 + value // 22),
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(10)),
    "low_information": lambda image: Image.new("RGB", SIZE, image.getpixel((9, 9))),
    "odd_aspect": lambda image: image.resize((1200, 240)),
    "odd_size": lambda image: image.resize((72, 54)),
}
TWINS: dict[str, Callable[[Picture], Picture]] = {
    "recompressed": lambda image: image,
    "rescaled": lambda image: image.resize((400, 300), Image.Resampling.LANCZOS),
    "cropped": lambda image: image.crop((8, 6, SIZE[0] - 8, SIZE[1] - 6)),
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1.12),
}
CONTAINERS: dict[str, dict[str, Any]] = {"bmp": {}, "webp": {"lossless": True, "method": 0}, "tiff": {}}


def plant(folder: Path, count: int, seed: int = 0) -> Truth:
    """Write `count` pictures with captions into a new folder, and the truth beside it; what is there is kept."""
    told = folder.with_suffix(".json")
    if told.exists():
        body = json.loads(told.read_text(encoding="utf-8"))
        return Truth(**{name: [tuple(pair) for pair in found] if isinstance(found, list) else found
                        for name, found in body.items()})
    folder.mkdir(parents=True)
    truth, each = Truth(), max(1, round(count * SHARE))
    names: list[str] = []

    def write(image: Picture, ending: str = "jpg", **options: Any) -> str:
        name = f"{len(names):05}.{ending}"
        image.save(folder / name, **({"quality": 93} if ending == "jpg" else {}) | options)
        names.append(name)
        return name

    number = seed * 1_000_003
    for defect, spoil in DEFECTS.items():
        truth.flags[defect] = [write(spoil(scene(number := number + 1))) for _ in range(each)]
    for twin, change in TWINS.items():
        for _ in range(each):
            image = scene(number := number + 1)
            first = write(image)
            second = write(change(Image.open(folder / first)), **({"quality": 60} if twin == "recompressed" else {}))
            truth.near.append((first, second))
            truth.kinds[second] = twin
    for index in range(each):
        first = write(scene(number := number + 1))
        names.append(f"{len(names):05}.jpg")
        shutil.copyfile(folder / first, folder / names[-1])
        truth.exact.append((first, names[-1]))
        image, ending = scene(number := number + 1), list(CONTAINERS)[index % len(CONTAINERS)]
        truth.exact.append((write(image, "png", compress_level=1), write(image, ending, **CONTAINERS[ending])))
        truth.kinds |= {truth.exact[-2][1]: "bytes", truth.exact[-1][1]: "pixels"}
    for _ in range(each):
        image = scene(number := number + 1)
        red, green, blue = image.split()
        truth.unlike.append((write(image), write(Image.merge("RGB", (blue, red, green)))))
        number += 1
        truth.unlike.append((write(scene(number)), write(scene(number, moved=60))))
    while len(names) < count:
        write(scene(number := number + 1))
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for name in names:
            table.write(json.dumps({"file_name": name, "text": f"scene number {name}"}) + "\n")
    told.write_text(json.dumps(vars(truth)), encoding="utf-8")
    return truth
