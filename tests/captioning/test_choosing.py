"""Which caption counts: an edit before the source's, the source's before a model's, and who wrote it is kept."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.catalog import captions as stored
from components.catalog.captions import CaptionVersion
from components.catalog.differences import compare, named_snapshot
from components.config import CaptionsConfig, CurationConfig, DataConfig, DataSource
from components.curation.captions import composed, strip_opening
from components.curation.editing import caption_history, edit_caption, withdraw_caption
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate, curate_key
from components.errors import BadInput
from components.stages import Bench, Product
from components.storage import sha256_of
from tests.curation.folders import pictures

TAGS = (("fox", 0.9, "general"), ("snow", 0.5, "general"), ("dim", 0.2, "general"), ("vulpix", 0.95, "character"),
        ("safe", 0.99, "rating"))  # fmt: skip


def curated(bench: Bench, folder: Path, captions: dict[str, Any] | None = None, **source: Any) -> tuple[str, Product]:
    """The stage key and what was made."""
    data = DataConfig(sources=(DataSource.model_validate({"path": str(folder)} | source),))
    config = CaptionsConfig.model_validate(captions or {})
    curation = CurationConfig(test_fraction=0.0)
    key, found = curate_key(bench, data, curation, dataset="blobs", training_size=64, captions=config)
    return key, curate(bench, data, curation, dataset="blobs", training_size=64, scanned=found, key=key)


def samples(bench: Bench, product: Product) -> dict[str, SampleRow]:
    return {row.file_name: row for row in read_manifest(bench.store, product.facts["digest"])}


def said(path: Path, text: str, tags: tuple[stored.Tag, ...] = (), **fields: Any) -> CaptionVersion:
    """What a captioner said of a picture."""
    kind = "tags" if tags else "prose"
    known = {"author": "blip", "source": "models/blip", "revision": "a" * 40, "prompt_hash": "p"}
    return CaptionVersion(sha256_of(path), "", kind=kind, text=text, tags=tags, **known | fields)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures, of which the first two have no caption."""
    made = pictures(tmp_path / "data", 6)
    (made / "000.txt").unlink()
    (made / "001.txt").write_text(" \n")
    return made


def test_a_models_caption_fills_in_only_where_the_recipe_asks_and_nobody_wrote_one(bench: Bench, folder: Path):
    key, before = curated(bench, folder)
    stored.store(bench.catalog, [said(folder / f"00{i}.png", f"an image of blob {i}") for i in (0, 2)])
    assert curated(bench, folder)[0] == key  # stored captions alone change nothing
    _, product = curated(bench, folder, {"policy": "prose"})
    rows = samples(bench, product)
    assert (rows["000.png"].text, rows["000.png"].caption_by) == ("blob 0", f"blip@{'a' * 12}")
    assert (rows["002.png"].text, rows["002.png"].caption_by) == ("blobs number 2", None)
    assert "001.png" not in rows and before.facts["kept"] == 4 and product.facts["kept"] == 5
    table = pq.read_table(bench.store.path(before.facts["digest"]))
    assert "caption_by" not in table.column_names  # a set without stored captions is as it was


def test_the_key_changes_with_a_chosen_caption_and_only_then(bench: Bench, folder: Path):
    path = folder / "000.png"
    stored.store(bench.catalog, [said(path, "a blob")])
    key, first = curated(bench, folder, {"policy": "prose"})
    stored.store(bench.catalog, [said(folder / "003.png", "unchosen"), said(path, "", (("blob", 0.9, "general"),))])
    assert curated(bench, folder, {"policy": "prose"})[0] == key
    stored.store(bench.catalog, [said(path, "a round blob")])
    newer, second = curated(bench, folder, {"policy": "prose"})
    assert newer != key and second.facts["digest"] != first.facts["digest"]
    difference = compare(
        bench.catalog, named_snapshot(bench.catalog, "blobs@1"), named_snapshot(bench.catalog, "blobs")
    )
    assert [(c.file_name, c.after.caption) for c in difference.of_kind("recaptioned") if c.after] == [
        ("000.png", "a round blob")]  # fmt: skip


