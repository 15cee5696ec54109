import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from components.config import TrainingConfig
from components.errors import BadInput
from components.training.optimizers import OPTIMIZERS, Muon, averaged, orthogonalize

ON_A_CPU = [name for name in OPTIMIZERS if name != "adamw8bit"]
RATES = {"adafactor": 0.1, "muon": 3e-2, "prodigy": 1.0, "lion": 3e-3}  # where 1e-2 is not a usual one


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


def training(name: str, **changes) -> TrainingConfig:
    return TrainingConfig(**({"optimizer": name, "learning_rate": RATES.get(name, 1e-2)} | changes))


def weight_and_gradients(count: int) -> tuple[nn.Parameter, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(1 + count)]
    return nn.Parameter(draws[0].clone()), draws[1:]


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    weight.grad = gradient.clone()
    optimizer.step()


def first_adafactor_step(w: Tensor, g: Tensor, lr: float) -> Tensor:
    """Shazeer and Stern 2018, algorithm 4 at t = 1: the second moment is its rank-one fit, no momentum."""
    square = g.square()
    fit = square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / square.mean()
    update = g / fit.sqrt()
    return lr * max(1e-3, w.square().mean().sqrt()) * update / max(1, update.square().mean().sqrt())


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("adamw", lambda w, g, lr: lr * g.sign()),
        ("lion", lambda w, g, lr: lr * g.sign()),
        ("prodigy", lambda w, g, lr: 1e-6 * lr * g.sign()),  # d0, the distance it starts from
        ("adafactor", first_adafactor_step),
    ],
)
def test_the_first_step_is_the_papers(name: str, moved):
    weight, (gradient,) = weight_and_gradients(1)
    before = weight.detach().clone()
    settings = training(name)
    step(OPTIMIZERS[name]([("weight", weight)], settings), weight, gradient)
    lr, d = settings.learning_rate, 1e-6 * 0.001**0.5 / 0.1 if name == "prodigy" else 1.0
    expected = moved(before, gradient, lr) + d * lr * settings.weight_decay * before
    torch.testing.assert_close(before - weight.detach(), expected, rtol=2e-5, atol=1e-12)


def test_prodigy_finds_the_distance_to_the_solution():
    """On |x - x*| the estimate d never exceeds the distance ||x0 - x*||_inf, and grows to its order."""
    weight = nn.Parameter(torch.zeros(50))
    optimizer = OPTIMIZERS["prodigy"]([("weight", weight)], training("prodigy", weight_decay=0.0))
    for _ in range(100):
        step(optimizer, weight, (weight.detach() - 3.0).sign())
    assert 0.1 < optimizer.param_groups[0]["d"] <= 3.0


def test_schedule_free_follows_its_two_sequences_and_shows_their_average():
    """Defazio et al. 2024, arXiv:2405.15682, algorithm 1: gradients at y, steps of z, x the mean of the z."""
    weight, gradients = weight_and_gradients(6)
    settings = training("adamwschedulefree", weight_decay=0.1, adam_beta1=0.8)
    optimizer = OPTIMIZERS["adamwschedulefree"]([("weight", weight)], settings)
    x, z, square = weight.detach().clone(), weight.detach().clone(), torch.zeros(())
    for k, g in enumerate(gradients, 1):
        y = 0.2 * z + 0.8 * x
        torch.testing.assert_close(weight.detach(), y)
        square = 0.999 * square + 0.001 * g.square()
        z = z - 1e-2 * (g / ((square / (1 - 0.999**k)).sqrt() + 1e-8) + 0.1 * y)
        x = (1 - 1 / k) * x + z / k
        step(optimizer, weight, g)
    live = weight.detach().clone()
    with averaged(optimizer):
        torch.testing.assert_close(weight.detach(), x)
    assert torch.equal(weight, live)
    step(optimizer, weight, gradients[0])  # it still trains


def test_muon_moves_a_matrix_as_the_one_of_torch_does():
    """Which takes matrices alone, in bfloat16, with another number of iterations."""
    weight, gradients = weight_and_gradients(3)
    theirs = nn.Parameter(weight.detach().clone())
    ours = OPTIMIZERS["muon"]([("weight", weight)], training("muon", weight_decay=0.1))
    stock = torch.optim.Muon([theirs], lr=RATES["muon"], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = weight.detach().clone()
    for gradient in gradients:
        step(ours, weight, gradient)
        step(stock, theirs, gradient)
    moved, expected = (before - weight).flatten(), (before - theirs).flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.98
    assert 0.8 < (moved.norm() / expected.norm()).item() < 1.25


@pytest.mark.parametrize("name", ON_A_CPU)
def test_every_optimizer_descends(name: str):
    generator = torch.Generator().manual_seed(0)
    target, x = torch.randn(8, 8, generator=generator), torch.randn(64, 8, generator=generator)
    weight = nn.Parameter(torch.randn(8, 8, generator=generator))
    optimizer = OPTIMIZERS[name]([("weight", weight)], training(name, weight_decay=0.0))
    losses = []
    for _ in range(300):
        loss = (x @ (weight - target)).square().mean()
        losses.append(loss.item())
        step(optimizer, weight, torch.autograd.grad(loss, weight)[0])
    assert losses[-1] < 0.5 * losses[0]


def test_eight_bit_states_are_refused_on_a_cpu_in_one_line():
    with pytest.raises(BadInput, match=r"need a CUDA GPU, .*; choose 'adamw'") as refusal:
        OPTIMIZERS["adamw8bit"]([("weight", nn.Parameter(torch.zeros(2)))], training("adamw8bit"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "lion", "adam_beta2": 0.99}, "adam_beta2 is 0.99, but optimizer 'lion' has its own"),
        ({"optimizer": "prodigy"}, "learning_rate is 0.0001, but prodigy finds the rate itself"),
        ({"optimizer": "adamwschedulefree", "lr_scheduler": "cosine"}, "averages where others decay"),
    ],
)
def test_a_setting_that_the_optimizer_would_waste_is_refused(settings: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        TrainingConfig(**settings)
