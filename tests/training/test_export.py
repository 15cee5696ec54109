"""What a run exports: files that stock programs draw the same with, headers and a card without a local path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoraConfig
from torch import Tensor
from transformers import CLIPTextModel

from components.catalog.models import Adapter, Evaluation, Generation, Run, Snapshot, SnapshotItem, StageRun
from components.config import parse_recipe
from components.errors import BadInput, DamagedArtifact
from components.families.stable_diffusion import StableDiffusion
from components.layouts.files import read_adapter
from components.layouts.reading import stored_layers
from components.layouts.tokens import Token
from components.stages import Bench
from components.training.adapters import adapter_bytes
from components.training.export import export_adapter
from tests.tiny import tiny_stable_diffusion

RANK, ALPHA = 4, 3.0  # different on purpose: a reader that takes alpha for the rank is 25 % off
RUN, STAGE = "0199aaaa-0000-7000-8000-000000000001", "k" * 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("bases") / "tiny-sd")


def tiny_unet(base: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(base, subfolder="unet")


def adapted_unet(base: Path, rslora: bool = False, preset: str = "all") -> UNet2DConditionModel:
    family, unet = StableDiffusion(), tiny_unet(base)
    unet.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=family.target_modules(unet, preset),  # type: ignore[arg-type]
            use_rslora=rslora,
        )
    )
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


def loaded_by_diffusers(base: Path, folder: Path, weight_name: str) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(str(folder), weight_name=weight_name)
    return output(pipeline.unet)


def store_adapter(bench: Bench, unet: UNet2DConditionModel, base: Path, *learnt: Any) -> str:
    """An adapter with the run, snapshot, evaluation and picture that lead to it; `learnt` is its text side."""
    ref = bench.store.put(adapter_bytes(unet, StableDiffusion(), *learnt))
    picture = bench.store.put(b"\x89PNG stand-in")
    recipe = parse_recipe({"name": "icons", "data": {"sources": [{"path": "/home/ada/private/icons"}]}}, origin="test")
    body = recipe.model_dump(mode="json") | {"base": {"model": str(base), "revision": None}}
    difference = {"value": -0.1, "low": -0.2, "high": -0.05}
    with bench.catalog.write() as session:
        snapshot = Snapshot(dataset="icons", version=3, digest="d" * 64, stage_key="s", kept=2, rejected=1, profile={})
        session.add(snapshot)
        session.flush()
        for ordinal in range(2):
            session.add(
                SnapshotItem(
                    snapshot_id=snapshot.id,
                    ordinal=ordinal,
                    file_name=f"{ordinal}.png",
                    kept=True,
                    caption="a rocket",
                    split="train",
                    licence="CC-BY-4.0",
                    source="/home/ada/icons",
                )
            )
        session.add(
            Run(
                run_uid=RUN,
                name="icons",
                kind="retrain",
                status="completed",
                recipe=body,
                host="laptop",
                pid=1,
                git_commit="abc",
                snapshot_id=snapshot.id,
                mlflow_run_id="m1",
                progress={},
                card={},
            )
        )
        session.flush()
        session.add(
            StageRun(run_uid=RUN, stage="fine-tune", key=STAGE, outcome="produced", seconds=1, items=1, bytes=1)
        )
        session.add(Adapter(sha256=ref.sha256, stage_key=STAGE, step=40))
        session.add(
            Evaluation(
                key="e",
                run_uid=RUN,
                fingerprint="f",
                adapter_sha256=ref.sha256,
                snapshot_digest="d" * 64,
                metrics={
                    "kid": {
                        "candidate": 0.1,
                        "base": 0.2,
                        "champion": None,
                        "difference": difference,
                        "n": 100,
                        "better": "lower",
                    }
                },
                verdict={"decision": "promote", "reasons": [{"outcome": "pass", "sentence": "kid is better"}]},
            )
        )
        session.flush()
        session.add(
            Generation(
                evaluation_key="e",
                role="candidate",
                step=40,
                adapter_sha256=ref.sha256,
                prompt_index=0,
                prompt='a "rocket"',
                seed=0,
                batch_index=0,
                batch_row=0,
                image_sha256=picture.sha256,
                metrics={},
            )
        )
    return ref.sha256


@pytest.mark.parametrize("rslora", [False, True], ids=["alpha / r", "alpha / sqrt(r)"])
def test_both_layouts_draw_what_training_drew_when_alpha_is_not_the_rank(
    bench: Bench, tmp_path: Path, base: Path, rslora: bool
):
    unet = adapted_unet(base, rslora)
    export = export_adapter(bench, store_adapter(bench, unet, base), tmp_path / "out")
    expected = output(unet)
    assert (expected - output(tiny_unet(base))).abs().max() > 0.1  # the adapter matters
    assert torch.equal(loaded_by_diffusers(base, export.folder, export.files["diffusers"].name), expected)
    kohya = loaded_by_diffusers(base, export.folder, export.files["kohya"].name)
    assert (kohya - expected).abs().max() < 1e-4


def test_a_run_exports_what_its_adapter_fits_into_and_says_what_it_does_not(bench: Bench, tmp_path: Path, base: Path):
    unet = tiny_unet(base)
    unet.add_adapter(LoHaConfig(r=RANK, alpha=2, target_modules=["to_q"]))  # type: ignore[arg-type]
    sha256 = store_adapter(bench, unet, base)
    export = export_adapter(bench, sha256, tmp_path / "out")
    assert set(export.files) == {"kohya"}
    assert "reads no LoHa; export the kohya layout" in export.skipped["diffusers"]
    _, metadata = read_adapter(export.files["kohya"])
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert metadata["ss_network_args"] == '{"algo": "loha"}'
    with pytest.raises(BadInput, match="reads no LoHa"):
        export_adapter(bench, sha256, tmp_path / "asked", ["diffusers"])


def test_without_its_base_an_adapter_is_exported_under_the_names_it_has(bench: Bench, tmp_path: Path, base: Path):
    sha256 = store_adapter(bench, adapted_unet(base), tmp_path / "gone")
    export = export_adapter(bench, sha256, tmp_path / "out")
    assert set(export.files) == {"diffusers"}
    assert "names layers as the base does, which is not here" in export.skipped["kohya"]


def test_the_diffusers_file_holds_the_stored_numbers_and_exporting_twice_gives_the_same_bytes(
    bench: Bench, tmp_path: Path, base: Path
):
    sha256, every = store_adapter(bench, adapted_unet(base), base), ("diffusers", "kohya", "comfyui")
    first, again = (export_adapter(bench, sha256, tmp_path / name, every) for name in ("first", "again"))
    names = {layout: path.name for layout, path in first.files.items()}
    assert names == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "kohya": "icons.safetensors",
        "comfyui": "icons-comfyui.safetensors",
    }
    stored, ours = (stored_layers(*read_adapter(path)) for path in (bench.store.path(sha256), first.files["diffusers"]))
    assert [(a.name, a.scale) for a in stored] == [(b.name, b.scale) for b in ours]
    for mine, theirs in zip(stored, ours, strict=True):
        assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in ("down", "up"))
    for layout in every:
        assert first.files[layout].read_bytes() == again.files[layout].read_bytes()


@pytest.mark.parametrize("preset", ["attention", "attention-mlp", "all-linear", "all"])
def test_a_stored_adapter_is_read_by_the_stock_loader_as_it_was_trained(tmp_path: Path, base: Path, preset: str):
    unet = adapted_unet(base, preset=preset)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(adapter_bytes(unet, StableDiffusion()))
    assert torch.equal(loaded_by_diffusers(base, tmp_path, "pytorch_lora_weights.safetensors"), output(unet))


def test_headers_and_card_name_data_base_and_run_but_no_local_path(bench: Bench, tmp_path: Path, base: Path):
    export = export_adapter(bench, store_adapter(bench, adapted_unet(base), base), tmp_path / "out")
    for path in export.files.values():
        _, metadata = read_adapter(path)
        assert metadata["safelight.run_uid"] == metadata["ss_session_id"] == RUN
        assert metadata["safelight.dataset_manifest_sha256"] == "d" * 64
        assert metadata["ss_network_dim"] == "4"
        assert metadata["ss_network_alpha"] == "3.0"
        assert metadata["ss_sd_model_name"] == "tiny-sd"
        assert metadata["ss_base_model_version"] == "sd_v1"
        assert metadata["ss_noise_offset"] == "0.0"
        assert metadata["ss_resolution"] == "(32, 32)"
        assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert b"/home/" not in path.read_bytes()
        assert str(base.parent).encode() not in path.read_bytes()
    card = export.card.read_text()
    assert "/home/" not in card
    assert str(base.parent) not in card
    assert "ada" not in card.split("## Training")[0].replace("adapter", "")
    assert "| KID to held-out pictures | lower | 0.2 | – | 0.1 | -0.1 [-0.2, -0.05] | 100 |" in card
    assert "| CC-BY-4.0 | 2 |" in card
    assert "**promote**" in card
    assert (export.folder / "images" / "0.png").read_bytes() == b"\x89PNG stand-in"
    import yaml

    front = yaml.safe_load(card.split("---")[1])
    assert front["widget"] == [{"text": 'a "rocket"', "output": {"url": "images/0.png"}}]
    assert front["pipeline_tag"] == "text-to-image"


def test_text_layers_and_a_token_go_into_every_layout_and_the_card_says_the_word(
    bench: Bench, tmp_path: Path, base: Path
):
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    text.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "fc2"], use_dora=True))  # type: ignore[arg-type]
    token = Token("<icon>", {"text_encoder": torch.ones(2, 16)})
    sha256 = store_adapter(bench, adapted_unet(base), base, {"text_encoder": text}, [token])
    export = export_adapter(bench, sha256, tmp_path / "out", ("diffusers", "kohya", "comfyui"))
    assert {name: path.name for name, path in export.files.items()} == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "kohya": "icons.safetensors",
        "comfyui": "icons-comfyui.safetensors",
        "embeddings": "learned_embeds.safetensors",
    }
    keys = {name: set(read_adapter(path)[0]) for name, path in export.files.items()}
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    assert f"text_encoder.{layer}.lora_magnitude_vector.weight" in keys["diffusers"]  # as transformers loads it
    assert {f"lora_te_{layer.replace('.', '_')}.{leaf}" for leaf in ("alpha", "dora_scale")} <= keys["kohya"]
    assert f"text_encoders.clip_l.transformer.{layer}.lora_A.weight" in keys["comfyui"]
    assert keys["embeddings"] == {"<icon>"}
    bundled = {name for name, found in keys.items() if "bundle_emb.<icon>.string_to_param.*" in found}
    assert bundled == {"kohya", "comfyui"}
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_textual_inversion(str(export.folder))
    pipeline.load_lora_weights(str(export.folder), weight_name=export.files["diffusers"].name)
    assert pipeline.tokenizer.tokenize("<icon> <icon>_1") == ["<icon>", "<icon>_1"]
    _, metadata = read_adapter(export.files["kohya"])
    assert metadata["modelspec.trigger_phrase"] == "<icon>"
    card = export.card.read_text()
    assert 'instance_prompt: "<icon>"' in card
    assert 'pipeline.load_textual_inversion(".", weight_name="learned_embeds.safetensors")' in card


def test_an_adapter_whose_bytes_were_altered_is_not_exported(bench: Bench, tmp_path: Path, base: Path):
    sha256 = store_adapter(bench, adapted_unet(base), base)
    path = bench.store.path(sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedArtifact, match="was altered"):
        export_adapter(bench, sha256, tmp_path / "out")
    assert not (tmp_path / "out").exists()
