"""Compiled blocks, CUDA graphs, memory formats: the same predictions and gradients; refusals where there are none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from components.config import BaseModelConfig, TrainingConfig
from components.errors import BadInput, RecipeError
from components.families.bases import BaseModel, resolve_base
from components.families.family import Framing
from components.latents.ragged import Tensors, stacked
from components.tensors import lay_channels_last
from components.training.acceleration import (
    GraphedPasses,
    compile_blocks,
    loading_device,
    prepare,
    tensor_cores,
)
from components.training.adapters import add_adapter
from components.training.quantisation import PRECISIONS, quantise
from tests.chain import Chain
from tests.families.members import MEMBERS, Member

NO_CUDA = "CUDA graphs are replayed on a CUDA GPU, and here is none"
SETTINGS = TrainingConfig(rank=2, targets="attention")


def base_of(member: Member, folder: Path) -> BaseModel:
    return resolve_base(BaseModelConfig(model=str(member.build(folder / "base"))))


def adapted(base: BaseModel, training: TrainingConfig, device: str = "cpu") -> tuple[Any, list[nn.Parameter]]:
    """A denoiser in training with an adapter that is away from zero."""
    denoiser: Any = base.architecture.load_denoiser(base.path, device, torch.float32).train()
    parameters = [parameter for _, parameter in add_adapter(denoiser, base.architecture, training)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(device) * 0.05)
    return denoiser, parameters


def step_of(base: BaseModel, side: int, height: int, width: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensors]:
    """Noisy latents (2, C, height, width) at two times, and what they are conditioned on."""
    family, generator = base.architecture, torch.Generator().manual_seed(height)
    cond = family.load_prompt_encoder(base.path, "cpu").encode(["disc, red", "a blue sign"])
    cond = {name: tensor.clone() for name, tensor in cond.items()}
    cond |= stacked([family.sample_condition(Framing((side, side), (0, 0), (side, side)))] * 2)
    x_t = torch.randn(2, family.geometry(base.path).channels, height, width, generator=generator)
    return x_t.to(device), torch.tensor([100.0, 700.0], device=device), {n: t.to(device) for n, t in cond.items()}


class Blocks(nn.Module):
    """A frozen model of three equal blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 64)) for _ in range(3)
        )
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_what_the_compiler_generates_computes_what_the_blocks_did():
    """The compiler itself, on a model that it takes seconds for: NF4's lookups and products, there and back."""
    model, x = Blocks(), torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    quantise(model, "nf4", "cpu")

    def run() -> tuple[Tensor, Tensor]:
        inputs = x.clone().requires_grad_()
        y = model(inputs)
        y.square().mean().backward()
        assert inputs.grad is not None
        return y.detach(), inputs.grad

    eager = run()
    counters.clear()
    compile_blocks(model, dynamic=False)
    for ours, theirs in zip(run(), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1  # for three blocks
    with torch.no_grad():
        model(torch.zeros(7, 64))
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_blocks_of_a_checkpointed_quantised_base_train_like_eager_ones_in_every_bucket(tmp_path: Path):
    """Traced, guarded and differentiated as by the compiler, whose own code generation takes minutes for a model."""
    member = MEMBERS["flux1-dev"]
    base, training = base_of(member, tmp_path), SETTINGS.model_copy(update={"base_precision": "int8"})
    results = []
    for compiled in (False, True):
        denoiser, parameters = adapted(base, training)
        denoiser.enable_gradient_checkpointing()
        prepare(denoiser, training, "cpu", {})
        if compiled:
            counters.clear()
            compile_blocks(denoiser, dynamic=False, backend="aot_eager")
        seen = []
        for height, width in ((8, 8), (4, 8), (8, 8)):
            prediction = base.architecture.denoise(denoiser, *step_of(base, member.side, height, width))
            prediction.square().mean().backward()
            seen.append(prediction.detach())
        results.append(seen + [parameter.grad for parameter in parameters])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4  # two kinds of blocks in two buckets


@pytest.mark.parametrize(
    ("device", "null", "reason"),
    [
        ("cpu", {}, "training.cuda_graphs needs a CUDA GPU, and this training is on the CPU; leave it out"),
        ("cuda", {"prompt_embeds_mask": torch.ones(1, 1)}, "needs prompts of one length"),
    ],
)
def test_cuda_graphs_are_refused_where_there_are_none_and_for_texts_of_many_lengths(
    device: str, null: Tensors, reason: str
):
    with pytest.raises(BadInput, match=reason):
        prepare(Blocks(), TrainingConfig(cuda_graphs=True), device, null)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [("gradient_checkpointing=true", "gradient_checkpointing is"), ("train_text_encoder=true", "the text side is")],
)
def test_cuda_graphs_exclude_what_they_cannot_hold(other: str, complaint: str, tmp_path: Path):
    chain = Chain.build(tmp_path)
    with pytest.raises(RecipeError, match=f"cuda_graphs is True, but {complaint}"):
        chain.recipe("training.cuda_graphs=true", f"training.{other}")


