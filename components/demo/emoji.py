"""Emoji drawings of three vendors as an ordinary image folder: the data of the embedded base model.

The pictures come from npm packages (`VENDORS`); names and tags from `emojibase-data`, which follows Unicode CLDR.
Every picture is composited on white at 64x64 px.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from components.errors import BadInput

SIZE = 64  # px, the resolution of the embedded base
METADATA_NAME = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class Vendor:
    """One drawing style: where its package keeps the pictures, and whom to credit."""

    style: str
    package: str
    pattern: str  # of the picture's path inside the package; {code} is the lower-case code point sequence
    license: str
    author: str
    source: str


VENDORS = (
    Vendor("noto", "emoji-datasource-google", "img/google/64/{code}.png", "Apache-2.0", "Google",
           "https://github.com/googlefonts/noto-emoji"),
    Vendor("twemoji", "emoji-datasource-twitter", "img/twitter/64/{code}.png", "CC-BY-4.0", "Twitter and contributors",
           "https://github.com/jdecked/twemoji"),
    Vendor("fluent", "@lobehub/fluent-emoji-3d", "assets/{code}.webp", "MIT", "Microsoft, packaged by LobeHub",
           "https://github.com/microsoft/fluentui-emoji"),
)  # fmt: skip

# Subgroups of Unicode's emoji-test.txt whose members are concrete things that can be told apart at 64 px.
CONCRETE_SUBGROUPS = frozenset(
    """animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug plant-flower plant-other
    food-fruit food-vegetable food-prepared food-asian food-sweet drink dishware place-map place-geographic
    place-building place-religious place-other transport-ground transport-water transport-air hotel time sky-weather
    event award-medal sport game arts-crafts clothing sound music musical-instrument phone computer light-video
    book-paper money mail writing office lock tool science medical household other-object face-costume face-negative
    heart geometric warning arrow av-symbol math punctuation other-symbol emotion religion""".split()
)

# Left out although their subgroup is kept: near-duplicates, scenes, people, and shapes that differ by a detail.
LEFT_OUT = frozenset(
    line.strip()
    for line in """
    rat; mouse; cow; tiger; rabbit; cat; horse; monkey; dog; pig; black cat; service dog; guide dog; poodle; ox
    water buffalo; ram; ewe; two-hump camel; pig nose; bison; badger; mammoth; skunk; otter; beaver; orangutan; donkey
    moose; chipmunk; sloth; hatching chick; front-facing baby chick; black bird; goose; turkey; dodo; rooster; phoenix
    dragon; sauropod; spouting whale; tropical fish; seal; bug; cricket; fly; mosquito; microbe; cockroach; worm
    rosette; white flower; wilted flower; hyacinth; lotus; leafless tree; empty nest; fallen leaf; shamrock; herb
    melon; green apple; lime; olive; ginger root; root vegetable; beans; leafy green; brown mushroom; cut of meat
    shallow pan of food; stuffed flatbread; salt; flatbread; tamale; fondue; falafel; canned food; butter; bagel
    pot of food; rice cracker; curry rice; oden; fish cake with swirl; moon cake; roasted sweet potato; bento box
    shaved ice; custard; pie; teacup without handle; sake; clinking beer mugs; clinking glasses; mate; pouring liquid
    beverage box; amphora; fork and knife with plate; map of Japan; camping; national park; mount fuji; desert
    snow-capped mountain; beach with umbrella; derelict house; stadium; building construction; Japanese post office
    bank; hotel; love hotel; convenience store; school; department store; wedding; Statue of Liberty; kaaba; synagogue
    hindu temple; foggy; night with stars; sunrise over mountains; sunrise; cityscape at dusk; sunset; bridge at night
    hot springs; barber pole; playground slide; railway car; bullet train; train; metro; light rail; station; tram car
    oncoming bus; trolleybus; minibus; oncoming police car; oncoming taxi; oncoming automobile; sport utility vehicle
    articulated lorry; monorail; mountain railway; horizontal traffic light; construction; motorway; railway track
    oil drum; auto rickshaw; manual wheelchair; motorized wheelchair; passenger ship; motor boat; ferry; seat
    suspension railway; mountain cableway; aerial tramway; airplane departure; airplane arrival; small airplane
    mantelpiece clock; timer clock; hourglass not done; new moon; waxing crescent moon; first quarter moon
    waxing gibbous moon; waning gibbous moon; last quarter moon; waning crescent moon; new moon face
    first quarter moon face; last quarter moon face; full moon face; sun behind small cloud; sun behind large cloud
    sun behind rain cloud; fog; wind face; umbrella with rain drops; umbrella on ground; snowman without snow; milky way
    closed umbrella; cloud with lightning and rain; tanabata tree; pine decoration; Japanese dolls; carp streamer
    wind chime; moon viewing ceremony; admission tickets; sparkler; confetti ball; 2nd place medal; 3rd place medal
    softball; rugby football; cricket game; field hockey; lacrosse; ice hockey; goal net; martial arts uniform
    flag in hole; mahjong red dragon; flower playing cards; nesting dolls; diamond with a dot; sewing needle; sari
    woman’s clothes; kimono; one-piece swimsuit; clutch bag; handbag; thong sandal; ballet shoes; flat shoe
    woman’s sandal; prayer beads; safety vest; folding hand fan; hair pick; rescue worker’s helmet; muted speaker
    speaker low volume; speaker medium volume; bell with slash; musical score; control knobs; level slider; flute
    long drum; harp; pager; mobile phone with arrow; telephone receiver; optical disk; dvd; trackball; low battery
    camera with flash; magnifying glass tilted right; videocassette; film frames; diya lamp; page with curl
    bookmark tabs; notebook with decorative cover; rolled-up newspaper; newspaper; ledger; receipt
    chart increasing with yen; yen banknote; euro banknote; pound banknote; outbox tray; inbox tray; e-mail
    incoming envelope; envelope with arrow; closed mailbox with lowered flag; open mailbox with raised flag
    open mailbox with lowered flag; ballot box with ballot; black nib; pen; tear-off calendar; spiral calendar
    card index; card index dividers; card file box; linked paperclips; round pushpin; open file folder; file cabinet
    locked with pen; locked with key; hammer and wrench; hammer and pick; white cane; broken chain; clamp; hook
    petri dish; alembic; x-ray; crutch; drop of blood; lotion bottle; safety pin; sponge; plunger; elevator
    placard; identification card; hamsa; funeral urn; nazar amulet; cigarette; angry face with horns; angry face
    enraged face; face with steam from nose; face with symbols on mouth; smiling face with horns; beating heart
    two hearts; sparkling heart; growing heart; heart with ribbon; revolving hearts; heart decoration; mending heart
    light blue heart; heart exclamation; radio button; black square button; white square button; small orange diamond
    small blue diamond; black small square; white small square; white medium square; black medium square
    white medium-small square; black medium-small square; red triangle pointed down; no mobile phones
    no one under eighteen; no smoking; no littering; non-potable water; no bicycles; no pedestrians; children crossing
    BACK arrow; END arrow; ON! arrow; SOON arrow; TOP arrow; left-right arrow; up-down arrow; up-left arrow
    up-right arrow; down-left arrow; down-right arrow; right arrow curving up; right arrow curving down; cinema
    vibration mode; mobile phone off; antenna bars; repeat single button; dim button; bright button; fast up button
    fast down button; play or pause button; upwards button; downwards button; next track button; last track button
    exclamation question mark; double exclamation mark; white question mark; white exclamation mark; wavy dash
    copyright; registered; name badge; trade mark; Japanese symbol for beginner; splatter; curly loop
    double curly loop; part alternation mark; eight-spoked asterisk; eight-pointed star; sparkle; check mark button
    cross mark button; check box with check; trident emblem; eye in speech bubble; anger symbol; ZZZ; sweat droplets
    dashing away; dizzy; hole; left speech bubble; right anger bubble; om; khanda; orthodox cross; wheel of dharma
    dotted six-pointed star; star of David; menorah; place of worship; globe showing Europe-Africa
    globe showing Asia-Australia; heavy equals sign; divide; computer disk; ice; rock; wood; hut; houses; clapper board
    skull and crossbones; ogre; goblin; alien monster; love letter; heart on fire; kiss mark; hundred points; raccoon
    leopard; zebra; boar; goat; camel; llama; rhinoceros; polar bear; swan; peacock; wing; lizard; blowfish
    spiral shell; coral; jellyfish; squid; oyster; beetle; scorpion; cherry blossom; hibiscus; blossom
    deciduous tree; leaf fluttering in wind; nest with eggs; mango; coconut; peanuts; chestnut; pea pod
    baguette bread; pancakes; poultry leg; burrito; cooking; bowl with spoon; green salad; cooked rice; spaghetti
    fried shrimp; dango; dumpling; fortune cookie; takeout box; soft ice cream; chocolate bar; honey pot; baby bottle
    glass of milk; bottle with popping cork; tropical drink; tumbler glass; globe with meridians; world map
    desert island; classical building; brick; post office; Japanese castle; Tokyo tower
    shinto shrine; fountain; carousel horse; roller coaster; circus tent; high-speed train; tram; motor scooter
    kick scooter; bus stop; police car light; canoe; speedboat; sun with face; glowing star; cloud with snow; cyclone
    comet; firecracker; party popper; red envelope; reminder ribbon; sports medal; 1st place medal; tennis
    flying disc; bowling; ping pong; badminton; diving mask; running shirt; sled; curling stone; yo-yo; water pistol
    slot machine; mirror ball; joker; performing arts; framed picture; thread; yarn; knot; lab coat; briefs
    shorts; bikini; shopping bags; running shoe; hiking boot; high-heeled shoe; postal horn; musical notes
    musical keyboard; movie camera; film projector; dollar banknote; money with wings; memo; spiral notepad
    chart decreasing; triangular ruler; boomerang; carpentry saw; nut and bolt; link; chains; satellite antenna
    adhesive bandage; mouse trap; razor; basket; bubbles; coffin; headstone; moai; counterclockwise arrows button
    atom symbol; shuffle tracks button; repeat button; fast-forward button; reverse button; record button
    eject button; medical symbol; fleur-de-lis; hollow red circle
    fast reverse button; house with garden; military helmet; clown face; military medal; cityscape; rice ball
    """.replace("\n", ";").split(";")
    if line.strip()
)
LEFT_OUT_ENDINGS = ("o’clock", "-thirty")

SHORT_NAMES = {  # CLDR labels that nobody would type, and what a prompt says instead
    "globe showing Americas": "globe", "closed mailbox with raised flag": "mailbox", "soccer ball": "soccer ball",
    "snow-capped mountain": "mountain", "vertical traffic light": "traffic light", "red question mark": "question mark",
    "red exclamation mark": "exclamation mark", "magnifying glass tilted left": "magnifying glass",
    "speaker high volume": "speaker", "hourglass done": "hourglass", "1st place medal": "gold medal",
    "bottle with popping cork": "champagne bottle", "cow face": "cow", "cat face": "cat", "dog face": "dog",
    "mouse face": "mouse", "tiger face": "tiger", "rabbit face": "rabbit", "horse face": "horse", "pig face": "pig",
    "monkey face": "monkey", "dragon face": "dragon", "automobile": "car", "pool 8 ball": "pool ball",
    "steaming bowl": "noodle bowl", "shortcake": "cake slice", "optical disk": "disk", "locked": "lock",
    "unlocked": "open lock", "multiply": "multiply", "hot beverage": "coffee", "cloud with lightning": "lightning cloud",
    "cloud with rain": "rain cloud", "cloud with snow": "snow cloud", "sun behind cloud": "sun and cloud",
    "nest with eggs": "nest", "four leaf clover": "clover", "leaf fluttering in wind": "leaves", "ear of corn": "corn",
    "sheaf of rice": "wheat", "large orange diamond": "orange diamond", "large blue diamond": "blue diamond",
    "red triangle pointed up": "red triangle", "couch and lamp": "couch", "roll of paper": "toilet paper",
    "globe with meridians": "globe grid", "black large square": "black square", "white large square": "white square",
    "page facing up": "page", "chart increasing": "chart increasing", "clockwise vertical arrows": "refresh arrows",
    "counterclockwise arrows button": "counterclockwise arrows", "right arrow curving left": "return arrow",
    "left arrow curving right": "forward arrow", "sun with face": "sun face", "pile of poo": "poo",
    "gem stone": "diamond gem", "high voltage": "lightning bolt", "desktop computer": "computer",
    "hundred points": "hundred", "woman’s hat": "sun hat", "woman’s boot": "boot", "man’s shoe": "shoe",
    "wrapped gift": "gift", "electric plug": "plug", "red apple": "apple", "file folder": "folder", "game die": "dice",
    "artist palette": "palette", "paw prints": "paw print", "headphone": "headphones", "cheese wedge": "cheese",
    "ring buoy": "life ring", "bullseye": "target", "american football": "football",
    "wastebasket": "trash can", "delivery truck": "truck", "fuel pump": "gas pump", "straight ruler": "ruler",
    "recycling symbol": "recycling", "bellhop bell": "service bell", "video game": "game controller",
    "locomotive": "train", "office building": "building",
}  # fmt: skip

# Hue ranges in degrees that people agree on, with the word the captions use.
HUES = ((345, 360, "red"), (0, 13, "red"), (16, 40, "orange"), (42, 66, "yellow"), (80, 165, "green"),
        (190, 245, "blue"), (255, 300, "purple"), (318, 342, "pink"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawing:
    """One vendor's picture of one emoji, with everything its captions are made of."""

    code: str  # code points, lower case, joined by hyphens, without U+FE0F
    name: str
    synonyms: tuple[str, ...]
    concrete: bool  # member of the curated concepts that the denoiser learns
    vendor: Vendor
    path: Path