def test_an_edit_counts_before_the_sources_caption_and_a_withdrawn_one_no_more(bench: Bench, folder: Path):
    stored.store(bench.catalog, [said(folder / "000.png", "a blob")])
    key, _ = curated(bench, folder)
    for name in ("000.png", "002.png"):
        edit_caption(bench.catalog, "blobs", name, f"  by hand,\n{name} ", by="Ada")
    rows = samples(bench, curated(bench, folder, {"policy": "prose"})[1])
    assert {rows[name].text for name in ("000.png", "002.png")} == {"by hand, 000.png", "by hand, 002.png"}
    assert {rows[name].caption_by for name in ("000.png", "002.png")} == {"Ada"}
    history = caption_history(bench.catalog, "blobs", "000.png")
    assert [(one.author, one.kind, one.version) for one in history.versions] == [
        ("Ada", "person", 1), ("blip", "prose", 1)]  # fmt: skip
    for name in ("000.png", "002.png"):
        withdraw_caption(bench.catalog, "blobs", name, by="Ada")
    assert curated(bench, folder)[0] == key


def test_an_edit_holds_in_its_dataset_alone(bench: Bench, folder: Path):
    curated(bench, folder)
    edit_caption(bench.catalog, "blobs", "002.png", "by hand", by="Ada")
    assert stored.edits(bench.catalog, "others") == {}


def test_edits_that_say_nothing_or_of_nothing_are_refused(bench: Bench, folder: Path):
    with pytest.raises(BadInput, match="'blobs' is no dataset of this workspace"):
        edit_caption(bench.catalog, "blobs", "000.png", "x", by="Ada")
    curated(bench, folder)
    for name, text, by, says in [
        ("none.png", "x", "Ada", "has no file 'none.png'"),
        ("000.png", " \n", "Ada", "the caption is empty"),
        ("000.png", "x" * 9000, "Ada", "9000 characters, expected 8000 at most"),
        ("000.png", "x", " ", "expected 1 to 80"),
    ]:
        with pytest.raises(BadInput, match=says):
            edit_caption(bench.catalog, "blobs", name, text, by=by)
    with pytest.raises(BadInput, match="there is nothing to withdraw"):
        withdraw_caption(bench.catalog, "blobs", "000.png", by="Ada")


def test_a_sources_words_are_put_around_a_filled_in_caption_and_once_around_an_edit(bench: Bench, folder: Path):
    stored.store(bench.catalog, [said(folder / "000.png", "a blob")])
    words = {"trigger": "sks", "caption_prefix": "icon:", "caption_suffix": ", flat"}
    rows = samples(bench, curated(bench, folder, {"policy": "prose"}, **words)[1])
    assert rows["000.png"].text == "icon: sks a blob , flat"
    edit_caption(bench.catalog, "blobs", "000.png", rows["000.png"].text.replace("a blob", "a ball"), by="Ada")
    again = samples(bench, curated(bench, folder, {"policy": "prose"}, **words)[1])
    assert again["000.png"].text == "icon: sks a ball , flat"


def test_class_tokens_give_way_to_a_models_caption(bench: Bench, folder: Path):
    stored.store(bench.catalog, [said(folder / "000.png", "a blob")])
    captions = {"policy": "prose", "template": "{class}, {prose}"}
    rows = samples(bench, curated(bench, folder, captions, class_tokens="sks ball")[1])
    assert rows["000.png"].text == "sks ball, a blob"
    assert samples(bench, curated(bench, folder, class_tokens="sks ball")[1])["000.png"].text == "sks ball"


