"""Every layout of every architecture gives back the weights that PEFT trained, alpha and all."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
)
from peft import LoHaConfig, LoKrConfig
from safetensors.torch import load
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from components.errors import BadInput
from components.layouts.layers import Layer
from components.layouts.names import ARCHITECTURES, LAYOUTS, Layout
from components.layouts.reading import architecture_of, layers_of, layout_of
from components.layouts.skeleton import Skeleton, skeleton_of_modules
from components.layouts.writing import comfyui_tensors, diffusers_tensors, kohya_tensors, stored_tensors
from components.tensors import to_safetensors
from tests.layouts.models import (
    ALPHA,
    RANK,
    Trained,
    as_metadata,
    denoiser,
    layer_names,
    lora_config,
    merged_weights,
    skeleton,
    skeleton_with,
    trained,
    trained_lora,
)


def written(layout: Layout, layers: list[Layer], bones: Skeleton) -> dict[str, Tensor]:
    if layout == "diffusers":
        return diffusers_tensors(layers)
    return kohya_tensors(layers, bones) if layout == "kohya" else comfyui_tensors(layers, bones)


def reread(layout: Layout, adapter: Trained, bones: Skeleton) -> list[Layer]:
    """Through the bytes of a file and back."""
    tensors = load(to_safetensors(written(layout, adapter.layers, bones)))
    assert layout_of(tensors, "file") == layout
    return layers_of(tensors, adapter.metadata if layout == "diffusers" else {}, bones, "file")


def worst(layers: list[Layer], bones: Skeleton, expected: dict[str, Tensor], part: str) -> float:
    """The largest difference of a merged weight; every layer must be there."""
    assert sorted(layer.path for layer in layers if layer.part == part) == sorted(expected)
    return max(
        (layer.applied_to(bones.weight(layer.part, layer.path)) - expected[layer.path]).abs().max().item()
        for layer in layers
        if layer.part == part
    )


@pytest.mark.parametrize(
    ("pipeline", "use_rslora"), [*((name, False) for name in ARCHITECTURES), ("FluxPipeline", True)]
)
def test_every_layer_comes_back_with_the_weight_that_peft_merges(pipeline: str, use_rslora: bool):
    """Alpha is not the rank; with rsLoRA the scale is alpha / sqrt(r)."""
    found, bones, adapter = ARCHITECTURES[pipeline], skeleton(pipeline), trained_lora(pipeline, use_rslora=use_rslora)
    assert set(found.readers) | set(found.missing) == set(LAYOUTS)
    for layout in LAYOUTS:
        if layout in found.missing:
            with pytest.raises(BadInput, match=f"does not exist for {found.title}"):
                written(layout, adapter.layers, bones)
        else:
            assert worst(reread(layout, adapter, bones), bones, adapter.merged, found.denoiser) < 2e-6, layout


def test_layers_trained_with_their_own_ranks_alphas_or_not_at_all_fuse_and_split_again():
    module = denoiser("FluxPipeline")
    names = [name for name in layer_names(module) if "blocks" in name and not name.endswith(("to_k", "proj_mlp"))]
    own = {"rank_pattern": {"to_v": 6}, "alpha_pattern": {"to_q": 1.0}}
    adapter = trained(module, "transformer", lora_config(module, target_modules=names, **own))
    bones, ranks = skeleton("FluxPipeline"), {layer.path: layer.rank for layer in adapter.layers}
    assert set(ranks.values()) == {4, 6}
    for layout in LAYOUTS:
        back = reread(layout, adapter, bones)
        assert {layer.path: layer.rank for layer in back} == ranks
        assert worst(back, bones, adapter.merged, "transformer") < 2e-6


NAMES: dict[tuple[str, Layout], str] = {  # as they stand in files of kohya's trainers, and as ComfyUI looks for them
    ("StableDiffusionPipeline", "kohya"): "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
    ("StableDiffusionPipeline", "comfyui"): "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_out.0",
    ("StableDiffusionXLPipeline", "kohya"): "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_k",
    ("StableDiffusionXLPipeline", "comfyui"): "diffusion_model.output_blocks.5.2.conv",
    ("StableDiffusion3Pipeline", "kohya"): "lora_unet_joint_blocks_0_x_block_attn_qkv",
    ("StableDiffusion3Pipeline", "comfyui"): "diffusion_model.joint_blocks.1.context_block.attn.qkv",
    ("FluxPipeline", "kohya"): "lora_unet_double_blocks_1_img_attn_qkv",
    ("FluxPipeline", "comfyui"): "diffusion_model.single_blocks.1.linear1",
    ("Flux2KleinPipeline", "kohya"): "lora_unet_single_blocks_1_linear1",
    ("Flux2KleinPipeline", "comfyui"): "diffusion_model.double_blocks.0.txt_mlp.2",
    ("ZImagePipeline", "kohya"): "lora_unet_layers_1_attention_to_q",
    ("ZImagePipeline", "comfyui"): "diffusion_model.layers.1.attention.to_q",
    ("QwenImagePipeline", "kohya"): "lora_unet_transformer_blocks_0_attn_add_k_proj",
    ("QwenImagePipeline", "comfyui"): "diffusion_model.transformer_blocks.0.img_mlp.net.2",
}


@pytest.mark.parametrize(("pipeline", "layout"), NAMES)
def test_the_names_of_other_programs_are_what_their_files_have(pipeline: str, layout: Layout):
    made = written(layout, trained_lora(pipeline).layers, skeleton(pipeline))
    assert f"{NAMES[pipeline, layout]}.alpha" in made
    assert architecture_of(made) == ARCHITECTURES[pipeline].title


def test_an_sdxl_unet_of_full_depth_has_the_block_numbers_of_the_original():
    """SDXL's attentions are in inputs 4, 5, 7, 8, the middle and outputs 0 to 5; inputs 3 and 6 halve the size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=[5, 10, 20],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), sample_size=128,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
            transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    bones = skeleton_of_modules("sdxl", "StableDiffusionXLPipeline", {"unet": unet})
    names = set(bones.architecture.originals(bones.shapes["unet"]))
    queries = [name.split(".transformer_blocks.")[0] for name in names if name.endswith("attn1.to_q")]
    assert {place: queries.count(place) for place in queries} == {
        "input_blocks.4.1": 2, "input_blocks.5.1": 2, "input_blocks.7.1": 10, "input_blocks.8.1": 10,
        "middle_block.1": 10, "output_blocks.0.1": 10, "output_blocks.1.1": 10, "output_blocks.2.1": 10,
        "output_blocks.3.1": 2, "output_blocks.4.1": 2, "output_blocks.5.1": 2,
    }  # fmt: skip
    sizes = {"input_blocks.3.0.op", "input_blocks.6.0.op", "output_blocks.2.2.conv", "output_blocks.5.2.conv"}
    assert {name for name in names if name.endswith((".op", ".conv"))} == sizes


