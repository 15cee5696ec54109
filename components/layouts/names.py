"""What other programs call a model's layers, as tables, and which layouts exist for which architecture.

Programs that load single-file checkpoints name layers as the original implementation did; some of its matrices stack
several of diffusers' layers. Sources, read at these commits: kohya-ss/sd-scripts@48d368f (networks/lora.py,
lora_sd3.py, lora_flux.py, convert_flux_lora.py, library/sdxl_original_unet.py); ComfyUI (comfy/lora.py,
comfy/utils.py: unet_to_diffusers, mmdit_to_diffusers, flux_to_diffusers, z_image_to_diffusers); diffusers 0.42
(loaders/lora_conversion_utils.py, what it reads of kohya's files for FLUX.2, Z-Image and Qwen-Image).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["diffusers", "kohya", "comfyui"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "kohya", "comfyui")
Shapes = Mapping[str, tuple[int, ...]]  # module path -> shape of its weight


@dataclass(frozen=True, slots=True)
class Original:
    """A module of the original implementation: the diffusers layers that its rows hold, in order."""

    paths: tuple[str, ...]
    swapped: bool = False  # its rows are (shift, scale); diffusers has (scale, shift)


Table = dict[str, Original]  # original module -> what it holds


@dataclass(frozen=True, slots=True)
class Encoder:
    """A text encoder's prefix in kohya's files, and its place in ComfyUI's."""

    kohya: str
    comfyui: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """What is known of the adapters of one kind of pipeline."""

    title: str
    denoiser: str  # the part that is trained
    originals: Callable[[Shapes], Table]  # as ComfyUI names them
    kohya: Callable[[Shapes], Table]  # as kohya's trainers name them
    encoders: Mapping[str, Encoder]
    base_version: str | None  # kohya's ss_base_model_version
    readers: Mapping[Layout, str]  # layout -> who reads it
    missing: Mapping[Layout, str] = field(default_factory=dict)  # layout -> why there is none


# U-Nets -----------------------------------------------------------------------------------------------------------

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_EDGES = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
UNET_PATH = re.compile(
    r"^(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\.(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"\.(?P<index>\d+)\.(?P<rest>.+)$"
)


def unet_originals(shapes: Shapes) -> Table:
    """The names of CompVis' and Stability's U-Net: input_blocks, middle_block, output_blocks."""
    layers = len({path.split(".")[3] for path in shapes if path.startswith("down_blocks.0.resnets.")})
    attending = {path.split(".")[1] for path in shapes if re.match(r"up_blocks\.\d+\.attentions\.", path)}
    return {_sgm_name(path, layers, attending): Original((path,)) for path in shapes}


def _sgm_name(path: str, layers: int, attending: set[str]) -> str:
    """Input block 0 is conv_in; a block of n layers takes n input blocks and one for its downsampler, or n + 1 output
    blocks, the last of which also upsamples, behind its attention if it has one."""
    match = UNET_PATH.match(path)
    if match is None:
        return UNET_EDGES.get(path, path)
    kind, index, rest = match["kind"], int(match["index"]), match["rest"]
    inner = RESNET.get(rest, rest) if kind == "resnets" else rest
    if match["side"] is None:
        return f"middle_block.{2 * index if kind == 'resnets' else 2 * index + 1}.{inner}"
    first = (layers + 1) * int(match["block"])
    if match["side"] == "down":
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op"
        return f"input_blocks.{first + index + 1}.{int(kind == 'attentions')}.{inner}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + (match['block'] in attending)}.{inner}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{inner}"


# transformers: {} is a block's number; a tuple is stacked by rows ---------------------------------------------------

