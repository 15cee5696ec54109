"""What becomes of each key of another trainer's file: taken over, left out for a reason, or unknown to that trainer."""

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from components.config import BY_GROUP
from components.errors import BadInput

Outcome = Literal["mapped", "ignored", "unknown", "note"]
NO_SETTING = "Safelight has no such setting"
OWN_WAY = "Safelight decides where it runs and what it writes"
AUGMENTS = "Safelight trains on pictures as they are"


@cache
def known(trainer: str, section: str) -> frozenset[str]:
    """The settings that a trainer's section has, as its code reads them."""
    lists = tomllib.loads((Path(__file__).parent / "known_keys.toml").read_text(encoding="utf-8"))
    return frozenset(lists[trainer][section].split())


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table that is shown after an import. Values of ignored keys are not shown: some are secrets."""

    key: str  # as in the file, with its section
    outcome: Outcome
    said: str  # what it becomes in the recipe, or why it does not


@dataclass(slots=True)
class Imported:
    """A recipe's document in the making."""

    name: str
    sources: list[dict[str, Any]] = field(default_factory=list)
    base: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    curation: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def set(self, key: str, section: str, name: str, value: Any, why: str = "") -> None:
        """Give a recipe's key the value that `key` of the file stands for."""
        getattr(self, section)[name] = value
        said = f"{section}.{name} = {shown(value)}" + (f" ({why})" if why else "")
        self.lines.append(Line(key, "mapped", said))

    def note(self, key: str, said: str) -> None:
        self.lines.append(Line(key, "note", said))

    def ignore(self, key: str, why: str = NO_SETTING) -> None:
        self.lines.append(Line(key, "ignored", why))

    def document(self) -> dict[str, Any]:
        """The recipe, as TOML has it."""
        if "text_encoder_lr" in self.training and self.training.get("optimizer", "adamw") not in BY_GROUP:
            self.training.pop("text_encoder_lr")
            self.ignore("text_encoder_lr", f"{self.training['optimizer']} has one rate for everything")
        if not self.sources:
            raise BadInput("the file names no folder of pictures; add one, or pass the file that does")
        return {"name": self.name, "data": {"sources": self.sources}} | {
            section: values for section in ("curation", "base", "training") if (values := getattr(self, section))
        }


class Section:
    """A section of the file whose keys are asked for one by one; `rest` speaks of those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str, *outer: "Section"):
        self.values, self.where, self.outer = values, where, outer
        self.asked: set[str] = set()

    def key(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def get(self, name: str, default: Any = None) -> Any:
        """The value here or, where it is not here, in the sections around it."""
        self.asked.add(name)
        if name in self.values:
            return self.values[name]
        for outer in self.outer:
            outer.asked.add(name)
            if name in outer.values:
                return outer.values[name]
        return default

    def states(self, name: str) -> bool:
        return name in self.values or any(name in outer.values for outer in self.outer)

    def rest(self, imported: Imported, settings: Collection[str], reasons: Mapping[str, str], trainer: str) -> None:
        """Lines on the keys that were not asked for; `reasons` say why a known one is not taken over."""
        for name in self.values:
            if name in self.asked:
                continue
            if name in settings and name in reasons:
                imported.ignore(self.key(name), reasons[name])
            elif name in settings:
                imported.ignore(self.key(name))
            else:
                near = difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                said = f"no setting of {trainer}, so it never did anything{guess}"
                imported.lines.append(Line(self.key(name), "unknown", said))


def shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def number(section: Section, name: str, default: float | None = None) -> float | None:
    """A number, also where it is written as text. Raises BadInput naming the key."""
    value = section.get(name, default)
    if value is None or value == "":
        return default
    if isinstance(value, bool):
        raise BadInput(f"{section.key(name)} is {value!r}, expected a number")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise BadInput(f"{section.key(name)} is {value!r}, expected a number") from None


def whole(section: Section, name: str, default: int) -> int:
    """As `number`, without a fraction."""
    value = number(section, name, default)
    if value is None or value != int(value):
        raise BadInput(f"{section.key(name)} is {value!r}, expected a whole number")
    return int(value)


def set_scale(imported: Imported, keys: Sequence[str], rank: int, alpha: float, rate: float, why: str = "") -> None:
    """Rank, alpha and learning rate together: the same rate means another step at another scale."""
    rank_key, alpha_key, rate_key = keys
    imported.set(rank_key, "training", "rank", rank)
    scale = f"the update is scaled by {alpha:g}/{rank} = {alpha / rank:g}"
    imported.set(alpha_key, "training", "lora_alpha", alpha, f"{why}; {scale}" if why else scale)
    imported.set(rate_key, "training", "learning_rate", rate,
                 f"meant for that scale; at scale 1 it would be {rate * alpha / rank:g}")


def set_resolution(imported: Imported, key: str, value: Any, *, pair: bool, several: str = "") -> None:
    """From a number, text such as "512" or "512,768", or a list: a pair is one size, else they are several, which
    Safelight trains every picture at; `several` says how the other trainer differs."""
    texts = value if isinstance(value, list | tuple) else re.split(r"[,x]", str(value))
    try:
        sides = [int(str(side).strip()) for side in texts]
    except ValueError:
        imported.ignore(key, f"{value!r} is no size")
        return
    if len(set(sides)) == 1:
        imported.set(key, "training", "resolution", sides[0])
    elif pair:
        side = round((sides[0] * sides[1]) ** 0.5)
        imported.set(key, "training", "resolution", side, "the square of that area; buckets have its sides")
    else:
        imported.set(key, "training", "resolution", sorted(set(sides), reverse=True), several)


def steps_of(imported: Imported, key: str, epochs: int, pictures: int | None, per_step: int) -> None:
    """Optimizer steps from epochs, where the pictures can be counted."""
    if not pictures:
        imported.note(key, f"{epochs} epochs; Safelight counts steps, and the pictures are not here to be counted:"
                      " set training.max_train_steps")
        return
    steps = epochs * -(-pictures // per_step)
    imported.set(key, "training", "max_train_steps", steps,
                 f"{epochs} epochs of {pictures} pictures by {per_step}; Safelight fills batches across buckets")


def pictures_in(sources: Sequence[Mapping[str, Any]], folder: Path) -> int | None:
    """Pictures times repeats of sources that are no class pictures; None where a folder is not there."""
    from components.config import DataSource
    from components.curation.readers.walking import list_source

    total = 0
    for source in sources:
        root = (folder / source["path"]).expanduser()
        if source.get("is_reg"):
            continue
        if not root.is_dir():
            return None
        parsed = DataSource.model_validate(source)
        listing = list_source(root.resolve(), root.resolve())
        total += sum(
            parsed.repeats * (int(entry.folder[1]) if entry.folder and parsed.layout != "folder" else 1)
            for entry in listing.files if entry.is_picture and (parsed.layout != "kohya" or entry.folder)
        )
    return total


def recipe_name(text: Any, fallback: str) -> str:
    """A recipe's name from another program's, whatever it holds."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", str(text or fallback)).strip("-._")[:63]
    return cleaned or "imported"