class Crossings(TorchDispatchMode):
    """Operations that read or write more than one device, or hand the host a number: none of them can be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1 or "local_scalar" in str(func):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux1-dev", "flux2-klein"])
def test_a_pass_that_is_captured_stays_on_the_device(name: str, tmp_path: Path):
    """On the meta device, where every tensor that is made on the CPU would have to be copied as to a GPU."""
    member = MEMBERS[name]
    base = base_of(member, tmp_path)
    denoiser, _ = adapted(base, SETTINGS)
    cells = member.side // base.architecture.geometry(base.path).downscale
    inputs = step_of(base, member.side, cells, cells, "meta")
    denoiser.to("meta")
    with Crossings() as crossings:
        base.architecture.denoise(denoiser, *inputs).square().mean().backward()
    assert crossings.seen == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_graphed_passes_accumulate_the_gradients_of_plain_ones_in_every_bucket(tmp_path: Path):
    member = MEMBERS["sd1"]
    base = base_of(member, tmp_path)
    results = []
    for graphed in (False, True):
        denoiser, parameters = adapted(base, SETTINGS, "cuda")

        def denoise(x_t: Tensor, timestep: Tensor, cond: Tensors, denoiser: Any = denoiser) -> Tensor:
            return base.architecture.denoise(denoiser, x_t, timestep, cond)

        run = GraphedPasses(denoise, parameters) if graphed else denoise
        seen = []
        for _ in range(2):  # the second time without a capture
            for parameter in parameters:
                parameter.grad = None
            for height, width in ((8, 8), (8, 16), (8, 8)):
                prediction = run(*step_of(base, member.side, height, width, "cuda"))
                (prediction.square().mean() / 3).backward()
                seen.append(prediction.detach().clone())
            seen += [parameter.grad for parameter in parameters]
        results.append(seen)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_kernels_with_their_channels_last_make_the_same_prediction_and_gradients(tmp_path: Path):
    base = base_of(MEMBERS["sd1"], tmp_path)
    training = SETTINGS.model_copy(update={"targets": "all"})
    results = []
    for last in (False, True):
        denoiser, parameters = adapted(base, training)
        if last:
            lay_channels_last(denoiser)
            kernels = [m.weight for m in denoiser.modules() if isinstance(m, nn.Conv2d) and not m.weight.requires_grad]
            assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        prediction = base.architecture.denoise(denoiser, *step_of(base, 32, 8, 8))
        prediction.square().mean().backward()
        results.append([prediction.detach(), *(parameter.grad for parameter in parameters)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_base_that_is_to_be_quantised_waits_in_the_cpus_memory(precision: str):
    assert loading_device(TrainingConfig(), "cuda") == "cuda"
    quantised = TrainingConfig.model_validate({"base_precision": precision})
    assert loading_device(quantised, "cuda") == "cpu"


def test_the_precision_of_products_is_put_back_after_a_training():
    """The evaluation that follows in the same process is not to depend on it."""
    before = torch.get_float32_matmul_precision()
    with tensor_cores("cuda"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with tensor_cores("cpu"):
        assert torch.get_float32_matmul_precision() == before
