import pytest
import torch

from components.diffusion.draws import Draws


def test_a_draw_is_a_function_of_seed_step_and_sample_alone():
    first, again = Draws(3)(7, ["a", "b"]), Draws(3)(7, ["a", "b"])
    assert torch.equal(first.normal((2, 4)), again.normal((2, 4)))
    assert torch.equal(first.uniform(2), again.uniform(2))
    assert not torch.equal(first.normal((2, 4)), Draws(4)(7, ["a", "b"]).normal((2, 4)))
    assert not torch.equal(first.normal((2, 4)), Draws(3)(8, ["a", "b"]).normal((2, 4)))


def test_a_sample_draws_the_same_whatever_its_neighbours():
    alone = Draws(0)(5, ["cat"]).normal((1, 8))
    crowd = Draws(0)(5, ["dog", "cat", "owl"]).normal((3, 8))
    assert torch.equal(alone[0], crowd[1])


def test_drawing_more_does_not_move_what_is_drawn_next():
    draw = Draws(0)(1, ["a", "b"])
    before = draw.uniform(2)
    draw.normal((2, 1000))
    assert torch.equal(before, draw.uniform(2))


def test_purposes_are_independent():
    draw = Draws(0)(0, [str(i) for i in range(2000)])
    noise, other = draw.normal((2000,), "noise"), draw.normal((2000,), "posterior")
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.1


def test_a_sample_that_occurs_twice_in_a_batch_draws_twice():
    noise = Draws(0)(0, ["a", "b", "a"]).normal((3, 4))
    assert not torch.equal(noise[0], noise[2])
    assert torch.equal(noise[:2], Draws(0)(0, ["a", "b"]).normal((2, 4)))


def test_draws_have_the_moments_of_their_distributions():
    draw = Draws(1)(0, [str(i) for i in range(4000)])
    normal, uniform = draw.normal((4000, 4)), draw.uniform(4000)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert abs(uniform.mean() - 0.5) < 0.02 and abs(uniform.var() - 1 / 12) < 0.01
    assert uniform.min() > 0 and uniform.max() < 1


def test_a_wrong_batch_size_is_refused():
    with pytest.raises(ValueError, match="3 samples, but the batch has 2"):
        Draws(0)(0, ["a", "b"]).normal((3, 4))


def test_stratified_numbers_lie_one_in_each_stratum_and_only_for_their_purpose():
    ids = [str(i) for i in range(8)]
    draw, plain = Draws(2, stratified=("time",))(9, ids), Draws(2)(9, ids)
    assert torch.equal((draw.uniform(8) * 8).long(), torch.arange(8))
    assert torch.equal(draw.uniform(8) * 8 - torch.arange(8), (torch.arange(8) + plain.uniform(8)) - torch.arange(8))
    assert torch.equal(draw.uniform(8, "caption"), plain.uniform(8, "caption"))
    assert torch.equal(draw.normal((8, 3)), plain.normal((8, 3)))


def test_stratified_numbers_are_a_function_of_seed_step_and_batch_and_stay_uniform():
    draws = Draws(4, stratified=("time",))
    assert torch.equal(draws(6, ["a", "b"]).uniform(2), draws(6, ["a", "b"]).uniform(2))
    u = torch.cat([draws(step, [f"{step}/{i}" for i in range(16)]).uniform(16) for step in range(100)])
    assert abs(u.mean() - 0.5) < 0.002 and abs(u.var() - 1 / 12) < 0.002  # a 16th of the usual error
    assert u.min() > 0 and u.max() < 1


def test_rows_of_a_draw_are_the_rows_of_its_numbers():
    """Also in strata, with a sample that comes twice in the batch and had come in an earlier one."""
    whole = Draws(0, stratified=("time",))(4, ["a", "b", "a", "c", "d"], earlier=["b"])
    parts = [whole.rows(0, 2), whole.rows(2, 5).rows(0, 1), whole.rows(2, 5).rows(1, 3)]
    assert [part.sample_ids for part in parts] == [("a", "b"), ("a",), ("c", "d")]
    assert torch.equal(torch.cat([part.normal((len(part.sample_ids), 3)) for part in parts]), whole.normal((5, 3)))
    assert torch.equal(torch.cat([part.uniform(len(part.sample_ids)) for part in parts]), whole.uniform(5))
