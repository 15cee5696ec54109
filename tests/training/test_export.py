"""Adapter files that other programs open: both layouts give what training gave, and nothing else is read."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from components.catalog.models import Adapter, Evaluation, Generation, Run, Snapshot, SnapshotItem, StageRun
from components.config import parse_recipe
from components.errors import BadInput, DamagedArtifact
from components.families.stable_diffusion import StableDiffusion
from components.stages import Bench
from components.tensors import to_safetensors
from components.training.adapters import adapter_bytes
from components.training.export import export_adapter, kohya_tensors, lora_layers, read_adapter

RANK, ALPHA = 4, 3.0  # different on purpose: a reader that takes alpha for the rank is 25 % off
RUN, STAGE = "0199aaaa-0000-7000-8000-000000000001", "k" * 32


def tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8)


def stock_pipeline() -> StableDiffusionPipeline:
    text = CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=8))
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    parts: dict[str, Any] = {"tokenizer": None, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline(vae=vae, text_encoder=text, unet=tiny_unet(), requires_safety_checker=False,
                                   scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **parts)


def adapted_unet(rslora: bool = False, preset: str = "all") -> UNet2DConditionModel:
    family, unet = StableDiffusion(), tiny_unet()
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=family.target_modules(unet, preset),  # type: ignore[arg-type]
                                use_rslora=rslora))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet.eval()


def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, 16, generator=generator)
    with torch.inference_mode():
        return unet(x, torch.tensor([10, 700]), context).sample


def loaded_by_diffusers(folder: Path, weight_name: str) -> Tensor:
    pipeline = stock_pipeline()
    pipeline.load_lora_weights(str(folder), weight_name=weight_name)
    return output(pipeline.unet)


def store_adapter(bench: Bench, unet: UNet2DConditionModel) -> str:
    """An adapter with the run, snapshot, evaluation and picture that lead to it."""
    ref = bench.store.put(adapter_bytes(unet, StableDiffusion()))
    picture = bench.store.put(b"\x89PNG stand-in")
    recipe = parse_recipe({"name": "icons", "data": {"sources": [{"path": "/home/ada/private/icons"}]}}, origin="test")
    body = recipe.model_dump(mode="json") | {"base": {"model": "/home/ada/models/tiny-sd", "revision": None}}
    difference = {"value": -0.1, "low": -0.2, "high": -0.05}
    with bench.catalog.write() as session:
        snapshot = Snapshot(dataset="icons", version=3, digest="d" * 64, stage_key="s", kept=2, rejected=1, profile={})
        session.add(snapshot)
        session.flush()
        for ordinal in range(2):
            session.add(SnapshotItem(snapshot_id=snapshot.id, ordinal=ordinal, file_name=f"{ordinal}.png", kept=True,
                                     caption="a rocket", split="train", licence="CC-BY-4.0", source="/home/ada/icons"))
        session.add(Run(run_uid=RUN, name="icons", kind="retrain", status="completed", recipe=body, host="laptop",
                        pid=1, git_commit="abc", snapshot_id=snapshot.id, mlflow_run_id="m1", progress={}, card={}))
        session.flush()
        session.add(StageRun(run_uid=RUN, stage="fine-tune", key=STAGE, outcome="produced", seconds=1, items=1,
                             bytes=1))
        session.add(Adapter(sha256=ref.sha256, stage_key=STAGE, step=40))
        session.add(Evaluation(
            key="e", run_uid=RUN, fingerprint="f", adapter_sha256=ref.sha256, snapshot_digest="d" * 64,
            metrics={"kid": {"candidate": 0.1, "base": 0.2, "champion": None, "difference": difference, "n": 100,
                             "better": "lower"}},
            verdict={"decision": "promote", "reasons": [{"outcome": "pass", "sentence": "kid is better"}]}))
        session.flush()
        session.add(Generation(evaluation_key="e", role="candidate", step=40, adapter_sha256=ref.sha256, prompt_index=0,
                               prompt='a "rocket"', seed=0, batch_index=0, batch_row=0, image_sha256=picture.sha256,
                               metrics={}))
    return ref.sha256


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_both_layouts_draw_what_training_drew_when_alpha_is_not_the_rank(bench: Bench, tmp_path: Path, rslora: bool):
    unet = adapted_unet(rslora)
    export = export_adapter(bench, store_adapter(bench, unet), tmp_path / "out")
    expected = output(unet)
    base = output(tiny_unet())
    assert (expected - base).abs().max() > 0.1  # the adapter matters
    assert torch.equal(loaded_by_diffusers(export.folder, export.files["diffusers"].name), expected)
    kohya = loaded_by_diffusers(export.folder, export.files["kohya"].name)
    assert (kohya - expected).abs().max() < 1e-4


def test_the_kohya_file_applies_alpha_over_r_times_up_times_down_to_every_layer():
    unet = adapted_unet()
    tensors, metadata = loads(adapter_bytes(unet, StableDiffusion()))
    layers = lora_layers(tensors, metadata)
    kohya = kohya_tensors(layers)
    modules = dict(unet.named_modules())
    names = {layer.path.replace(".", "_") for layer in layers}
    assert {"conv_in", "down_blocks_0_resnets_0_conv1", "down_blocks_1_attentions_0_proj_in"} <= names
    assert len(kohya) == 3 * len(layers) == 3 * len(names)
    for layer in layers:
        name = f"lora_unet_{layer.path.replace('.', '_')}"
        down, up, alpha = (kohya[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        delta = alpha / down.shape[0] * torch.einsum("or,r...->o...", up.flatten(1), down)
        theirs: Any = modules[layer.path]
        assert torch.allclose(delta, theirs.get_delta_weight("default"), atol=1e-6), layer.path


def test_a_layer_with_its_own_alpha_keeps_it():
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], alpha_pattern={"to_k": 1.0}))  # type: ignore[arg-type]
    layers = lora_layers(*loads(adapter_bytes(unet, StableDiffusion())))
    assert {layer.path.rpartition(".")[2]: layer.scale for layer in layers} == {"to_q": 1.0, "to_k": 0.25}


def loads(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors.torch import load

    return load(data), json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_the_diffusers_file_holds_the_stored_numbers_and_exporting_twice_gives_the_same_bytes(bench: Bench,
                                                                                               tmp_path: Path):
    sha256 = store_adapter(bench, adapted_unet())
    first, again = (export_adapter(bench, sha256, tmp_path / name) for name in ("first", "again"))
    stored, ours = (lora_layers(*read_adapter(path)) for path in (bench.store.path(sha256), first.files["diffusers"]))
    assert [(a.part, a.path, a.scale) for a in stored] == [(b.part, b.path, b.scale) for b in ours]
    assert all(torch.equal(a.down, b.down) and torch.equal(a.up, b.up) for a, b in zip(stored, ours, strict=True))
    for layout in ("diffusers", "kohya"):
        assert first.files[layout].read_bytes() == again.files[layout].read_bytes()


@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all-linear", "all"])
def test_a_stored_adapter_is_read_by_the_stock_loader_as_it_was_trained(tmp_path: Path, preset: str):
    unet = adapted_unet(preset=preset)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(adapter_bytes(unet, StableDiffusion()))
    assert torch.equal(loaded_by_diffusers(tmp_path, "pytorch_lora_weights.safetensors"), output(unet))


def test_headers_and_card_name_data_base_and_run_but_no_local_path(bench: Bench, tmp_path: Path):
    export = export_adapter(bench, store_adapter(bench, adapted_unet()), tmp_path / "out")
    for path in export.files.values():
        _, metadata = read_adapter(path)
        assert metadata["safelight.run_uid"] == metadata["ss_session_id"] == RUN
        assert metadata["safelight.dataset_manifest_sha256"] == "d" * 64
        assert metadata["ss_network_dim"] == "4"
        assert metadata["ss_network_alpha"] == "3.0"
        assert metadata["ss_sd_model_name"] == "tiny-sd"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert b"/home/" not in path.read_bytes()
    card = export.card.read_text()
    assert "/home/" not in card
    assert "ada" not in card.split("## Training")[0].replace("adapter", "")
    assert "| KID to held-out pictures | lower | 0.2 | – | 0.1 | -0.1 [-0.2, -0.05] | 100 |" in card
    assert "| CC-BY-4.0 | 2 |" in card
    assert "**promote**" in card
    assert (export.folder / "images" / "0.png").read_bytes() == b"\x89PNG stand-in"
    import yaml

    front = yaml.safe_load(card.split("---")[1])
    assert front["widget"] == [{"text": 'a "rocket"', "output": {"url": "images/0.png"}}]
    assert front["pipeline_tag"] == "text-to-image"


def test_an_adapter_whose_bytes_were_altered_is_not_exported(bench: Bench, tmp_path: Path):
    sha256 = store_adapter(bench, adapted_unet())
    path = bench.store.path(sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="was altered"):
        export_adapter(bench, sha256, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Canary:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


WEIGHT, OTHER = torch.zeros(2, 2), torch.zeros(2, 2)
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
        (to_safetensors({"unet.a.weight": WEIGHT}), "no LoRA weight"),
        (to_safetensors({"unet.a.lora.down.weight": torch.zeros(1, dtype=torch.int64)}), "I64"),
        (to_safetensors({"unet.a.lora.down.weight": torch.zeros(1, 1, 1, 1, 1)}), "up to four sides"),
        (to_safetensors({f"unet.l{i}.lora.down.weight": torch.zeros(1) for i in range(20_001)}), "more than any"),
    ],
    ids=["a pickle", "a zip", "empty", "a huge header", "a broken header", "cut short", "NaN", "another key",
         "integers", "five sides", "too many tensors"],
)
def test_what_is_no_adapter_is_refused_in_one_line_and_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 data: bytes, complaint: str):
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


def test_half_a_layer_is_refused(tmp_path: Path):
    save_file({"unet.a.lora.down.weight": WEIGHT}, tmp_path / "lora.safetensors")
    with pytest.raises(BadInput, match="do not belong together"):
        lora_layers(*read_adapter(tmp_path / "lora.safetensors"))


def test_a_file_without_metadata_has_the_scale_that_stock_loaders_give_it():
    assert [layer.scale for layer in lora_layers(GOOD, {})] == [1.0]


def test_two_layers_of_one_kohya_name_are_refused():
    clash = {f"unet.{path}.lora.{side}.weight": WEIGHT for path in ("a.b_c", "a_b.c") for side in ("down", "up")}
    with pytest.raises(BadInput, match="two layers would be called"):
        kohya_tensors(lora_layers(clash, {}))
