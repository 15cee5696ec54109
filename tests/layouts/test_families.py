"""Bases on disk, of every family that trains: their layers come from file headers, and every layout holds them."""

from pathlib import Path

import pytest
import torch

from components.config import BaseModelConfig, TrainingConfig
from components.errors import BadInput
from components.families import FAMILIES
from components.families.bases import resolve_base
from components.layouts.layers import Layer
from components.layouts.names import ARCHITECTURES, LAYOUTS
from components.layouts.reading import layers_of
from components.layouts.skeleton import skeleton_of
from components.training.adapters import add_adapter
from components.training.export import tensors_in
from tests.families.members import MEMBERS
from tests.families.page import CAN, COMFYUI, KOHYA, table
from tests.layouts.models import as_metadata, layers_with_random_factors, merged_weights, stored


def test_every_family_that_trains_has_its_layouts():
    assert set(FAMILIES) <= set(ARCHITECTURES)
    for pipeline, family in FAMILIES.items():
        assert ARCHITECTURES[pipeline].denoiser == family.denoiser_part


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_recipe_trains_goes_into_every_layout_and_comes_back(name: str, tmp_path: Path):
    """The widest preset, through the family's own loading; and a layer of every text encoder beside it."""
    base = resolve_base(BaseModelConfig(model=str(MEMBERS[name].build(tmp_path / "base"))))
    family, found, bones = base.architecture, ARCHITECTURES[base.family], skeleton_of(base)
    denoiser = family.load_denoiser(base.path, "cpu")
    add_adapter(denoiser, family, TrainingConfig(rank=2, lora_alpha=3.0, targets="all"))
    layers_with_random_factors(denoiser)
    tensors, settings = stored(denoiser, family.denoiser_part)
    expected = merged_weights(denoiser)
    assert set(expected) <= set(bones.shapes[family.denoiser_part])
    texts = [
        Layer(part, path, "lora", {"down": torch.ones(1, shape[1]), "up": torch.ones(shape[0], 1)}, 0.5)
        for part in found.encoders
        for path, shape in bones.shapes.get(part, {}).items()
        if path.endswith(("0.self_attn.q_proj", "0.SelfAttention.q"))
    ]
    assert {layer.part for layer in texts} == {part for part in found.encoders if (base.path / part).is_dir()}
    own = layers_of(tensors, as_metadata(settings), bones, "stored")
    cells = {"kohya": table(CAN)[name][KOHYA], "comfyui": table(CAN)[name][COMFYUI]}
    for layout in LAYOUTS:
        if layout in found.missing:
            with pytest.raises(BadInput, match="does not exist"):
                tensors_in(layout, own, bones)
            assert cells[layout] == f"none: {found.missing[layout]}"
            continue
        made = tensors_in(layout, [*own, *texts], bones)
        back = layers_of(made, as_metadata(settings) if layout == "diffusers" else {}, bones, "file")
        denoised = {layer.path: layer for layer in back if layer.part == family.denoiser_part}
        assert sorted(denoised) == sorted(expected), layout
        for path, layer in denoised.items():
            merged = layer.applied_to(bones.weight(family.denoiser_part, path))
            assert (merged - expected[path]).abs().max() < 2e-6, (layout, path)
        assert sorted(layer.name for layer in back if layer.part != family.denoiser_part) == sorted(
            layer.name for layer in texts
        )
        assert layout == "diffusers" or cells[layout] == f"yes: {found.readers[layout]}"