def drawings(node_modules: Path) -> Iterator[Drawing]:
    """Every emoji picture without flags and skin tones, in Unicode order, vendor by vendor.

    Raises: BadInput when a package is missing under `node_modules`.
    """
    entries = _read_json(node_modules / "emojibase-data/en/data.json")
    subgroups = {int(k): v for k, v in _read_json(node_modules / "emojibase-data/meta/groups.json")["subgroups"].items()}
    files = {vendor.style: _files(node_modules, vendor) for vendor in VENDORS}
    short_names = {
        _code(e["unified"]): e["short_names"]
        for e in _read_json(node_modules / "emoji-datasource-google/emoji.json")
    }
    entries = [e for e in entries if "subgroup" in e and "flag" not in subgroups[e["subgroup"]]]
    rarity = Counter(tag for e in entries for tag in e.get("tags", ()))
    for entry in sorted(entries, key=lambda e: e["order"]):
        code, label = _code(entry["hexcode"]), entry["label"]
        name = SHORT_NAMES.get(label, label).lower().replace("’", "'")
        words = [*(s.replace("_", " ").replace("-", " ") for s in short_names.get(code, ())),
                 *(tag for tag in entry.get("tags", ()) if rarity[tag] <= 3)]  # fmt: skip
        synonyms = tuple(dict.fromkeys(w.lower() for w in words if w.lower() != name and len(w) > 2))[:4]
        concrete = _is_concrete(label, subgroups[entry["subgroup"]])
        for vendor in VENDORS:
            if path := files[vendor.style].get(code):
                yield Drawing(code, name, synonyms, concrete, vendor, path)