OPTIMIZERS: Mapping[str, str] = {  # as other trainers spell them, in lower case without separators
    "adamw": "adamw", "adamw8bit": "adamw8bit", "pagedadamw8bit": "adamw8bit", "adafactor": "adafactor",
    "prodigy": "prodigy", "adamwschedulefree": "adamwschedulefree", "schedulefreeadamw": "adamwschedulefree",
    "lion": "lion", "muon": "muon", "adam": "adamw", "adam8bit": "adamw8bit",
}


def set_optimizer(imported: Imported, key: str, name: Any) -> str | None:
    """The optimizer of the same method; None, with a line that says so, where there is none."""
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower().rpartition(".")[2])
    if plain not in OPTIMIZERS:
        imported.ignore(key, f"Safelight has no {name}; adamw is used, so look at the learning rate")
        return None
    why = "not the same method: decay apart from the gradient" if plain in ("adam", "adam8bit") else ""
    imported.set(key, "training", "optimizer", OPTIMIZERS[plain], why)
    return OPTIMIZERS[plain]


def set_schedule(imported: Imported, key: str, name: Any) -> None:
    """The schedule's shape; the schedule-free optimizer has none."""
    if imported.training.get("optimizer") == "adamwschedulefree":
        return
    plain = str(name).lower()
    if plain in ("constant", "constant_with_warmup", "linear", "cosine"):
        imported.set(key, "training", "lr_scheduler", plain.removesuffix("_with_warmup"))
    elif plain.startswith("cosine"):
        imported.set(key, "training", "lr_scheduler", "cosine", f"without the restarts of {name}")
    else:
        imported.ignore(key, f"Safelight has no {name}; the rate stays constant")


def set_warmup(imported: Imported, key: str, steps: float) -> None:
    """Steps, or below 1 a share of all."""
    total = imported.training.get("max_train_steps")
    if 0 < steps < 1 and total is None:
        imported.note(key, f"{steps:g} of the steps, whose number is not known; set training.lr_warmup_steps")
    elif steps > 0:
        count = int(steps * total) if steps < 1 and total else int(steps)
        imported.set(key, "training", "lr_warmup_steps", min(count, total) if total else count)


Take = Callable[[Imported, Section, str], None]


def taken(section_name: str, name: str, convert: Callable[[Any], Any] = lambda value: value) -> Take:
    """A rule: the key's value, converted, is the recipe's."""

    def take(imported: Imported, section: Section, key: str) -> None:
        imported.set(section.key(key), section_name, name, convert(section.get(key)))

    return take


def apply(rules: Mapping[str, Take], imported: Imported, section: Section) -> None:
    """Every rule whose key is in the section with a value that says something."""
    for key, rule in rules.items():
        if section.get(key) not in (None, "", False, 0, 0.0):
            rule(imported, section, key)
