"""Splits by component: stable, as the data says, and never a pair on both sides."""

import pytest

from components.curation.splits import Member, assign_splits, component_name, join_components, lot, prove_disjoint
from components.errors import BadInput, StageFailed


def members(number: int, **fields: str) -> list[Member]:
    return [Member(f"{i}.png", f"pixels-{i}", **fields) for i in range(number)]


def split(samples: list[Member], pairs=(), *, fraction: float = 0.1, salt: str = "s", earlier=None) -> dict[str, str]:
    sides = assign_splits(samples, join_components(samples, pairs), test_fraction=fraction, salt=salt, earlier=earlier)
    return {sample.name: side for sample, side in zip(samples, sides, strict=True)}


def test_equal_pixels_equal_groups_and_near_pairs_are_one_component():
    samples = [Member("a", "1", "g"), Member("b", "2", "g"), Member("c", "2"), Member("d", "3"), Member("e", "4")]
    assert join_components(samples, [(2, 3)]) == [0, 0, 0, 0, 4]


def test_chains_of_pairs_join_whatever_their_order():
    assert join_components(members(5), [(3, 4), (1, 2), (2, 3)]) == [0, 1, 1, 1, 1]


def test_the_lots_give_about_the_share_asked_for():
    sides = split(members(5000), fraction=0.2)
    assert sum(side == "test" for side in sides.values()) / 5000 == pytest.approx(0.2, abs=0.02)


def test_adding_pictures_moves_no_old_one():
    before = split(members(200))
    after = split(members(400))
    assert {name: after[name] for name in before} == before


def test_order_and_names_of_files_do_not_matter():
    samples = members(100)
    renamed = [Member(f"new/{sample.name}", sample.identity) for sample in reversed(samples)]
    assert list(split(renamed).values()) == list(split(samples).values())[::-1]


def test_another_salt_is_another_split():
    assert split(members(200)) != split(members(200), salt="t")


def test_a_component_is_named_by_its_group_so_that_more_pictures_of_it_change_nothing():
    few, many = [[Member(f"{i}", f"{i}", "cats") for i in range(n)] for n in (2, 50)]
    assert component_name(few) == component_name(many)


def test_a_duplicate_that_joins_follows_the_picture_that_was_there_before():
    old = members(300)
    before = split(old)
    joined = [*old, *(Member(f"copy-{i}", f"!{i}") for i in range(300))]
    after = split(joined, [(i, 300 + i) for i in range(300)], earlier={m.identity: before[m.name] for m in old})
    assert {name: after[name] for name in before} == before
    assert all(after[f"copy-{i}"] == after[f"{i}.png"] for i in range(300))


def test_where_two_old_components_are_joined_the_trained_side_wins():
    sides = split(members(3), [(0, 1)], earlier={"pixels-0": "test", "pixels-1": "train", "pixels-2": "test"})
    assert sides == {"0.png": "train", "1.png": "train", "2.png": "test"}


def test_the_datas_own_word_stands_and_extends_to_its_duplicates():
    samples = [Member("a", "1", split="test"), Member("b", "1"), Member("c", "2", split="train")]
    assert split(samples, fraction=0.0) == {"a": "test", "b": "test", "c": "train"}


@pytest.mark.parametrize("pair", [
    [Member("a.png", "1", split="train"), Member("b.png", "1", split="test")],
    [Member("a.png", "1", "g", "train"), Member("b.png", "2", "g", "test")]])
def test_data_that_asks_for_both_sides_within_a_component_is_refused_naming_both_files(pair: list[Member]):
    with pytest.raises(BadInput, match=r"leak: a\.png is in train and b\.png is in test"):
        split(pair)


def test_neither_side_stays_empty_when_lots_decide_and_there_are_two_components():
    for salt in map(str, range(50)):
        assert set(split(members(2), salt=salt).values()) == {"train", "test"}
    assert set(split(members(2), fraction=0.0).values()) == {"train"}


def test_a_lot_is_a_fixed_number_between_0_and_1():
    assert lot("s", "x") == lot("s", "x") and 0 <= lot("s", "x") < 1


@pytest.mark.parametrize(("samples", "pairs"), [
    (members(2), [(0, 1)]), ([Member("a", "1"), Member("b", "1")], []),
    ([Member("a", "1", "g"), Member("b", "2", "g")], [])])
def test_the_proof_fails_on_one_crossing_pair_and_names_it(samples: list[Member], pairs: list[tuple[int, int]]):
    with pytest.raises(StageFailed, match=f"{samples[0].name}.*{samples[1].name}"):
        prove_disjoint(samples, ["train", "test"], pairs)
    assert prove_disjoint(samples, ["test", "test"], pairs) > 0
