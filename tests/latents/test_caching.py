"""Stale caches are impossible: exactly what changed is encoded again, and going back costs nothing."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from sqlalchemy import select
from transformers import CLIPTextModel

from components.catalog.encodings import locate
from components.catalog.models import EncodedItem
from components.curation.manifest import SampleRow
from components.errors import DamagedArtifact, TrainingDiverged
from components.families.stable_diffusion import StableDiffusion
from components.latents.encoding import encode_missing, pixels_of
from components.latents.keys import (
    Item,
    caption_item,
    pixel_encoder_key,
    placements,
    prompt_encoder_key,
    sample_item,
    usual_sizing,
)
from components.latents.pieces import Pieces
from components.latents.reading import Held, ShardReader, Watch
from components.storage import Store
from components.tensors import to_safetensors
from tests.chain import Chain

PICTURES = 60
CAPTIONS = 60 + 1  # and the null prompt


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain.build(tmp_path)


def counts(chain: Chain, *overrides: str) -> tuple[int, int]:
    """(pictures, captions) that a run of the caching stage encodes."""
    facts = chain.cache(chain.recipe(*overrides)).facts
    return facts["encoded_images"], facts["encoded_captions"]


def test_everything_is_encoded_once_and_then_never_again(chain: Chain):
    assert counts(chain) == (PICTURES, CAPTIONS)
    assert counts(chain) == (0, 0)


def test_one_picture_changed_in_place_with_its_times_set_back_is_encoded_again_and_reverting_reuses(chain: Chain):
    counts(chain)
    path = chain.pictures / "disc-red.png"
    before, original = path.stat(), path.read_bytes()
    image = Image.open(path).convert("RGB")
    image.putpixel((16, 16), (255, 254, 255))
    image.save(path)
    changed = path.read_bytes()
    path.write_bytes(changed + b"\0" * max(0, len(original) - len(changed)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert counts(chain) == (1, 0)
    path.write_bytes(original)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert counts(chain) == (0, 0)


def test_one_caption_changed_costs_one_embedding_and_reverting_none(chain: Chain):
    counts(chain)
    table = chain.pictures / "metadata.jsonl"
    original = table.read_text()
    rows = [json.loads(line) for line in original.splitlines()]
    rows[0]["text"] = "a disc as red as a fire engine"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert counts(chain) == (0, 1)
    table.write_text(original)
    assert counts(chain) == (0, 0)


def test_other_vae_weights_encode_every_picture_again_and_the_old_ones_reuse(chain: Chain):
    counts(chain)
    weights = chain.base_path / "vae"
    vae = AutoencoderKL.from_pretrained(weights)
    original = {path.name: path.read_bytes() for path in weights.iterdir()}
    with torch.no_grad():
        next(vae.encoder.parameters()).add_(1e-3)
    vae.save_pretrained(weights)
    assert counts(chain) == (PICTURES, 0)
    for name, data in original.items():
        (weights / name).write_bytes(data)
    assert counts(chain) == (0, 0)


def test_another_resolution_encodes_every_picture_again_and_the_old_one_reuses(chain: Chain):
    counts(chain)
    assert counts(chain, "training.resolution=16") == (PICTURES, 0)
    assert counts(chain) == (0, 0)


def test_a_damaged_shard_is_noticed_and_its_items_are_encoded_again(chain: Chain):
    product = chain.cache(chain.recipe())
    rows, base = chain.curate(chain.recipe()), chain.base()
    place = locate(chain.bench.catalog, pixel_encoder_key(base), [item_of(chain, rows[0]).key])
    ((shard, _),) = place.values()
    path = chain.bench.store.path(shard)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert counts(chain) == (PICTURES, 0)
    assert chain.cache(chain.recipe()).outputs == product.outputs


def item_of(chain: Chain, row: SampleRow) -> Item:
    return sample_item(row, *placements(row, usual_sizing(chain.base(), 32)))


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("vae", float("nan"), r"-\w+\.png: the base's encoder gives a mean that is not finite as torch\.float16; "),
        ("vae", 7e4, r"\.png: the base's encoder gives a mean that is not finite as torch\.float16"),  # its end: 65504
        ("text_encoder", float("inf"), r"^the caption '.*: .* gives a prompt_embeds that is not finite as "),
    ],
    ids=["NaN in a latent", "a latent beyond fp16", "infinity in an embedding"],
)
def test_what_is_not_finite_is_not_cached_and_its_file_is_named(chain: Chain, part: str, value: float, said: str):
    (file,) = (chain.base_path / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors["quant_conv.bias" if part == "vae" else "final_layer_norm.bias"].fill_(value)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TrainingDiverged, match=said) as refusal:
        chain.cache(chain.recipe())
    assert "\n" not in str(refusal.value)
    with chain.bench.catalog.read() as session:
        key = {"vae": pixel_encoder_key, "text_encoder": prompt_encoder_key}[part](chain.base())
        assert session.scalars(select(EncodedItem).where(EncodedItem.encoder == key)).all() == []


def test_cached_latents_and_embeddings_are_what_the_stock_pipeline_makes(chain: Chain):
    chain.cache(chain.recipe())
    rows, base = chain.curate(chain.recipe())[:3], chain.base()
    pipeline = base.architecture.load_pipeline(base.path, "cpu", torch.float32)
    items = [item_of(chain, row) for row in rows]
    keys = [item.key for item in items]
    cached = ShardReader(chain.bench.store, locate(chain.bench.catalog, pixel_encoder_key(base), keys))(keys)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels_of(chain.bench.store, items)).latent_dist
    torch.testing.assert_close(cached["mean"].float(), posterior.mean, atol=2e-3, rtol=2e-3)  # stored in float16
    captions = [caption_item(row.text).key for row in rows]
    embeds = ShardReader(chain.bench.store, locate(chain.bench.catalog, prompt_encoder_key(base), captions))(captions)
    stock, _ = pipeline.encode_prompt([row.text for row in rows], "cpu", 1, False)
    torch.testing.assert_close(embeds["prompt_embeds"], stock, atol=1e-5, rtol=1e-5)


def test_rows_are_read_by_sample_whatever_order_they_are_asked_in(chain: Chain):
    chain.cache(chain.recipe())
    rows, base = chain.curate(chain.recipe()), chain.base()
    keys = [item_of(chain, row).key for row in rows]
    reader = ShardReader(chain.bench.store, locate(chain.bench.catalog, pixel_encoder_key(base), keys))
    forward, backward = reader(keys)["mean"], reader(keys[::-1])["mean"]
    assert torch.equal(forward, backward.flip(0))


def test_bits_depend_neither_on_the_order_nor_on_the_company_in_which_an_item_is_encoded(chain: Chain):
    chain.cache(chain.recipe())
    rows, base = chain.curate(chain.recipe()), chain.base()
    encoder = base.architecture.load_pixel_encoder(base.path, "cpu")
    items = [item_of(chain, row) for row in rows[:11]]

    def encoded(name: str, order: list[Item]) -> torch.Tensor:
        encode_missing(
            chain.bench, name, order, lambda batch: encoder.encode(pixels_of(chain.bench.store, batch)), lambda _: None
        )
        keys = [item.key for item in items]
        return ShardReader(chain.bench.store, locate(chain.bench.catalog, name, keys))(keys)["mean"]

    whole = encoded("whole", items)
    encode_missing(
        chain.bench, "parts", items[7:9], lambda b: encoder.encode(pixels_of(chain.bench.store, b)), lambda _: None
    )
    assert torch.equal(encoded("parts", items[::-1]), whole)


def test_each_encoder_is_gone_before_the_next_is_loaded(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    """The text encoder when pictures are encoded, the autoencoder afterwards: nothing holds them, nor any memory."""

    def alive(kind: type) -> int:
        return sum(isinstance(thing, kind) for thing in gc.get_objects())

    gc.collect()
    before = alive(CLIPTextModel), alive(AutoencoderKL)
    seen = []
    load = StableDiffusion.load_pixel_encoder

    def look(self: StableDiffusion, base: Path, device: str) -> Any:
        seen.append((alive(CLIPTextModel), alive(AutoencoderKL)))
        return load(self, base, device)

    monkeypatch.setattr(StableDiffusion, "load_pixel_encoder", look)
    assert counts(chain) == (PICTURES, CAPTIONS)
    assert seen == [before]
    assert (alive(CLIPTextModel), alive(AutoencoderKL)) == before


# what is damaged, and what is left of a killed process ----------------------------------------------------------------


def test_a_picture_that_was_altered_in_the_store_is_named_and_nothing_is_made_of_it(chain: Chain):
    row = chain.curate(chain.recipe())[-1]
    flip(chain.bench.store.path(row.sha256))
    with pytest.raises(DamagedArtifact, match=f"object {row.sha256} in .* was altered"):
        chain.cache(chain.recipe())
    flip(chain.bench.store.path(row.sha256))
    assert counts(chain) == (PICTURES, 0)


def test_what_a_killed_process_had_encoded_is_taken_up_and_a_damaged_piece_is_encoded_again(chain: Chain):
    items = [caption_item(f"caption {i}") for i in range(20)]

    def encode(batch: list[Item]) -> dict[str, torch.Tensor]:
        return {"length": torch.tensor([[float(len(item.caption))] for item in batch])}

    pieces = Pieces(chain.bench, "lengths", Held(chain.bench, "lengths"))
    for part in (items[:5], items[5:10]):
        pieces.write([(item.key, {"length": encode([item])["length"][0]}) for item in part])
    first, _ = sorted(chain.bench.workspace.pieces.rglob("*-*"))
    lost = {item.key for item in items[:5]} if items[0].key in pieces.keys_of(first) else {i.key for i in items[5:10]}
    flip(first)
    asked: list[str] = []

    def counted(batch: list[Item]) -> dict[str, torch.Tensor]:
        asked.extend(dict.fromkeys(item.key for item in batch))
        return encode(batch)

    assert encode_missing(chain.bench, "lengths", items, counted, lambda _: None) == 15
    assert sorted(asked) == sorted({item.key for item in items[10:]} | lost)
    keys = [item.key for item in items]
    read = ShardReader(chain.bench.store, locate(chain.bench.catalog, "lengths", keys))(keys)["length"]
    assert read.flatten().tolist() == [float(len(item.caption)) for item in items]
    assert not list(chain.bench.workspace.pieces.rglob("*-*"))


# reading ------------------------------------------------------------------------------------------------------------


def first_shard(chain: Chain) -> tuple[str, list[str], dict[str, tuple[str, int]]]:
    """A shard of pictures, its keys, and where everything lies."""
    chain.cache(chain.recipe())
    keys = [item_of(chain, row).key for row in chain.curate(chain.recipe())]
    places = locate(chain.bench.catalog, pixel_encoder_key(chain.base()), keys)
    ((shard, _), *_) = places.values()
    return shard, keys, places


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_shard_that_was_altered_can_be_read_at_once_and_nothing_made_of_it_published(chain: Chain):
    shard, keys, places = first_shard(chain)
    flip(chain.bench.store.path(shard))
    watch = Watch(chain.bench)
    assert len(ShardReader(chain.bench.store, places, watch)(keys[:2])["mean"]) == 2
    with pytest.raises(DamagedArtifact, match=f"object {shard} in .* was altered"):
        watch.require_intact()
    with pytest.raises(DamagedArtifact, match="was altered"):
        ShardReader(chain.bench.store, places)(keys[:2])


def test_a_shard_that_was_cut_or_deleted_is_refused_when_it_is_opened(chain: Chain):
    shard, keys, places = first_shard(chain)
    path = chain.bench.store.path(shard)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DamagedArtifact, match="was altered"):
        ShardReader(chain.bench.store, places, Watch(chain.bench))(keys[:1])
    path.unlink()
    with pytest.raises(DamagedArtifact, match="is gone"):
        ShardReader(chain.bench.store, places, Watch(chain.bench))(keys[:1])


def test_a_training_that_has_read_an_altered_shard_publishes_no_adapter(chain: Chain):
    shard, _, _ = first_shard(chain)
    flip(chain.bench.store.path(shard))
    events: list[dict[str, Any]] = []
    with pytest.raises(DamagedArtifact, match="was altered"):
        chain.fine_tune(chain.recipe("training.max_train_steps=3"), events=events)
    assert not any(event["event"] in ("checkpoint", "preview") for event in events)
    assert not list((chain.bench.workspace.home / "work").rglob("manifest.json"))


def test_only_the_rows_that_are_asked_for_come_into_memory(tmp_path: Path):
    """A shard of 64 MB, of which two rows of 16 kB are read."""
    store = Store(tmp_path)
    rows = torch.zeros(4096, 4096)
    ref = store.put(to_safetensors({"mean": rows}))
    del rows
    reader = ShardReader(store, {"a": (ref.sha256, 7), "b": (ref.sha256, 4000)}, check=lambda shard: None)
    before = resident_bytes()
    assert reader(["a", "b"])["mean"].shape == (2, 4096)
    assert resident_bytes() - before < 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
