"""A base in 8 or 4 bits: what it costs in precision and saves in bytes, and that every adapter trains and leaves it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.config import BaseModelConfig, TrainingConfig
from components.errors import Stopped
from components.families.bases import BaseModel, resolve_base
from components.families.placement import weight_bytes
from components.training.adapters import KINDS, adapter_bytes, add_adapter, load_adapter
from components.training.quantisation import PRECISIONS, QuantisedLinear, quantise
from tests.benchmarks.geometry import GEOMETRIES
from tests.chain import Chain
from tests.tiny import tiny_stable_diffusion

ERRORS = {"fp8": 0.03, "int8": 0.01, "nf4": 0.11}  # of normal weights, relative to their norm
PREDICTION_ERRORS = {"fp8": 0.03, "int8": 0.01, "nf4": 0.1}  # of a tiny base with random weights
BYTES = {"fp8": 1 + 4 / 256, "int8": 1 + 4 / 256, "nf4": 0.5 + 4 / 64}  # of a weight in a layer of 256 columns
DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"
PAIRS_BYTES = 256 * 2 * 4  # every layer's table for nf4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return resolve_base(BaseModelConfig(model=str(tiny_stable_diffusion(tmp_path_factory.mktemp("base")))))


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(256, 192).requires_grad_(False)
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_kept_in_fewer_bytes_within_a_known_error(layer: nn.Linear, precision: str):
    quantised = QuantisedLinear(layer, precision, "cpu")
    assert (quantised.weight - layer.weight).norm() < ERRORS[precision] * layer.weight.norm()
    table = PAIRS_BYTES if precision == "nf4" else 0
    bias = layer.bias.nbytes
    assert weight_bytes(quantised) == BYTES[precision] * layer.weight.numel() + table + bias


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (64, 2)])
def test_any_shape_and_a_row_of_zeros_are_kept(precision: str, shape: tuple[int, int]):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[-1] = 0
    how = PRECISIONS[precision]
    decoded = how.decode(how.encode(weight), shape, torch.float32)
    assert decoded.shape == weight.shape and torch.isfinite(decoded).all() and not decoded[-1].any()


@pytest.mark.parametrize("shape", [(192, 256), (33, 17)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int]):
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes, whose NF4 this is compared with, is not installed"
    )
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    how = PRECISIONS["nf4"]
    codes = how.encode(weight)
    assert torch.equal(codes[0][: packed.numel()], packed.flatten())
    assert torch.equal(how.decode(codes, shape, torch.float32), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_those_of_the_decoded_weights_which_are_not_kept_for_them(layer: nn.Linear, precision: str):
    quantised, kept = QuantisedLinear(layer, precision, "cpu"), 0
    inputs = torch.randn(2, 7, 256, generator=torch.Generator().manual_seed(1))

    def gradient(product: Any) -> tuple[Tensor, Tensor]:
        x = inputs.clone().requires_grad_()
        y = product(x)
        y.square().sum().backward()
        assert x.grad is not None
        return y, x.grad

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    expected = gradient(lambda x: nn.functional.linear(x, quantised.weight, layer.bias))
    for ours, theirs in zip(gradient(quantised), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        quantised(inputs.clone().requires_grad_())
    assert kept == weight_bytes(quantised) - layer.bias.nbytes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_module_that_is_moved_to_another_dtype_keeps_its_codes(layer: nn.Linear, precision: str):
    quantised = QuantisedLinear(layer, precision, "cpu").to(torch.bfloat16)
    assert (quantised.weight - layer.weight).norm() < ERRORS[precision] * layer.weight.norm()


def prediction(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 24, 16, generator=generator)
    return denoiser(x, torch.tensor([3, 500]), context)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "nf4") for kind in KINDS), ("lora", "fp8"), ("lora", "int8")])
def test_every_adapter_starts_at_the_quantised_base_trains_and_is_drawn_by_the_stock_pipeline(
    base: BaseModel, kind: str, precision: str
):
    """The file holds float32 factors for the full-precision base: the pipeline's prediction is the trained one's, up
    to what quantising the base costs."""
    family = base.architecture
    denoiser: Any = family.load_denoiser(base.path, "cpu")
    exact = prediction(denoiser).detach()
    training = TrainingConfig(adapter=kind, rank=4, targets="attention-mlp")  # type: ignore[arg-type]
    parameters = add_adapter(denoiser, family, training)
    quantise(denoiser, precision, "cpu")
    tolerance = PREDICTION_ERRORS[precision] * exact.norm()
    assert 0 < (prediction(denoiser) - exact).norm() < tolerance
    optimizer = torch.optim.AdamW([parameter for _, parameter in parameters], lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        (prediction(denoiser) - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in parameters)
        optimizer.step()
    with torch.no_grad():
        trained = prediction(denoiser)
    assert (trained - exact).norm() > 3 * (prediction(denoiser) - trained).norm() + 0.1 * exact.norm()
    pipeline = family.load_pipeline(base.path, "cpu", torch.float32)
    load_adapter(pipeline, adapter_bytes(denoiser, family), family, base.path)
    with torch.no_grad():
        assert (prediction(pipeline.unet) - trained).norm() < 1.5 * tolerance


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux1-dev", "qwen-image"])
def test_the_documented_gigabytes_are_those_of_the_real_dimensions(name: str):
    """On the meta device; SD 1.5 and SDXL have convolutions, which stay as they are."""
    (line,) = [line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {name} |")]
    _, _, bf16, eight, four, *_ = [cell.strip() for cell in line.split("|")]
    weighed = []
    for precision in ("auto", "int8", "nf4"):
        denoiser = GEOMETRIES[name].empty().to(torch.bfloat16).requires_grad_(False)
        if precision != "auto":
            quantise(denoiser, precision, "meta")
        weighed.append(f"{weight_bytes(denoiser) / 1e9:.1f}")
    assert weighed == [bf16, eight, four]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain.build(tmp_path_factory.mktemp("chain"))
    chain.cache(chain.recipe())
    return chain


def test_a_training_on_a_quantised_base_that_was_stopped_ends_with_the_bytes_of_an_unbroken_one(chain: Chain):
    settings = ("training.max_train_steps=4", "training.checkpointing_steps=2", "training.preview_prompts=1")
    recipe = chain.recipe(*settings, "training.base_precision=nf4", "training.gradient_checkpointing=true")

    def digests(product: Any) -> dict[str, str]:
        return {name: ref.sha256 for name, ref in product.outputs.items()}

    unbroken = digests(chain.fine_tune(recipe, work="unbroken"))
    with pytest.raises(Stopped):
        chain.fine_tune(recipe, work="broken", stop_after=3)
    assert digests(chain.fine_tune(recipe, work="broken")) == unbroken