def write_image_folder(node_modules: Path, destination: Path) -> int:
    """Write every drawing as a 64x64 RGB PNG on white, with one row per picture in `metadata.jsonl`.

    A row holds file_name, text (name and style), group (the emoji, so that splits keep vendors together), name,
    synonyms, style, color (a colour word, or null where no hue dominates), concrete, license, author and source.
    Returns the number of pictures. Raises: BadInput when a package is missing.
    """
    destination.mkdir(parents=True, exist_ok=True)
    rows = []
    for drawing in drawings(node_modules):
        image = on_white(Image.open(drawing.path), SIZE)
        file_name = f"{drawing.vendor.style}-{drawing.code}.png"
        image.save(destination / file_name)
        rows.append(
            {
                "file_name": file_name,
                "text": f"{drawing.name}, {drawing.vendor.style} style",
                "group": drawing.code,
                "name": drawing.name,
                "synonyms": list(drawing.synonyms),
                "style": drawing.vendor.style,
                "color": dominant_color(image),
                "concrete": drawing.concrete,
                "license": drawing.vendor.license,
                "author": drawing.vendor.author,
                "source": drawing.vendor.source,
            }
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (destination / METADATA_NAME).write_text(text, encoding="utf-8")
    return len(rows)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """The picture scaled to size x size px (Lanczos on premultiplied alpha) over white, as RGB."""
    rgba = image.convert("RGBA").convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def dominant_color(image: Image.Image) -> str | None:
    """The colour word that covers most of the picture's non-white pixels, or None when no word covers 70 % of them."""
    hue, saturation, value = np.asarray(image.convert("HSV"), dtype=np.float32).reshape(-1, 3).T / 255
    drawn = (saturation > 0.1) | (value < 0.9)
    vivid = drawn & (saturation > 0.35) & (value > 0.35)
    if drawn.sum() < 100:
        return None
    degrees = hue * 360
    shares: Counter[str] = Counter()
    for low, high, word in HUES:
        shares[word] += int((vivid & (degrees >= low) & (degrees <= high)).sum())
    word, count = shares.most_common(1)[0]
    return word if count >= 0.7 * drawn.sum() else None


def _is_concrete(label: str, subgroup: str) -> bool:
    return subgroup in CONCRETE_SUBGROUPS and label not in LEFT_OUT and not label.endswith(LEFT_OUT_ENDINGS)


def _code(sequence: str) -> str:
    return sequence.lower().replace("-fe0f", "")


def _files(node_modules: Path, vendor: Vendor) -> dict[str, Path]:
    pattern = node_modules / vendor.package / vendor.pattern
    files = {_code(path.stem): path for path in sorted(pattern.parent.glob(f"*{pattern.suffix}"))}
    if not files:
        raise BadInput(f"{pattern.parent}: no {pattern.suffix} pictures; run `npm install {vendor.package}` first")
    return files


def _read_json(path: Path):
    if not path.is_file():
        raise BadInput(f"{path}: not found; run `npm install {path.parts[-3]}` next to it first")
    return json.loads(path.read_text(encoding="utf-8"))
