import pytest
import torch
from torch import nn

from components.training.optimizers import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(24, 24), (16, 144), (144, 16)])
def test_orthogonalize_keeps_the_singular_vectors_and_evens_out_the_values(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalize(matrix) @ vh.T
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-3
    evened = rotated.diagonal()[values > 0.1 * values.max()]
    assert evened.min() > 0.5 and evened.max() < 1.25


def test_orthogonalize_agrees_with_the_plain_iteration_on_the_long_matrix():
    matrix = torch.randn(8, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix @ matrix.T).norm().sqrt()
    for _ in range(4):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(orthogonalize(matrix), x)


def test_a_zero_gradient_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_parameters_outside_muon_get_the_updates_of_adamw():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    muon = Muon([], ours.parameters(), lr=0.1, weight_decay=0.01)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    for _ in range(5):
        x = torch.randn(4, 3)
        for model, optimizer in ((ours, muon), (theirs, adamw)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_kernel_moves_by_about_as_much_as_adamw_would_move_it():
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3)
    before = conv.weight.detach().clone()
    optimizer = Muon([conv.weight], [], lr=1e-2)
    conv(torch.randn(2, 16, 8, 8)).square().mean().backward()
    optimizer.step()
    rms = (conv.weight - before).square().mean().sqrt().item() / 1e-2
    assert 0.1 < rms < 0.3
