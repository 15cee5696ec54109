"""The fixed-noise validation loss, where samples have several shapes and memory is short."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from components.training.validation import FixedTime, validation_losses

IDS = tuple(f"s{i}" for i in range(12))
BUCKETS = ["wide", "high"] * 6


class Losses:
    """A loss that is a function of the sample's noise and the time, for at most `fitting` samples of one bucket."""

    def __init__(self, fitting: int):
        self.fitting, self.sizes = fitting, list[int]()

    def __call__(self, positions: Sequence[int], draw: FixedTime) -> Tensor:
        assert len({BUCKETS[i] for i in positions}) == 1
        if len(positions) > self.fitting:
            raise torch.OutOfMemoryError("tried to allocate")
        self.sizes.append(len(positions))
        return draw.normal((len(positions), 3)).square().mean(1) + draw.uniform(len(positions)).float()


def test_buckets_and_halves_give_every_sample_the_loss_that_it_has_alone():
    alone, whole, halved = Losses(1), Losses(6), Losses(2)
    expected = validation_losses(alone, IDS, 3, BUCKETS)
    assert expected.shape == (12, 3) and len(expected.unique()) == 36
    assert torch.equal(validation_losses(whole, IDS, 3, BUCKETS), expected)
    assert torch.equal(validation_losses(halved, IDS, 3, BUCKETS), expected)
    assert set(whole.sizes) == {6}
    assert set(halved.sizes) == {1}  # 6 and 3 did not fit: half of 3 does, and more is not tried again


def test_one_sample_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        validation_losses(Losses(0), IDS, 3, BUCKETS)
