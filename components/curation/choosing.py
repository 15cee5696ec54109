"""Which of its captions a picture is trained with: an edit before its source's, its source's before a model's.

What a person wrote for the dataset counts first, then what the sources say, then, if the recipe's `captions.policy`
asks for them, what captioners wrote; class tokens and nothing at all come last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from components.catalog import captions as stored
from components.catalog.captions import CaptionVersion
from components.config import CaptionsConfig, DataConfig, DataSource
from components.curation.captions import composed
from components.curation.scanning import OnScan, Scan, ScannedFile, scan, unheard
from components.curation.sources import Item, require_captions, worded
from components.stages import Bench


def scan_captioned(
    bench: Bench,
    data: DataConfig,
    captions: CaptionsConfig,
    *,
    dataset: str,
    verify: bool = False,
    on_progress: OnScan = unheard,
) -> Scan:
    """What the sources hold now, with the captions that count. Raises BadInput as `scan` does."""
    found = scan(bench, data, verify=verify, captioned=False, on_progress=on_progress)
    edits = stored.edits(bench.catalog, dataset)
    files = found.files
    if edits or captions.policy != "none":
        waiting = {str(file.sha256) for file in files if file.sha256 and lacks_caption(file.item)} - edits.keys()
        models = stored.of_captioners(bench.catalog, waiting) if captions.policy != "none" else {}
        files = tuple(_chosen(file, edits, models, captions, data) for file in files)
    require_captions((file.item for file in files), data)
    return replace(found, files=files)


def lacks_caption(item: Item) -> bool:
    """Whether nobody has written a caption of the picture that can be used; class tokens are none."""
    return item.fallback or (item.problem is not None and item.problem.check == "caption")


def filled_in(
    versions: Sequence[CaptionVersion], item: Item, captions: CaptionsConfig, source: DataSource
) -> tuple[list[str], str]:
    """The captions that the recipe makes of what captioners wrote, and who wrote the first; none where it wants none.

    `versions` are of one picture, the newest first.
    """
    places = places_of(item, source)
    prose = _ranked([one for one in versions if one.kind != "tags" and one.text], captions)
    tagged = _ranked([one for one in versions if one.kind != "prose" and one.tags], captions)
    match captions.policy:
        case "prose":
            sayings = [(one.text, (), one.by) for one in prose]
        case "tags":
            sayings = [("", one.tags, one.by) for one in tagged]
        case "both":
            tags = tagged[0] if tagged else None
            sayings = [(one.text, tags.tags if tags else (), _by(one, tags)) for one in prose]
            sayings = sayings or [("", one.tags, one.by) for one in tagged]
        case _:
            sayings = []
    made = [(text, by) for prose_text, tags, by in sayings if (text := composed(prose_text, tags, captions, places))]
    if not made:
        return [], ""
    wanted = made if captions.variants else made[:1]
    return list(dict.fromkeys(text for text, _ in wanted)), made[0][1]


def places_of(item: Item, source: DataSource) -> dict[str, str]:
    """What stands in a template's places besides prose and tags."""
    name = PurePosixPath(item.file_name)
    return {
        "trigger": source.trigger or "",
        "class": class_of(item, source),
        "name": name.stem,
        "folder": name.parent.name,
    }


def class_of(item: Item, source: DataSource) -> str:
    """The picture's class tokens: of its folder, else of its source."""
    return item.caption if item.fallback else source.class_tokens or ""


def _chosen(
    file: ScannedFile,
    edits: Mapping[str, CaptionVersion],
    models: Mapping[str, list[CaptionVersion]],
    captions: CaptionsConfig,
    data: DataConfig,
) -> ScannedFile:
    item, source = file.item, data.sources[file.item.origin]
    if item.problem is not None and item.problem.check != "caption":
        return file
    if (edit := edits.get(str(file.sha256))) is not None:
        return replace(file, item=_captioned(item, [_unworded(edit.text, source)], edit.by, source))
    texts, by = filled_in(models.get(str(file.sha256), ()), item, captions, source)
    return replace(file, item=_captioned(item, texts, by, source)) if texts else file


def _captioned(item: Item, texts: Sequence[str], by: str, source: DataSource) -> Item:
    caption, *variants = (worded(text, source) for text in texts)
    return replace(item, caption=caption, variants=tuple(variants), caption_by=by, problem=None, fallback=False)


def _unworded(text: str, source: DataSource) -> str:
    """An edit without the words that the source puts around every caption: people edit what they are shown."""
    text = text.removeprefix(source.caption_prefix or "").removesuffix(source.caption_suffix or "").strip()
    return text or (source.trigger or "")


def _ranked(versions: Sequence[CaptionVersion], captions: CaptionsConfig) -> list[CaptionVersion]:
    """The newest caption of each captioner, in the recipe's order; without one, the newest first."""
    newest: dict[str, CaptionVersion] = {}
    for one in versions:
        newest.setdefault(f"{one.author}={one.source}", one)
    if not captions.captioners:
        return list(newest.values())
    return [newest[name] for name in captions.captioners if name in newest]


def _by(prose: CaptionVersion, tags: CaptionVersion | None) -> str:
    return prose.by if tags is None or tags.by == prose.by else f"{prose.by} + {tags.by}"
