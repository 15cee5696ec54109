import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.diffusion.timesteps import logit_normal, stratified, uniform

U = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def test_uniform_times_are_the_numbers_drawn():
    assert torch.equal(uniform(U), U)


def test_logit_normal_times_have_normal_logits():
    t = logit_normal(U, mean=0.5, std=2.0)
    logits = torch.logit(t)
    torch.testing.assert_close((logits - 0.5) / 2.0, torch.special.ndtri(U))


def test_the_median_of_logit_normal_times_is_the_sigmoid_of_the_mean():
    middle = torch.tensor([0.5])
    torch.testing.assert_close(logit_normal(middle, mean=1.2).float(), torch.sigmoid(torch.tensor([1.2])))


@given(st.floats(1e-12, 1 - 1e-12), st.floats(-2, 2), st.floats(0.1, 2))
def test_logit_normal_times_stay_between_data_and_noise(u: float, mean: float, std: float):
    assert 0 < logit_normal(torch.tensor([u], dtype=torch.float64), mean=mean, std=std).item() < 1


def test_a_spread_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="std is 0"):
        logit_normal(U, std=0)


def test_stratified_times_fall_into_one_stratum_each():
    t = stratified(torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert torch.equal((t * 16).long(), torch.arange(16))