# what the stock loaders make of our files -----------------------------------------------------------------------------

STOCK: dict[str, Any] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
    "Flux2KleinPipeline": Flux2KleinPipeline,
    "ZImagePipeline": ZImagePipeline,
    "QwenImagePipeline": QwenImagePipeline,
}


def bare(pipeline: str) -> Any:
    """A stock pipeline around the tiny denoiser: its loader needs no other part."""
    parameters = set(inspect.signature(STOCK[pipeline].__init__).parameters) - {"self"}
    flags = {"requires_safety_checker", "is_distilled", "force_zeros_for_empty_prompt", "add_watermarker"} & parameters
    parts = dict.fromkeys(parameters - flags) | {ARCHITECTURES[pipeline].denoiser: denoiser(pipeline)}
    return STOCK[pipeline](**parts, **dict.fromkeys(flags, False))


def merged_by_the_stock_loader(pipeline: str, data: bytes, folder: Path) -> dict[str, Tensor]:
    (folder / "lora.safetensors").write_bytes(data)
    stock = bare(pipeline)
    stock.load_lora_weights(str(folder), weight_name="lora.safetensors", adapter_name="default")
    return merged_weights(getattr(stock, ARCHITECTURES[pipeline].denoiser))


def furthest(merged: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert sorted(merged) == sorted(expected)
    return max((merged[path] - expected[path]).abs().max().item() for path in expected)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("pipeline", STOCK)
def test_the_stock_loader_merges_our_files_to_the_same_weights(pipeline: str, layout: Layout, tmp_path: Path):
    adapter = trained_lora(pipeline)
    if pipeline == "Flux2KleinPipeline" and layout == "kohya":  # its reader of kohya's files knows these only
        module = denoiser(pipeline)
        names = [name for name in layer_names(module) if "blocks" in name or name.endswith("embedder")]
        adapter = trained(module, "transformer", lora_config(module, target_modules=names))
    made = written(layout, adapter.layers, skeleton(pipeline))
    data = to_safetensors(made, adapter.metadata if layout == "diffusers" else None)
    assert furthest(merged_by_the_stock_loader(pipeline, data, tmp_path), adapter.merged) < 1e-5


def test_the_stock_loader_splits_our_flux_file_into_what_was_trained(tmp_path: Path):
    """At FLUX.1's real widths, which that loader has built in; two blocks are enough, and no weight is needed."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    bones = skeleton_of_modules("flux", "FluxPipeline", {"transformer": transformer})
    generator = torch.Generator().manual_seed(0)
    layers = [
        Layer(
            "transformer",
            path,
            "lora",
            {
                "down": torch.randn(2, shape[1], generator=generator),
                "up": torch.randn(shape[0], 2, generator=generator),
            },
            1.5,
        )
        for path, shape in bones.shapes["transformer"].items()
        if "blocks" in path
    ]
    (tmp_path / "lora.safetensors").write_bytes(to_safetensors(kohya_tensors(layers, bones)))
    loaded = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    assert len(loaded) == 2 * len(layers)
    for layer in layers:
        probe = torch.randn(layer.weights["down"].shape[1], generator=generator)
        theirs = loaded[f"{layer.name}.lora_B.weight"] @ (loaded[f"{layer.name}.lora_A.weight"] @ probe)
        ours = 1.5 * (layer.weights["up"] @ (layer.weights["down"] @ probe))
        assert torch.allclose(theirs, ours, rtol=1e-5, atol=1e-3), layer.path


# other kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "FluxPipeline"])
def test_dora_keeps_the_length_of_every_output_row(pipeline: str):
    part, bones, module = ARCHITECTURES[pipeline].denoiser, skeleton(pipeline), denoiser(pipeline)
    adapter = trained(module, part, lora_config(module, use_dora=True))
    for layout in LAYOUTS:
        assert worst(reread(layout, adapter, bones), bones, adapter.merged, part) < 1e-5, layout


def test_comfyui_gets_dora_lengths_for_its_own_division():
    """ComfyUI (comfy/weight_adapter/base.py) scales the sum by dora_scale / |row of the base|, not of the sum."""
    bones, module = skeleton("StableDiffusionPipeline"), denoiser("StableDiffusionPipeline")
    target = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = trained(module, "unet", lora_config(module, target_modules=[target], use_dora=True))
    made = comfyui_tensors(adapter.layers, bones)
    key, weight = "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q", bones.weight("unet", target)
    summed = weight + made[f"{key}.alpha"] / RANK * made[f"{key}.lora_B.weight"] @ made[f"{key}.lora_A.weight"]
    theirs = summed * (made[f"{key}.dora_scale"] / weight.norm(dim=1, keepdim=True))
    assert torch.allclose(theirs, adapter.merged[target], atol=1e-6)


LYCORIS: dict[str, Any] = {
    "LoHa": lambda names: LoHaConfig(r=RANK, alpha=ALPHA, target_modules=names),  # type: ignore[arg-type]
    "LoHa, Tucker": lambda names: LoHaConfig(r=RANK, alpha=ALPHA, target_modules=names, use_effective_conv2d=True),  # type: ignore[arg-type]
    "LoKr": lambda names: LoKrConfig(r=RANK, alpha=ALPHA, target_modules=names),  # type: ignore[arg-type]
    "LoKr, decomposed": lambda names: LoKrConfig(
        r=1,
        alpha=ALPHA,
        target_modules=names,
        decompose_both=True,
        use_effective_conv2d=True,
        decompose_factor=4,  # type: ignore[arg-type]
    ),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_adapters_come_back_under_their_own_names(kind: str):
    bones, module = skeleton("StableDiffusionPipeline"), denoiser("StableDiffusionPipeline")
    adapter = trained(module, "unet", LYCORIS[kind](layer_names(module)))
    for layout in ("kohya", "comfyui"):
        assert worst(reread(layout, adapter, bones), bones, adapter.merged, "unet") < 2e-6, layout
    with pytest.raises(BadInput, match=f"reads no {kind[:4]}"):
        diffusers_tensors(adapter.layers)


@pytest.mark.parametrize(("kind", "fits"), [("LoHa", True), ("LoKr", False)])
def test_a_hadamard_product_fits_into_a_fused_matrix_and_a_kronecker_product_does_not(kind: str, fits: bool):
    bones, module = skeleton("StableDiffusion3Pipeline"), denoiser("StableDiffusion3Pipeline")
    names = [name for name in layer_names(module) if "attn" in name]
    adapter = trained(module, "transformer", LYCORIS[kind](names))
    assert worst(reread("comfyui", adapter, bones), bones, adapter.merged, "transformer") < 2e-6
    if fits:
        assert worst(reread("kohya", adapter, bones), bones, adapter.merged, "transformer") < 2e-6
    else:
        with pytest.raises(BadInput, match="LoKr of separate layers does not fit into the fused"):
            kohya_tensors(adapter.layers, bones)


# text encoders ----------------------------------------------------------------------------------------------------


def text_encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        projection_dim=16,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    t5 = T5Config(vocab_size=8, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    return {
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": CLIPTextModelWithProjection(clip),
        "text_encoder_3": T5EncoderModel(t5),
    }


def test_text_encoders_of_sd3_come_back_under_their_prefixes():
    bare_encoders = {part: model.eval().requires_grad_(False) for part, model in text_encoders().items()}
    bones = skeleton_with("StableDiffusion3Pipeline", **bare_encoders)
    targets = {"text_encoder": ["q_proj", "fc1"], "text_encoder_2": ["q_proj", "fc1"], "text_encoder_3": ["q", "wo"]}
    parts = {
        part: trained(model, part, lora_config(model, target_modules=targets[part]))
        for part, model in text_encoders().items()
    }
    layers = [layer for adapter in parts.values() for layer in adapter.layers]
    kohya, comfyui = kohya_tensors(layers, bones), comfyui_tensors(layers, bones)
    assert {
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.alpha",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha",
    } <= set(kohya)
    assert {
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj.alpha",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.alpha",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wo.alpha",
    } <= set(comfyui)
    for tensors in (kohya, comfyui):
        back = layers_of(tensors, {}, bones, "file")
        for part, adapter in parts.items():
            assert worst(back, bones, adapter.merged, part) < 2e-6, part


# imported adapters ------------------------------------------------------------------------------------------------


IMPORTS: dict[str, Any] = {
    "LoRA": lora_config,
    "LoRA of several ranks": lambda module: lora_config(module, rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 1.0}),
    "DoRA": lambda module: lora_config(module, use_dora=True),
    "LoKr": lambda module: LYCORIS["LoKr"](layer_names(module)),
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_an_imported_file_is_stored_so_that_the_stock_loader_gets_every_scale(kind: str, tmp_path: Path):
    """kohya's file -> layers -> stored adapter -> load_lora_weights."""
    bones, module = skeleton("StableDiffusionPipeline"), denoiser("StableDiffusionPipeline")
    adapter = trained(module, "unet", IMPORTS[kind](module))
    made, own = stored_tensors(reread("kohya", adapter, bones), bones)
    data = to_safetensors(made, as_metadata(own))
    assert furthest(merged_by_the_stock_loader("StableDiffusionPipeline", data, tmp_path), adapter.merged) < 1e-5
