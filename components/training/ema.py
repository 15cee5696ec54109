"""Exponential moving average of parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """Averages of named parameters; the decay grows as (1 + n) / (10 + n) up to `decay`, so early steps are forgotten.

    `tensors` maps the parameter's name to its average and goes into checkpoints as it is.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float):
        self.decay = decay
        self.parameters = dict(parameters)
        self.tensors = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after optimizer step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.tensors.items():
            average.lerp_(self.parameters[name], 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the averages of a checkpoint. Raises: KeyError when a name is missing."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model's parameters are the averages."""
        live = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._assign(self.tensors)
        try:
            yield
        finally:
            self._assign(live)

    @torch.no_grad()
    def _assign(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])
