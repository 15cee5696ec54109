"""Adapter files from outside: what is no adapter, or none for this base, is refused in one line."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from components.errors import BadInput
from components.layouts.files import read_adapter
from components.layouts.layers import Layer
from components.layouts.names import ARCHITECTURES, LAYOUTS
from components.layouts.reading import import_adapter, layers_of, stored_layers
from components.layouts.writing import comfyui_tensors, diffusers_tensors, kohya_tensors
from components.tensors import to_safetensors
from tests.layouts.models import skeleton, trained_lora


class Canary:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


WEIGHT, OTHER = torch.zeros(2, 2), torch.ones(2, 2)
GOOD = {"unet.a.lora.down.weight": WEIGHT, "unet.a.lora.up.weight": OTHER}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (pickle.dumps({"state": Canary()}), "pickle"),
        (b"PK\x03\x04" + bytes(100), "a pickle"),
        (b"", "something else"),
        ((1 << 60).to_bytes(8, "little") + bytes(64), "something else"),
        ((9).to_bytes(8, "little") + b"{" * 9, "not readable"),
        (to_safetensors(GOOD)[:-1], "not a whole safetensors file"),
        (to_safetensors({"unet.a.lora.down.weight": torch.tensor([[float("nan")]])}), "not finite"),
        (to_safetensors({"unet.a.lora.down.weight": torch.zeros(1, dtype=torch.int64)}), "I64"),
        (to_safetensors({"unet.a.lora.down.weight": torch.zeros(1, 1, 1, 1, 1)}), "up to four sides"),
        (to_safetensors({f"unet.l{i}.lora.down.weight": torch.zeros(1) for i in range(20_001)}), "more than any"),
    ],
    ids=[
        "a pickle",
        "a zip",
        "empty",
        "a huge header",
        "a broken header",
        "cut short",
        "NaN",
        "integers",
        "five sides",
        "too many tensors",
    ],
)
def test_what_is_no_adapter_is_refused_in_one_line_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, complaint: str
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora.safetensors"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=complaint) as refusal:
        read_adapter(path)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "canary").exists()


def test_a_shape_larger_than_the_file_is_refused_before_anything_is_allocated(tmp_path: Path):
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 4]}
    header = json.dumps({"unet.a.lora.down.weight": entry})
    path = tmp_path / "lora.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        read_adapter(path)


def test_a_file_without_metadata_has_the_scale_that_stock_loaders_give_it():
    assert [layer.scale for layer in stored_layers(GOOD, {})] == [1.0]


def test_two_layers_of_one_kohya_name_are_refused():
    bones = skeleton("StableDiffusionPipeline")
    shapes = {"unet": {"a.b_c": (2, 2), "a_b.c": (2, 2)}}
    clash = [Layer("unet", path, "lora", {"down": WEIGHT, "up": OTHER}, 1.0) for path in shapes["unet"]]
    with pytest.raises(BadInput, match="two layers would be called lora_unet_a_b_c"):
        kohya_tensors(clash, replace(bones, shapes=shapes))


def without(ending: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = next(key for key in tensors if key.endswith(ending))
    return {key: tensor for key, tensor in tensors.items() if key != first}


def cut(ending: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:, :-1].contiguous() if key.endswith(ending) else tensor for key, tensor in tensors.items()}


SD, XL, FLUX = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline"
STRANGERS: dict[str, tuple[str, Any, str]] = {  # base, file, complaint
    "an SDXL file in kohya's layout": (
        SD,
        lambda: kohya_tensors(trained_lora(XL).layers, skeleton(XL)),
        r"is no layer of tiny StableDiffusionPipeline .*looks like an adapter for Stable Diffusion XL",
    ),
    "an SD file on SDXL": (
        XL,
        lambda: kohya_tensors(trained_lora(SD).layers, skeleton(SD)),
        r"looks like an adapter for Stable Diffusion 1.x / 2.x, use it with such a base",
    ),
    "a FLUX.1 file in ComfyUI's layout": (
        SD,
        lambda: comfyui_tensors(trained_lora(FLUX).layers, skeleton(FLUX)),
        "looks like an adapter for FLUX.1",
    ),
    "a Qwen-Image file in diffusers' layout": (
        FLUX,
        lambda: diffusers_tensors(trained_lora("QwenImagePipeline").layers),
        "looks like an adapter for Qwen-Image",
    ),
    "another width": (
        SD,
        lambda: cut("lora_down.weight", kohya_tensors(trained_lora(SD).layers, skeleton(SD))),
        r"which do not make \(.*its shape in tiny .*made for another base of this kind",
    ),
    "half a layer": (
        SD,
        lambda: without("lora_up.weight", kohya_tensors(trained_lora(SD).layers, skeleton(SD))),
        "has down .*which do not belong together",
    ),
    "two layouts": (
        SD,
        lambda: {"lora_unet_conv_in.alpha": WEIGHT, "unet.conv_in.lora_A.weight": OTHER},
        "keys of several layouts",
    ),
    "an unknown factor": (SD, lambda: {"unet.conv_in.glora_a": WEIGHT}, "no weight of a LoRA, DoRA, LoHa or LoKr"),
    "OFT": (SD, lambda: {"unet.conv_in.oft_R.weight": WEIGHT}, "OFT has no file layout"),
    "no adapter at all": (SD, lambda: {"model.diffusion_model.x.weight": WEIGHT}, "no LoRA weight of a known layout"),
    "DoRA over the inputs": (
        SD,
        lambda: {
            "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
            "lora_unet_conv_in.alpha": torch.ones(()),
            "lora_unet_conv_in.lora_up.weight": torch.ones(16, 2, 1, 1),
            "lora_unet_conv_in.dora_scale": torch.ones(1, 4, 1, 1),
        },
        "lengths of the inputs cannot be held",
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_a_file_that_is_not_for_this_base_is_refused_with_what_it_is(tmp_path: Path, case: str):
    pipeline, make, complaint = STRANGERS[case]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(to_safetensors(make()))
    with pytest.raises(BadInput, match=complaint) as refusal:
        import_adapter(path, skeleton(pipeline))
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)


def test_the_names_that_diffusers_used_before_peft_are_read():
    shape = skeleton(SD).shapes["unet"]["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    old = {f"{module}.down.weight": torch.ones(2, shape[1]), f"{module}.up.weight": torch.ones(shape[0], 2)}
    (layer,) = layers_of(old, {}, skeleton(SD), "file")
    assert layer.path == "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert torch.equal(layer.delta(), torch.full(shape, 2.0))


def test_the_table_of_layouts_has_no_empty_cell_and_says_what_the_code_does():
    readme = (Path(__file__).parents[2] / "components" / "layouts" / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in readme.splitlines() if line.startswith("| ")]
    written = {cells[0]: cells[1:] for cells in lines}
    for found in ARCHITECTURES.values():
        cells = [found.readers[at] if at in found.readers else f"none: {found.missing[at]}" for at in LAYOUTS]
        assert written[found.title] == cells
