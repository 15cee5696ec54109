"""Optimizers by name, from torch and from their authors' packages, and Muon for matrices and convolution kernels."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lion_pytorch import Lion
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn
from torch.optim import Optimizer

from components.config import TrainingConfig
from components.errors import BadInput

Named = Sequence[tuple[str, nn.Parameter]]
TOKEN_ROWS = "token_embedding.learnt.weight"  # how the names of learned tokens' parameters end

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at 0, Jordan et al. 2024, "Muon"
RMS_OF_ADAMW = (
    0.2  # the usual RMS of an AdamW update, so that both share one learning rate: Liu et al., arXiv:2502.16982
)


def orthogonalize(matrix: Tensor, iterations: int = 4) -> Tensor:
    """Push all singular values of (m, n) towards 1 (most into 0.7 to 1.2) by Newton-Schulz iterations.

    Every iterate is Q x with a small square Q, a polynomial of x x^T, so the long side is multiplied only twice; the
    norm of x x^T bounds the largest singular value more tightly than that of x, which saves an iteration.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    gram = x @ x.T  # of the iterate Q x, (m, m)
    norm = gram.norm().sqrt() + 1e-12
    gram = gram / norm.square()
    q = torch.eye(len(x), dtype=x.dtype, device=x.device) / norm
    for i in range(iterations):
        step = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal().add_(a)
        q = step @ q
        if i < iterations - 1:
            gram = step @ gram @ step  # all are polynomials of one symmetric matrix: they commute
    x = q @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(Optimizer):
    """Momentum with orthogonalized updates for parameters of two or more dimensions; AdamW for the rest.

    A convolution kernel (O, I, h, w) counts as the matrix (O, I * h * w). Updates are scaled to the size of AdamW's,
    so learning rate and weight decay carry over. Parameters in `adamw` always get AdamW: inputs, outputs, embeddings.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        muon: Iterable[nn.Parameter],
        adamw: Iterable[nn.Parameter],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        groups = [{"params": list(muon), "matrix": True}, {"params": list(adamw), "matrix": False}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon if group["matrix"] else self._adamw
                update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _muon(parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(grad, 1 - group["momentum"])
        update = orthogonalize(grad.lerp(momentum, group["momentum"]).flatten(1))
        scale = RMS_OF_ADAMW * max(update.shape) ** 0.5
        parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    @staticmethod
    def _adamw(parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
        beta1, beta2 = group["betas"]
        step = state.setdefault("step", torch.zeros(())).add_(1).item()
        mean = state.setdefault("exp_avg", torch.zeros_like(parameter)).lerp_(grad, 1 - beta1)
        square = state.setdefault("exp_avg_sq", torch.zeros_like(parameter)).mul_(beta2)
        square.addcmul_(grad, grad, value=1 - beta2)
        denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))


def muon_for(
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    *,
    exclude: Sequence[str] = (),
    weight_decay: float = 0.0,
) -> Muon:
    """Muon on matrices and kernels; AdamW on vectors, and on parameters whose name contains one of `exclude`."""
    matrices = {n for n, p in parameters.items() if p.ndim > 1 and not any(part in n for part in exclude)}
    return Muon(
        [p for n, p in parameters.items() if n in matrices],
        [p for n, p in parameters.items() if n not in matrices],
        learning_rate,
        weight_decay=weight_decay,
    )


def _adamw(parameters: Named, training: TrainingConfig) -> Optimizer:
    return torch.optim.AdamW(_groups(parameters, training), fused=True, **_adam_settings(training))


def _adamw8bit(parameters: Named, training: TrainingConfig) -> Optimizer:
    """Moments in 8 bits, quantised in blocks. Raises BadInput without a CUDA device or without its library."""
    if any(not parameter.is_cuda for _, parameter in parameters):
        raise BadInput(
            "training.optimizer is 'adamw8bit', whose 8-bit states need a CUDA GPU, and this training is on the CPU;"
            " choose 'adamw', or 'adafactor' to save memory"
        )
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(
            f"training.optimizer 'adamw8bit' needs bitsandbytes ({error}); install safelight with its extra `gpu`"
        ) from None
    return AdamW8bit(_groups(parameters, training), **_adam_settings(training))


def _adafactor(parameters: Named, training: TrainingConfig) -> Optimizer:
    """Steps are relative to the size of the weights: min(learning_rate, 1 / sqrt(t)) * max(1e-3, RMS(weights))."""
    return torch.optim.Adafactor(
        _groups(parameters, training), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False
    )


def _prodigy(parameters: Named, training: TrainingConfig) -> Optimizer:
    """With the settings that its authors recommend for diffusion models; `learning_rate` scales the rate it finds."""
    return Prodigy(_tensors(parameters), use_bias_correction=True, safeguard_warmup=True, **_adam_settings(training))


def _adamw_schedule_free(parameters: Named, training: TrainingConfig) -> Optimizer:
    """In training mode: its parameters are where gradients are taken; `averaged` shows the weights to use."""
    optimizer = AdamWScheduleFree(_groups(parameters, training), foreach=False, **_adam_settings(training))
    optimizer.train()
    return optimizer


def _lion(parameters: Named, training: TrainingConfig) -> Optimizer:
    return Lion(_groups(parameters, training), lr=training.learning_rate, weight_decay=training.weight_decay)


def _muon(parameters: Named, training: TrainingConfig) -> Optimizer:
    return muon_for(dict(parameters), training.learning_rate, exclude=(TOKEN_ROWS,), weight_decay=training.weight_decay)


def _tensors(parameters: Named) -> list[nn.Parameter]:
    return [parameter for _, parameter in parameters]


def _groups(parameters: Named, training: TrainingConfig) -> list[dict[str, Any]]:
    """A group for each learning rate; `lr_ratio` is what the loop multiplies its own by.

    Of LoRA+ (Hayou et al. 2024, arXiv:2402.12354) the factor B, which starts at zero, learns `loraplus_lr_ratio` times
    as fast. Rows of tokens do not decay: their spread is held in another way.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        groups.setdefault((_lr_ratio(name, training), name.endswith(TOKEN_ROWS)), []).append(parameter)
    if set(groups) == {(1.0, False)}:
        return [{"params": _tensors(parameters)}]
    return [
        {"params": members, "lr_ratio": ratio} | ({"weight_decay": 0.0} if of_tokens else {})
        for (ratio, of_tokens), members in groups.items()
    ]


def _lr_ratio(name: str, training: TrainingConfig) -> float:
    """The learning rate of a parameter over the denoiser's."""
    plus = training.loraplus_lr_ratio if ".lora_B." in name else 1.0
    own = training.token_learning_rate if name.endswith(TOKEN_ROWS) else None
    if name.startswith("text_encoder") and not name.endswith(TOKEN_ROWS):
        own = training.text_encoder_lr
    return plus * (1.0 if own is None else own / training.learning_rate)


def _adam_settings(training: TrainingConfig) -> dict:
    return {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
        "betas": (training.adam_beta1, training.adam_beta2),
    }


OPTIMIZERS: dict[str, Callable[[Named, TrainingConfig], Optimizer]] = {  # training.optimizer -> its builder
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "adamwschedulefree": _adamw_schedule_free,
    "lion": _lion,
    "muon": _muon,
}


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Within the block the parameters are those to validate and publish: schedule-free's average, else as they are.

    Afterwards they are back to the bit, which the optimizer's own switch, an interpolation there and back, is not.
    """
    if not isinstance(optimizer, AdamWScheduleFree):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    live = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, live, strict=True):
                parameter.copy_(value)