def test_a_set_that_only_models_have_captioned_can_be_trained_on(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    for path in folder.glob("*.txt"):
        path.unlink()
    with pytest.raises(BadInput, match="none of its 3 pictures has a caption that can be used"):
        curated(bench, folder, {"policy": "prose"})
    stored.store(bench.catalog, [said(path, f"blob {path.stem}") for path in folder.glob("*.png")])
    with pytest.raises(BadInput, match="let `safelight caption` write them"):
        curated(bench, folder)
    assert curated(bench, folder, {"policy": "prose"})[1].facts["kept"] == 3


def test_of_several_captioners_the_recipes_order_counts_else_the_newest(bench: Bench, folder: Path):
    path = folder / "000.png"
    stored.store(bench.catalog, [
        said(path, "first words"), said(path, "later words", author="vlm", source="models/vlm"),
        said(path, "", TAGS, author="wd", source="models/wd", revision="b" * 40)])  # fmt: skip

    def text(**captions: Any) -> tuple[str, tuple[str, ...], str | None]:
        row = samples(bench, curated(bench, folder, captions)[1])["000.png"]
        return row.text, row.variants, row.caption_by

    vlm, blip, wd = (f"{name}@{letter * 12}" for name, letter in (("vlm", "a"), ("blip", "a"), ("wd", "b")))
    assert text(policy="prose") == ("later words", (), vlm)
    assert text(policy="prose", captioners=["blip=models/blip", "vlm=models/vlm"]) == ("first words", (), blip)
    assert text(policy="prose", variants=True) == ("later words", ("first words",), vlm)
    assert text(policy="tags") == ("vulpix, fox, snow", (), wd)
    assert text(policy="both") == ("later words, vulpix, fox, snow", (), f"{vlm} + {wd}")


@pytest.mark.parametrize(
    ("prose", "settings", "made"),
    [
        ("An image of a fox.", {}, "a fox."),
        ("An image of a fox.", {"strip_openings": False}, "An image of a fox."),
        ("a drawing of a fox", {}, "a drawing of a fox"),
        ("a fox, watermark, in the snow", {"exclude": ["Watermark"]}, "a fox, in the snow"),
        ("a watermarked fox", {"exclude": ["watermark"]}, "a watermarked fox"),
        ("watermark", {"exclude": ["watermark"]}, ""),
        ("a fox.", {"policy": "both"}, "a fox, vulpix, fox, snow"),
        ("", {"policy": "both"}, "vulpix, fox, snow"),
        ("a fox", {"policy": "tags", "exclude": ["Fox"]}, "vulpix, snow"),
        ("a fox", {"policy": "tags", "max_tags": 1}, "vulpix"),
        ("a fox", {"policy": "tags", "tag_thresholds": {"general": 0.6, "rating": 0.5}}, "safe, fox"),
        ("a fox", {"template": "{trigger}, {tags}, {prose}"}, "sks, vulpix, fox, snow, a fox"),
        ("a {tags} fox", {}, "a {tags} fox"),
        ("", {"template": "{trigger}, {prose}"}, ""),
        ("a fox", {"prefix": "icon,"}, "icon, a fox"),
    ],
)
def test_what_a_recipe_makes_of_prose_and_tags(prose: str, settings: dict[str, Any], made: str):
    config = CaptionsConfig.model_validate({"policy": "prose"} | settings)
    assert composed(prose, TAGS, config, {"trigger": "sks"}) == made


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The image shows a cat", "a cat"),
        ("this is a photo of two dogs", "two dogs"),
        ("In this picture, we can see a red box", "a red box"),
        ("there is a man", "a man"),
        ("the image quality is poor", "the image quality is poor"),
        ("a picture frame", "a picture frame"),
        ("a photo of", "a photo of"),
    ],
)
def test_openings_that_say_nothing_are_cut(text: str, left: str):
    assert strip_opening(text) == left


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"template": "{tag}"}, r"\{tag\} is unknown, expected \{prose\}"),
        ({"prompts": {"vlm": "what {is} it"}}, r"\{is\} is unknown, expected \{trigger\}"),
        ({"captioners": ["blip"]}, "expected NAME=FOLDER or NAME=OWNER/MODEL@COMMIT"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        CaptionsConfig.model_validate(settings)
