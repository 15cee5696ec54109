"""Small captioned pictures for tests: flat shapes in flat colours, drawn the same way every time."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 158, 80),
    "blue": (40, 110, 200),
    "gold": (240, 180, 30),
    "grey": (120, 120, 120),
}
SHAPES = ("disc", "square", "bar", "cross", "frame", "wedge", "pillar", "dots", "ring", "step", "flag", "arch")


def draw(shape: str, colour: str, side: int) -> Image.Image:
    """A white `shape` on a `colour` ground with a white border."""
    image = Image.new("RGB", (side, side), "white")
    pen, unit = ImageDraw.Draw(image), side / 16
    pen.rectangle((unit, unit, side - unit, side - unit), fill=COLOURS[colour])

    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left * unit, top * unit, right * unit, bottom * unit

    match SHAPES.index(shape):
        case 0:
            pen.ellipse(box(4, 4, 12, 12), fill="white")
        case 1:
            pen.rectangle(box(5, 5, 11, 11), fill="white")
        case 2:
            pen.rectangle(box(3, 7, 13, 9), fill="white")
        case 3:
            pen.rectangle(box(7, 3, 9, 13), fill="white")
            pen.rectangle(box(3, 7, 13, 9), fill="white")
        case 4:
            pen.rectangle(box(4, 4, 12, 12), outline="white", width=max(1, int(unit)))
        case 5:
            pen.polygon([(4 * unit, 12 * unit), (12 * unit, 12 * unit), (4 * unit, 4 * unit)], fill="white")
        case 6:
            pen.rectangle(box(7, 3, 9, 13), fill="white")
        case 7:
            for x in (4, 7, 10):
                pen.ellipse(box(x, 7, x + 2, 9), fill="white")
        case 8:
            pen.ellipse(box(4, 4, 12, 12), outline="white", width=max(1, int(1.5 * unit)))
        case 9:
            pen.rectangle(box(4, 9, 12, 12), fill="white")
            pen.rectangle(box(8, 5, 12, 9), fill="white")
        case 10:
            pen.rectangle(box(4, 3, 5, 13), fill="white")
            pen.rectangle(box(5, 4, 12, 8), fill="white")
        case _:
            pen.pieslice(box(4, 4, 12, 14), 180, 360, fill="white")
    return image


def write_pictures(folder: Path, *, side: int = 32, shapes: int = 12, held_out: int = 2) -> Path:
    """`shapes` x 5 pictures with a metadata.jsonl; the last `held_out` shapes are the test split. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as table:
        for index, shape in enumerate(SHAPES[:shapes]):
            for colour in COLOURS:
                name = f"{shape}-{colour}.png"
                draw(shape, colour, side).save(folder / name)
                split = "test" if index >= shapes - held_out else "train"
                table.write(
                    json.dumps({"file_name": name, "text": f"{shape}, {colour} sign", "group": shape, "split": split})
                    + "\n"
                )
    return folder


def write_recipe(path: Path, data: Path, base: Path, *, steps: int = 40) -> Path:
    """A small recipe: 60 pictures, 40 steps, a gallery of ten prompts."""
    path.write_text(
        f"""
name = "signs"
[[data.sources]]
path = "{data}"
[base]
model = "{base}"
[training]
rank = 4
lora_alpha = 4
learning_rate = 1e-3
max_train_steps = {steps}
train_batch_size = 4
checkpointing_steps = 10
validation_items = 8
validation_times = 4
preview_prompts = 4
[evaluation]
prompts = 10
variety_prompts = 3
variety_seeds = 3
num_inference_steps = 4
guidance_scale = 2.0
batch_size = 4
[promotion]
min_prompts = 5
""",
        encoding="utf-8",
    )
    return path
