"""Adapter files of other programs as contenders and as the start of a training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig
from PIL import Image, ImageChops
from safetensors.torch import load, load_file
from torch import Tensor

from components.config import looking_at
from components.errors import BadInput, RecipeError, Stopped
from components.evaluation.generation import Request, Settings, draw_gallery
from components.layouts.files import read_adapter
from components.layouts.names import Layout
from components.layouts.reading import import_adapter, layers_of, stored_layers
from components.layouts.skeleton import skeleton_of
from components.layouts.writing import stored_tensors
from components.tensors import to_safetensors
from components.training.conversion import convert
from components.training.export import tensors_in
from components.training.imports import imported_adapter
from tests.chain import Chain
from tests.layouts.models import Trained, layer_names, lora_config, merged_weights, trained

UNSAID = ("training.rank=16", "training.lora_alpha=16.0")  # the defaults: the file decides
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SHORT = ("training.max_train_steps=3", "training.checkpointing_steps=3", "training.preview_prompts=0",
         "training.validation_items=4", "training.validation_times=2")  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("imports"))
    chain.cache(chain.recipe())
    return chain


def unet_of(chain: Chain) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(chain.base_path, subfolder="unet")


def foreign(chain: Chain, layout: Layout, folder: Path, **settings: Any) -> tuple[Path, Trained]:
    """A file of a layout without our metadata, as another trainer might have left it: alpha is not the rank."""
    unet = unet_of(chain)
    adapter = trained(unet, "unet", lora_config(unet, target_modules=ATTENTION, **settings))  # type: ignore[arg-type]
    path = folder / f"{layout}.safetensors"
    path.write_bytes(to_safetensors(tensors_in(layout, adapter.layers, skeleton_of(chain.base()))))
    return path, adapter


def merged_by_layers(chain: Chain, data: bytes) -> dict[str, Tensor]:
    bones, header = skeleton_of(chain.base()), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    layers = layers_of(load(data), header["__metadata__"], bones, "file")
    return {layer.path: layer.applied_to(bones.weight(layer.part, layer.path)) for layer in layers}


@pytest.mark.parametrize("layout", ["kohya", "comfyui"])
def test_pictures_of_an_imported_file_are_those_of_the_adapter_that_it_was_made_from(
    chain: Chain, layout: Layout, tmp_path: Path
):
    path, adapter = foreign(chain, layout, tmp_path, rank_pattern={"to_v": 2})
    data, facts = imported_adapter(path, chain.base())
    assert imported_adapter(path, chain.base())[0] == data  # the same bytes, so the same gallery
    assert (facts["layout"], set(facts["kinds"]), set(facts["ranks"])) == (layout, {"LoRA"}, {"4", "2"})
    settings = Settings(2, 1.0, "auto", 32, 1, torch.get_num_threads())
    (picture,) = draw_gallery(
        chain.bench, chain.base(), chain.bench.store.put(data).sha256, [Request(0, "a red circle", None, 0)], settings,
        run_uid=None, on_progress=lambda count: None,
    )  # fmt: skip
    trained_file = to_safetensors(adapter.tensors, {"format": "pt", **adapter.metadata})
    (own,) = draw_gallery(
        chain.bench, chain.base(), chain.bench.store.put(trained_file).sha256, [picture.request], settings,
        run_uid=None, on_progress=lambda count: None,
    )  # fmt: skip
    drawn = [chain.bench.store.path(found.sha256) for found in (picture, own)]
    difference = ImageChops.difference(*(Image.open(file).convert("RGB") for file in drawn))
    assert max(high for _, high in difference.getextrema()) <= 1  # type: ignore[misc]  # alpha goes through float32


def test_a_file_with_our_settings_keeps_its_bytes(chain: Chain, tmp_path: Path):
    _, adapter = foreign(chain, "kohya", tmp_path)
    path = tmp_path / "ours.safetensors"
    path.write_bytes(to_safetensors(adapter.tensors, {"format": "pt", **adapter.metadata}))
    assert imported_adapter(path, chain.base())[0] == path.read_bytes()


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_a_training_goes_on_from_the_very_weights_of_the_file(chain: Chain, layout: Layout, tmp_path: Path):
    """With no step the adapter that comes out is the one that went in; the base's losses are the base's."""
    path, adapter = foreign(chain, layout, tmp_path, lora_alpha=4.0)
    fresh = chain.fine_tune(chain.recipe(*SHORT), work=f"fresh-{layout}")
    recipe = looking_at(chain.recipe(*SHORT), path)
    product = chain.fine_tune(recipe, work=f"look-{layout}")
    assert (product.facts["rank"], product.facts["lora_alpha"], product.facts["final_step"]) == (4, 4.0, 0)
    merged = merged_by_layers(chain, chain.bench.store.read(product.facts["sha256"]))
    assert sorted(merged) == sorted(adapter.merged)
    assert max((merged[name] - adapter.merged[name]).abs().max().item() for name in merged) < 2e-6
    losses, base = (load_file(chain.bench.store.path(p.outputs["validation"].sha256)) for p in (product, fresh))
    assert torch.equal(losses["base"], base["base"])
    assert not torch.equal(losses["0"], losses["base"])


@pytest.mark.parametrize("effective", [False, True], ids=["LoHa", "LoHa, Tucker"])
def test_a_training_goes_on_from_another_programs_loha(chain: Chain, effective: bool, tmp_path: Path):
    unet = unet_of(chain)
    names = [name for name in layer_names(unet) if "resnets" in name or "attn" in name]
    config = LoHaConfig(r=4, alpha=3.0, target_modules=names, use_effective_conv2d=effective)  # type: ignore[arg-type]
    adapter = trained(unet, "unet", config)
    path = tmp_path / "loha.safetensors"
    path.write_bytes(to_safetensors(tensors_in("kohya", adapter.layers, skeleton_of(chain.base()))))
    product = chain.fine_tune(looking_at(chain.recipe(*SHORT), path), work=f"loha-{effective}")
    merged = merged_by_layers(chain, chain.bench.store.read(product.facts["sha256"]))
    assert sorted(merged) == sorted(adapter.merged)
    assert max((merged[name] - adapter.merged[name]).abs().max().item() for name in merged) < 2e-6


def test_a_continued_training_is_resumed_to_the_same_bytes(chain: Chain, tmp_path: Path):
    path, _ = foreign(chain, "kohya", tmp_path, use_dora=True)
    recipe = chain.recipe(*SHORT, "training.checkpointing_steps=1", f"training.init_adapter={path}", *UNSAID)
    unbroken = chain.fine_tune(recipe, work="unbroken").facts["sha256"]
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=2)
    assert chain.fine_tune(recipe, work="broken").facts["sha256"] == unbroken
    untouched = chain.fine_tune(looking_at(recipe, path), work="look")
    assert unbroken != untouched.facts["sha256"]  # three steps changed it


def test_what_training_on_would_lose_is_refused(chain: Chain, tmp_path: Path):
    bones, unet = skeleton_of(chain.base()), unet_of(chain)
    lokr = trained(unet, "unet", LoKrConfig(r=4, alpha=4, target_modules=layer_names(unet)))  # type: ignore[arg-type]
    (layer, *_) = stored_layers(lokr.tensors, lokr.metadata)
    files = {
        "LoKr of another program can be evaluated, not trained on": tensors_in("kohya", lokr.layers, bones),
        "holds layers of the text_encoder, which training without it would lose": tensors_in(
            "kohya", [replace(layer, part="text_encoder", path="encoder.layers.0.mlp.fc1", kind="lora",
                              weights={"down": torch.ones(1, 16), "up": torch.ones(32, 1)})], bones),
    }  # fmt: skip
    for complaint, tensors in files.items():
        path = tmp_path / "file.safetensors"
        path.write_bytes(to_safetensors(tensors))
        with pytest.raises(BadInput, match=complaint):
            chain.fine_tune(chain.recipe(*SHORT, f"training.init_adapter={path}", *UNSAID), work="refused")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["training.init_adapter=a.safetensors", "training.rank=8"], "rank is 8, but init_adapter brings its own"),
        (
            ["training.init_adapter=a.safetensors", "training.targets=all", *UNSAID],
            "targets is 'all', but init_adapter",
        ),
        (["training.max_train_steps=0"], "max_train_steps is 0, but there is no init_adapter"),
    ],
)
def test_a_recipe_says_nothing_that_the_file_decides(chain: Chain, overrides: list[str], complaint: str):
    with pytest.raises(RecipeError, match=complaint):
        chain.recipe(*overrides)


def test_a_spelled_out_adapter_draws_the_same_with_the_stock_pipeline(chain: Chain, tmp_path: Path):
    """LoKr of another program: what is stored is a LoRA of full width that `load_lora_weights` reads."""
    unet = unet_of(chain)
    lokr = trained(unet, "unet", LoKrConfig(r=4, alpha=4, target_modules=ATTENTION))  # type: ignore[arg-type]
    bones = skeleton_of(chain.base())
    made, settings = stored_tensors(lokr.layers, bones)
    (tmp_path / "lora.safetensors").write_bytes(to_safetensors(made, {"lora_adapter_metadata": json.dumps(settings)}))
    pipeline = StableDiffusionPipeline.from_pretrained(chain.base_path)
    pipeline.load_lora_weights(str(tmp_path), weight_name="lora.safetensors", adapter_name="default")
    merged = merged_weights(pipeline.unet)
    assert max((merged[name] - lokr.merged[name]).abs().max().item() for name in lokr.merged) < 1e-5


def test_a_file_is_converted_resized_merged_and_extracted_again(chain: Chain, tmp_path: Path):
    base = chain.base()
    path, adapter = foreign(chain, "kohya", tmp_path)
    made = convert(path, base, tmp_path / "converted", ["diffusers", "comfyui"])
    assert {layout: file.name for layout, file in made.files.items()} == {
        "diffusers": "pytorch_lora_weights.safetensors", "comfyui": "kohya.safetensors"
    }  # fmt: skip
    folder = convert(path, base, tmp_path / "merged", merged=True).files["pipeline"]
    extracted = convert(folder, base, tmp_path / "extracted", ["kohya"], rank=4)
    assert extracted.error < 1e-5
    bones = skeleton_of(base)
    for file in (*made.files.values(), *extracted.files.values()):
        layers, _ = import_adapter(file, bones)
        assert sorted(layer.path for layer in layers) == sorted(adapter.merged)
        for layer in layers:
            assert (layer.applied_to(bones.weight("unet", layer.path)) - adapter.merged[layer.path]).abs().max() < 1e-5
    resized = convert(path, base, tmp_path / "resized", ["kohya"], rank=2)
    assert {layer.rank for layer in import_adapter(resized.files["kohya"], bones)[0]} == {2}
    _, metadata = read_adapter(resized.files["kohya"])
    assert 0 < float(metadata["safelight.frobenius_error"]) == pytest.approx(resized.error, rel=1e-5)
    with pytest.raises(BadInput, match="say with --rank which rank"):
        convert(folder, base, tmp_path / "no rank")


def test_a_converted_file_loads_in_the_stock_pipeline_with_its_scale(chain: Chain, tmp_path: Path):
    path, adapter = foreign(chain, "comfyui", tmp_path)
    file = convert(path, chain.base(), tmp_path / "converted", ["diffusers"]).files["diffusers"]
    pipeline = StableDiffusionPipeline.from_pretrained(chain.base_path)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="default")
    merged = merged_weights(pipeline.unet)
    assert max((merged[name] - adapter.merged[name]).abs().max().item() for name in adapter.merged) < 1e-5
