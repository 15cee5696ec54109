"""What is said of a snapshot's captions: counted by the training tokenizer, with what falls off the end."""

import json
import shutil
from pathlib import Path
from typing import Any

from components.catalog import datasets
from components.catalog.datasets import Noted
from components.config import BaseModelConfig, DataConfig, DataSource
from components.curation.caption_statistics import (
    NAME,
    counted,
    cut_captions,
    describe_captions,
    note_caption_statistics,
    noted_statistics,
)
from components.curation.manifest import SampleRow
from components.families.bases import resolve_base
from components.families.tokens import CaptionReader, caption_readers
from components.stages import Bench
from tests.curation.folders import curated, pictures


def by_word(limit: int | None) -> CaptionReader:
    """A tokenizer of which every word is a token, with a start and an end."""

    def marks(text: str) -> list[int | None]:
        places = [i for i, letter in enumerate(text) if letter != " " and (i == 0 or text[i - 1] == " ")]
        return [None, *places, None]

    return CaptionReader("words", limit, lambda texts: [marks(text) for text in texts])


def row(name: str, text: str, **fields: object) -> SampleRow:
    return SampleRow("0" * 64, "0" * 64, name, text, None, "c", "train", 8, 8, None, None, None, 1, **fields)  # type: ignore[arg-type]


def test_lengths_repetitions_words_tags_trigger_and_authors_arecounted():
    rows = [
        row("a.png", "sks fox, red, app icon"),
        row("b.png", "sks fox, blue, app icon", caption_by="Ada"),
        row("c.png", "a fox on a hill under the moon", caption_by="blip@1"),
        row("d.png", "A fox  on a hill under the moon", variants=("sks",)),
    ]
    found = describe_captions(rows, [by_word(7), by_word(None)], ["sks"])
    assert (found["captions"], found["distinct"], found["identical_share"]) == (5, 4, 2 / 5)
    assert found["words"][:3] == [["fox", 4], ["sks", 3], ["app", 2]]
    assert found["tags"] == [["app icon", 2], ["sks fox", 2], ["blue", 1], ["red", 1]]
    assert found["triggers"] == {"sks": 3}
    assert found["written_by"] == {"sources": 2, "Ada": 1, "blip@1": 1}
    limited, unlimited = found["tokenizers"]
    assert (limited["median"], limited["longest"], limited["truncated"]) == (7.0, 10, 2)
    assert limited["worst"] == [
        {"file_name": "c.png", "tokens": 10, "lost": "under the moon"},
        {"file_name": "d.png", "tokens": 10, "lost": "under the moon"},
    ]
    assert (unlimited["truncated"], unlimited["worst"]) == (0, [])


def test_a_picture_is_flagged_where_most_of_its_captions_is_cut():
    rows = [row("a.png", "one two"), row("b.png", "one two three", variants=("one two three four five",))]
    lengths = [counted(rows, by_word(limit)) for limit in (4, 6, None)]
    reason = "The caption has 7 tokens, sdxl (words) reads 4: “three four five” is cut off."
    assert cut_captions(lengths, "sdxl") == {"b.png": Noted("flag", 7.0, 4.0, reason, "1")}
    assert cut_captions([counted(rows, by_word(7))], "sdxl") == {}


def test_flags_of_cut_captions_are_of_the_base_that_asked_last_and_not_of_the_snapshot(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    (folder / "001.txt").write_text("red rocket, app icon style " * 4 + "with a Last Word")
    product, base = curated(bench, folder), resolve_base(BaseModelConfig())
    facts, data = product.facts, DataConfig(sources=(DataSource(path=str(folder)),))
    assert "caption_tokens" not in facts["flags"]
    note_caption_statistics(bench, facts["snapshot_id"], facts["digest"], base, data)
    (item,) = datasets.items_page(bench.catalog, facts["snapshot_id"], check="caption_tokens").items
    ((flag, *others),) = datasets.verdicts_of(bench.catalog, facts["snapshot_id"], [item.ordinal]).values()
    assert (item.file_name, flag.check, flag.decision, others) == ("001.png", "caption_tokens", "flag", [])
    (reader,) = caption_readers(base)
    assert (flag.score, flag.threshold) == (reader.count([item.caption])[0], reader.limit)
    assert flag.reason.endswith("Last Word” is cut off.")

    far = shutil.copytree(base.path, tmp_path / "base")
    settings = json.loads((far / "tokenizer" / "tokenizer_config.json").read_text()) | {"model_max_length": 1000}
    (far / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    other = resolve_base(BaseModelConfig(model=str(far)))
    note_caption_statistics(bench, facts["snapshot_id"], facts["digest"], other, data)
    assert datasets.items_page(bench.catalog, facts["snapshot_id"], check="caption_tokens").items == ()
    assert noted_statistics(bench, facts["snapshot_id"], facts["digest"], base, data) is None  # so it is noted anew
    assert curated(bench, folder).outputs == product.outputs


def test_what_the_embedded_base_does_not_read_is_what_its_tokenizer_cuts():
    from transformers import AutoTokenizer

    base = resolve_base(BaseModelConfig())
    (reader,) = caption_readers(base)
    text = "red rocket, app icon style " * 4 + "with a Very Last Word"
    lost = reader.lost(text)
    tokenizer: Any = AutoTokenizer.from_pretrained(base.path / "tokenizer")
    kept = tokenizer(text, truncation=True, return_offsets_mapping=True)["offset_mapping"]
    assert lost == text[max(end for _, end in kept) :].lstrip() and lost.endswith("Very Last Word")
    assert reader.lost("red rocket") == ""


def test_they_are_noted_in_the_snapshots_profile_once_for_a_base(bench: Bench, tmp_path: Path):
    folder = pictures(tmp_path / "data", 3)
    facts = curated(bench, folder).facts
    data = DataConfig(sources=(DataSource(path=str(folder), trigger="blobs"),))
    base = resolve_base(BaseModelConfig())
    of = (facts["snapshot_id"], facts["digest"], base)
    assert noted_statistics(bench, *of, data) is None
    found = note_caption_statistics(bench, *of, data)
    snapshot = datasets.get_snapshot(bench.catalog, facts["snapshot_id"])
    assert snapshot is not None and snapshot.profile[NAME] == found and "kind" in snapshot.profile
    assert (found["triggers"], found["base"]) == ({"blobs": 3}, base.name)
    assert noted_statistics(bench, *of, data) == found
    other = data.model_copy(update={"sources": (DataSource(path=str(folder)),)})
    assert noted_statistics(bench, *of, other) is None
