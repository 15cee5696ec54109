"""What makes a training step faster or smaller and leaves what it computes as it was, up to rounding.

`prepare` is called once, when the adapter is on the denoiser and before there is an optimizer. Nothing of it changes
names of layers, adapter files or checkpoints, and validation and previews go through the denoiser as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.latents.ragged import Tensors
from components.tensors import lay_channels_last
from components.training.blocks import blocks_of
from components.training.quantisation import quantise

Denoise = Callable[[Tensor, Tensor, Tensors], Tensor]
COMPILED_VARIANTS = 512  # of one block's code: kinds of blocks times buckets; torch's own limit of 8 ends in eager mode


def loading_device(training: TrainingConfig, device: str) -> str:
    """Where the denoiser is loaded: weights that are to be quantised wait in the CPU's memory."""
    return device if training.base_precision == "auto" else "cpu"


def prepare(denoiser: nn.Module, training: TrainingConfig, device: str, null: Tensors) -> None:
    """Quantise, lay out and compile the denoiser as the settings say; `null` is the empty prompt's condition.

    Raises BadInput when CUDA graphs are asked for where there is no CUDA, or for texts of many lengths.
    """
    many_lengths = any(name.endswith("_mask") for name in null)
    if training.cuda_graphs and device != "cuda":
        raise BadInput("training.cuda_graphs needs a CUDA GPU, and this training is on the CPU; leave it out")
    if training.cuda_graphs and many_lengths:
        raise BadInput(
            "training.cuda_graphs needs prompts of one length, and this base reads texts as long as they are;"
            " use training.compile instead"
        )
    if training.base_precision != "auto":
        quantise(denoiser, training.base_precision, device)
    if device == "cuda":
        lay_channels_last(denoiser)
    if training.compile:
        compile_blocks(denoiser, dynamic=None if many_lengths else False)


def compile_blocks(denoiser: nn.Module, *, dynamic: bool | None, backend: str = "inductor") -> None:
    """Compile what is repeated, each kind of block once for every shape it meets, for passes that have a gradient.

    Compiling the blocks instead of the model takes a fraction of the time for nearly all of the speed
    (huggingface.co/docs/diffusers/optimization/fp16, "Regional compilation"). `dynamic` None: shapes that change are
    generalised over, after the second one.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, COMPILED_VARIANTS
    )
    for block in blocks_of(denoiser):
        block.forward = _where_there_is_a_gradient(
            torch.compile(block.forward, dynamic=dynamic, backend=backend), block.forward
        )


def _where_there_is_a_gradient(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Validation and previews have shapes of their own, which would be compiled for a handful of passes."""

    def forward(*args: Any, **options: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **options)

    return forward


class GraphedPasses:
    """`denoise` as two CUDA graphs for every shape of its inputs, its forward and its backward pass.

    A graph is launched as one piece of work, so the GPU does not wait for the host between small kernels. Inputs are
    copied into the buffers that the graph reads, so draws and loss stay outside, and gradients come in as from any
    other layer: accumulation, clipping and a loss scale know nothing of it. Graphs share their memory, for no two of
    them run at a time; each keeps gradients of its own.
    """

    def __init__(self, denoise: Denoise, parameters: Sequence[nn.Parameter]):
        self._denoise, self._parameters = denoise, tuple(parameters)
        self._graphs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        for parameter in self._parameters:
            # A graph's gradients lie where its next replay writes them: autograd may not keep them as `.grad`.
            parameter.register_hook(torch.clone)

    def __call__(self, x_t: Tensor, timestep: Tensor, cond: Tensors) -> Tensor:
        names = sorted(cond)
        inputs = (x_t, timestep, *(cond[name] for name in names))
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._captured(names, inputs)
        return self._graphs[shapes](*inputs, *self._parameters)

    def _captured(self, names: Sequence[str], inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
        """Raises: torch.OutOfMemoryError, from the passes that warm up, when this shape is too much."""

        def run(x_t: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
            return self._denoise(x_t, timestep, dict(zip(names, rest, strict=False)))

        buffers = (*(tensor.clone() for tensor in inputs), *self._parameters)
        with torch.random.fork_rng():  # the step that captures draws the same dropout as any other
            graphed: Any = torch.cuda.make_graphed_callables(run, buffers, allow_unused_input=True, pool=self._pool)
        return graphed  # type: ignore[no-any-return]


@contextmanager
def tensor_cores(device: str) -> Iterator[None]:
    """Within the block what stays in float32 on a GPU is multiplied in TF32, 10 bits of mantissa with float32 sums."""
    before = torch.get_float32_matmul_precision()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
