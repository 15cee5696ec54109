"""The npm packages of emoji drawings as they are laid out on disk, with a handful of emoji drawn here."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

FOLDERS = (
    ("emoji-datasource-google/img/google/64", "png"),
    ("emoji-datasource-twitter/img/twitter/64", "png"),
    ("@lobehub/fluent-emoji-3d/assets", "webp"),
)
ROCKET, FACE, FLAG = "1f680", "1f600", "1f1ef-1f1f5"
EMOJI = {  # code: label, tags, subgroup, short names
    FACE: ("grinning face", [], 0, []),
    ROCKET: ("rocket", ["space", "launch"], 56, ["rocket", "space_ship"]),
    FLAG: ("flag: Japan", [], 98, []),
}
MORE = {  # concepts of the embedded base
    "1f34e": ("red apple", ["fruit"], 30, ["apple"]),
    "1f697": ("automobile", ["car"], 56, ["car"]),
    "1f3b8": ("guitar", ["music"], 60, ["guitar"]),
    "1f512": ("locked", ["secure"], 61, ["lock"]),
}


def write_packages(root: Path, emoji: dict[str, tuple[str, list[str], int, list[str]]] = EMOJI) -> Path:
    """Write the packages under `root`, every drawing a red disc of its own size; returns `root`."""
    entries = [
        {"label": label, "hexcode": code.upper(), "tags": tags, "subgroup": subgroup, "order": order}
        for order, (code, (label, tags, subgroup, _)) in enumerate(emoji.items())
    ]
    names = [{"unified": code.upper(), "short_names": short} for code, (*_, short) in emoji.items() if short]
    groups = {"0": "face-smiling", "30": "food-fruit", "56": "transport", "60": "music", "61": "lock", "98": "flag"}
    for path, document in {
        "emojibase-data/en/data.json": entries,
        "emojibase-data/meta/groups.json": {"subgroups": groups},
        "emoji-datasource-google/emoji.json": names,
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(document))
    for vendor, (folder, suffix) in enumerate(FOLDERS):
        (root / folder).mkdir(parents=True)
        for number, code in enumerate(emoji):
            drawing, margin = Image.new("RGBA", (128, 128), (0, 0, 0, 0)), 32 + 3 * number + vendor
            ImageDraw.Draw(drawing).ellipse((margin, margin, 128 - margin, 128 - margin), fill=(220, 30, 30, 255))
            drawing.save(root / folder / f"{code}.{suffix}")
    return root
