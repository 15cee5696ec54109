"""Learning rates as functions of the step."""

import math
from collections.abc import Callable

LearningRate = Callable[[int], float]
SCHEDULES = ("constant", "cosine", "linear")


def learning_rate_at(
    name: str, peak: float, *, max_train_steps: int, warmup_steps: int = 0, floor: float = 0.0
) -> LearningRate:
    """The function from step (0-based) to learning rate: linear warm-up to `peak`, then `name`.

    "constant" stays at the peak, "cosine" and "linear" fall to `floor * peak` at `max_train_steps`.
    Raises: ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}; choose from {', '.join(SCHEDULES)}")

    def at(step: int) -> float:
        if step < warmup_steps:
            return peak * (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, max_train_steps - warmup_steps))
        remaining = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[name]
        return peak * (floor + (1 - floor) * remaining)

    return at
