"""Captions in several wordings with cached embeddings: all of them encoded once, one of them drawn in each step."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from components.config import CurationConfig, DataConfig, DataSource, TrainingConfig
from components.curation.manifest import SampleRow, read_manifest
from components.curation.snapshots import curate
from components.diffusion.draws import Draw
from components.errors import RecipeError, Stopped
from components.latents.keys import cache_key, usual_sizing
from components.latents.wording import Wording
from components.training.samples import cached_samples
from tests.chain import Chain

TAGS = "sks dog, running, outdoors, best, blurry"
SHUFFLED = ("training.shuffle_caption=true", "training.caption_wordings=4")
TINY = (
    "training.max_train_steps=3",
    "training.checkpointing_steps=3",
    "training.train_batch_size=2",
    "training.validation_items=2",
    "training.validation_times=1",
    "training.preview_prompts=0",
    "training.learning_rate=1e-2",
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain.build(tmp_path_factory.mktemp("chain"))


def row(text: str, *variants: str) -> SampleRow:
    return SampleRow("s", "r", "f", text, None, "c", "train", 8, 8, None, None, None, 1, None, variants)


def shuffled(**changes) -> Wording:
    return Wording.of(TrainingConfig.model_validate({"shuffle_caption": True, **changes}))


def test_an_order_holds_every_tag_once_and_the_kept_ones_first():
    texts = shuffled(keep_tokens=2, caption_wordings=64).texts(row(TAGS))
    assert len(texts) == len(set(texts)) == 6  # 3! orders of the loose tags: all are met in 64
    for text in texts:
        tags = text.split(", ")
        assert tags[:2] == ["sks dog", "running"]
        assert sorted(tags) == sorted(TAGS.split(", "))


def test_every_place_is_as_likely_for_every_tag():
    texts = [shuffled(caption_wordings=1).texts(row(f"a{i}, b, c, d"))[0] for i in range(2000)]
    places = Counter(text.split(", ").index("b") for text in texts)
    assert all(abs(places[k] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for k in range(4))  # five standard deviations


def test_tags_are_dropped_at_the_rate_asked_for_but_never_all_and_never_kept_ones():
    wording = shuffled(caption_wordings=1, caption_tag_dropout_rate=0.3, keep_tokens=1)
    texts = [wording.texts(row(f"k{i}, " + ", ".join("abcdefghij")))[0].split(", ") for i in range(1000)]
    assert all(text[0] == f"k{i}" for i, text in enumerate(texts))
    left = sum(len(text) - 1 for text in texts) / 10_000
    assert abs(left - 0.7) < 5 * (0.3 * 0.7 / 10_000) ** 0.5
    assert all(shuffled(caption_wordings=32, caption_tag_dropout_rate=0.99).texts(row("a, b")))


def test_without_the_settings_captions_are_as_written_and_the_caches_key_is_what_it_was(chain: Chain):
    plain = Wording.of(TrainingConfig())
    assert plain.texts(row(TAGS)) == (TAGS,)
    assert plain.texts(row("one", "two", "one")) == ("one", "two")
    assert plain.settings() == {}
    keys = {
        cache_key("d", chain.base(), usual_sizing(chain.base(), 32), wording)
        for wording in (plain, shuffled(), shuffled(keep_tokens=1))
    }
    assert len(keys) == 3


def test_every_wording_is_encoded_once_and_the_step_sees_the_drawn_ones_embedding(chain: Chain):
    recipe = chain.recipe(*SHUFFLED)
    rows = [r for r in chain.curate(recipe) if r.split == "train"]
    wording = Wording.of(recipe.training)
    first = chain.cache(recipe).facts["encoded_captions"]
    assert chain.cache(recipe).facts["encoded_captions"] == 0
    texts = {text for r in rows for text in wording.texts(r)} | {r.text for r in chain.curate(recipe)} | {""}
    assert first == len(texts)
    samples = cached_samples(
        chain.bench, rows, chain.base(), usual_sizing(chain.base(), 32), masked=False, wording=wording
    )
    encoder = chain.base().architecture.load_prompt_encoder(chain.base_path, "cpu")
    seen = set()
    for step in range(24):
        drawn = samples.reworded(samples.batch([3]), Draw(0, step, samples.ids[3:4])).cond["prompt_embeds"][0]
        again = samples.reworded(samples.batch([3, 5]), Draw(0, step, (samples.ids[3], samples.ids[5])))
        assert torch.equal(again.cond["prompt_embeds"][0], drawn)  # whatever the neighbours
        fits = [
            t
            for t in wording.texts(rows[3])
            if torch.allclose(encoder.encode([t])["prompt_embeds"][0], drawn, atol=1e-5)
        ]
        seen.update(fits)
        assert len(fits) == 1
    assert seen == set(wording.texts(rows[3])) and len(seen) == 2


def test_every_line_of_a_caption_file_is_a_variant_where_the_recipe_says_so(chain: Chain, tmp_path: Path):
    (tmp_path / "set").mkdir()
    for name in ("a", "b"):
        source = sorted(chain.pictures.glob("*.png"))["ab".index(name) * 17]
        (tmp_path / "set" / f"{name}.png").write_bytes(source.read_bytes())
        (tmp_path / "set" / f"{name}.txt").write_text(f"{name} first\n\n  {name}  second \n{name} third\n")

    def rows(lines: str) -> list[SampleRow]:
        data = DataConfig(sources=(DataSource.model_validate({"path": str(tmp_path / "set"), "caption_lines": lines}),))
        curation = CurationConfig(near_duplicates=False, min_side=8, test_fraction=0)
        product = curate(chain.bench, data, curation, dataset=lines, training_size=32)
        return read_manifest(chain.bench.store, product.facts["digest"])

    assert [(r.text, r.variants) for r in rows("variants")] == [
        (f"{name} first", (f"{name} second", f"{name} third")) for name in ("a", "b")
    ]
    assert [(r.text, r.variants) for r in rows("first")] == [("a first", ()), ("b first", ())]


def test_a_training_with_drawn_wordings_survives_a_stop_to_the_byte(chain: Chain):
    recipe = chain.recipe(*TINY, *SHUFFLED)
    chain.cache(recipe)
    unbroken = chain.fine_tune(recipe, work="unbroken")
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=2)
    assert chain.fine_tune(recipe, work="broken").outputs == unbroken.outputs
    assert chain.fine_tune(chain.recipe(*TINY), work="plain").outputs != unbroken.outputs


@pytest.mark.parametrize("setting", ["keep_tokens=1", "caption_wordings=2", "caption_tag_dropout_rate=0.1"])
def test_a_setting_of_tags_that_would_do_nothing_is_refused(chain: Chain, setting: str):
    with pytest.raises(RecipeError, match="but shuffle_caption is False, expected True"):
        chain.recipe(f"training.{setting}")