SD3_MODULES: dict[str, str | tuple[str, ...]] = {
    "joint_blocks.{}.x_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "joint_blocks.{}.x_block.attn2.qkv": tuple(f"transformer_blocks.{{}}.attn2.to_{x}" for x in "qkv"),
    "joint_blocks.{}.x_block.attn2.proj": "transformer_blocks.{}.attn2.to_out.0",
    "joint_blocks.{}.x_block.mlp.fc1": "transformer_blocks.{}.ff.net.0.proj",
    "joint_blocks.{}.x_block.mlp.fc2": "transformer_blocks.{}.ff.net.2",
    "joint_blocks.{}.x_block.adaLN_modulation.1": "transformer_blocks.{}.norm1.linear",
    "joint_blocks.{}.context_block.attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "joint_blocks.{}.context_block.attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "joint_blocks.{}.context_block.mlp.fc1": "transformer_blocks.{}.ff_context.net.0.proj",
    "joint_blocks.{}.context_block.mlp.fc2": "transformer_blocks.{}.ff_context.net.2",
    "joint_blocks.{}.context_block.adaLN_modulation.1": "transformer_blocks.{}.norm1_context.linear",
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
FLUX_MODULES: dict[str, str | tuple[str, ...]] = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
FLUX2_MODULES: dict[str, str | tuple[str, ...]] = {
    name: FLUX_MODULES[name]
    for name in (
        *(f"double_blocks.{{}}.{stream}_attn.{layer}" for stream in ("img", "txt") for layer in ("qkv", "proj")),
        *("img_in", "txt_in", "final_layer.adaLN_modulation.1", "final_layer.linear"),
    )
} | {
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.linear_in",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.linear_out",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.linear_in",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.linear_out",
    "single_blocks.{}.linear1": "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.attn.to_out",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}


def _from_templates(templates: Mapping[str, str | tuple[str, ...]]) -> Callable[[Shapes], Table]:
    def originals(shapes: Shapes) -> Table:
        blocks = 1 + max((int(path.split(".")[1]) for path in shapes if re.match(r"\w+\.\d+\.", path)), default=-1)
        table: Table = {}
        for name, layers in templates.items():
            for block in range(blocks if "{}" in name else 1):
                paths = tuple(path.format(block) for path in ((layers,) if isinstance(layers, str) else layers))
                if all(path in shapes for path in paths):
                    table[name.format(block)] = Original(paths, _swapped(paths[0], shapes))
        return table

    return originals


def _swapped(path: str, shapes: Shapes) -> bool:
    """AdaLayerNormContinuous, which only shifts and scales, keeps the two in the other order than the originals."""
    return path == "norm_out.linear" or (
        path.endswith("norm1_context.linear") and shapes[path][0] == 2 * shapes[path][1]
    )


def _same(shapes: Shapes) -> Table:
    return {path: Original((path,)) for path in shapes}


sd3_originals = _from_templates(SD3_MODULES)
flux_originals = _from_templates(FLUX_MODULES)
flux2_originals = _from_templates(FLUX2_MODULES)


# the architectures, by the class name in model_index.json -----------------------------------------------------------

CLIP_L = Encoder("lora_te1", "clip_l.transformer")
CLIP_G = Encoder("lora_te2", "clip_g.transformer")
T5 = Encoder("lora_te3", "t5xxl.transformer")
STOCK = "diffusers' load_lora_weights"
WEB = "A1111 / Forge and ComfyUI"
MUSUBI = "kohya's musubi-tuner, diffusers and ComfyUI"
ARCHITECTURES: dict[str, Architecture] = {
    "StableDiffusionPipeline": Architecture(
        "Stable Diffusion 1.x / 2.x",
        "unet",
        unet_originals,
        _same,
        {"text_encoder": Encoder("lora_te", "clip_l.transformer")},
        "sd_v1",
        {"diffusers": STOCK, "kohya": f"{WEB}, diffusers", "comfyui": "ComfyUI"},
    ),
    "StableDiffusionXLPipeline": Architecture(
        "Stable Diffusion XL",
        "unet",
        unet_originals,
        unet_originals,
        {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
        "sdxl_base_v1-0",
        {"diffusers": STOCK, "kohya": f"{WEB}, diffusers", "comfyui": "ComfyUI"},
    ),
    "StableDiffusion3Pipeline": Architecture(
        "Stable Diffusion 3 / 3.5",
        "transformer",
        sd3_originals,
        sd3_originals,
        {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5},
        None,
        {"diffusers": STOCK, "kohya": "ComfyUI and Forge, not diffusers", "comfyui": "ComfyUI"},
    ),
    "FluxPipeline": Architecture(
        "FLUX.1",
        "transformer",
        flux_originals,
        flux_originals,
        {"text_encoder": CLIP_L, "text_encoder_2": T5},
        "flux1",
        {"diffusers": STOCK, "kohya": "ComfyUI, Forge and diffusers", "comfyui": "ComfyUI"},
    ),
    "Flux2KleinPipeline": Architecture(
        "FLUX.2",
        "transformer",
        flux2_originals,
        flux2_originals,
        {},
        None,
        {"diffusers": STOCK, "kohya": MUSUBI, "comfyui": "ComfyUI"},
    ),
    "ZImagePipeline": Architecture(
        "Z-Image",
        "transformer",
        _same,
        _same,
        {},
        None,
        {"diffusers": STOCK, "kohya": MUSUBI, "comfyui": "ComfyUI and diffusers"},
    ),
    "QwenImagePipeline": Architecture(
        "Qwen-Image",
        "transformer",
        _same,
        _same,
        {},
        None,
        {"diffusers": STOCK, "kohya": MUSUBI, "comfyui": "ComfyUI and diffusers"},
    ),
    "SanaPipeline": Architecture(
        "Sana",
        "transformer",
        _same,
        _same,
        {},
        None,
        {"diffusers": STOCK},
        {"kohya": "kohya's trainers do not know Sana", "comfyui": "ComfyUI does not load Sana by itself"},
    ),
}
