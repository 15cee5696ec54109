"""Splitting by component, never by picture: what is alike, or was said to belong together, stays on one side."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from components.errors import BadInput, StageFailed

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Member:
    """What the split needs to know of one picture."""

    name: str  # file name, for messages
    identity: str  # digest of its pixels: survives renaming
    group: str | None = None  # the user's word for what belongs together
    split: str | None = None  # the user's word on the side


def join_components(members: Sequence[Member], pairs: Iterable[Pair]) -> list[int]:
    """The component of each member, as the index of its first member.

    Joined are equal identities, equal groups, and the given pairs of near duplicates.
    """
    roots = list(range(len(members)))

    def find(i: int) -> int:
        while roots[i] != i:
            roots[i] = roots[roots[i]]
            i = roots[i]
        return i

    def join(i: int, j: int) -> None:
        i, j = find(i), find(j)
        roots[max(i, j)] = min(i, j)

    first: dict[tuple[str, str], int] = {}
    for i, member in enumerate(members):
        join(first.setdefault(("identity", member.identity), i), i)
        if member.group is not None:
            join(first.setdefault(("group", member.group), i), i)
    for i, j in pairs:
        join(i, j)
    return [find(i) for i in range(len(members))]


def lot(salt: str, name: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:7]) / 2**56


def component_name(members: Sequence[Member]) -> str:
    """What names a component: its first group if it has one, else its first identity (by text, not by position)."""
    groups = sorted(member.group for member in members if member.group is not None)
    return f"group {groups[0]}" if groups else f"pixels {min(member.identity for member in members)}"


def assign_splits(members: Sequence[Member], components: Sequence[int], *, test_fraction: float, salt: str,
                  earlier: Mapping[str, str] | None = None) -> list[str]:
    """ "train" or "test" for each member, one side per component.

    The data's own word stands first; then `earlier`, the side of an identity in the snapshot before this one, so that
    new pictures move no old one (where two old components were joined, train: the test side must stay unseen); then
    the lot of the component's name. If lots alone leave one side empty, the nearest component changes over.
    Raises BadInput, naming two files, where the data asks for both sides within one component.
    """
    grouped: dict[int, list[Member]] = {}
    for member, component in zip(members, components, strict=True):
        grouped.setdefault(component, []).append(member)
    sides, drawn = {}, {}
    for component, inside in grouped.items():
        before = {(earlier or {}).get(member.identity) for member in inside} - {None}
        if side := _stated_side(inside):
            sides[component] = side
        elif before:
            sides[component] = "train" if "train" in before else "test"
        else:
            drawn[component] = lot(salt, component_name(inside))
            sides[component] = "test" if drawn[component] < test_fraction else "train"
    if drawn and len(sides) > 1 and test_fraction > 0:
        if "test" not in sides.values():
            sides[min(drawn, key=drawn.__getitem__)] = "test"
        elif "train" not in sides.values():
            sides[max(drawn, key=drawn.__getitem__)] = "train"
    return [sides[component] for component in components]


def _stated_side(members: Sequence[Member]) -> str | None:
    stated: dict[str, str] = {}
    for member in members:
        if member.split is not None:
            stated.setdefault(member.split, member.name)
    if len(stated) > 1:
        raise BadInput(f"leak: {stated['train']} is in train and {stated['test']} is in test, but they are duplicates, "
                       "near duplicates or of one group; move one or remove it")
    return next(iter(stated), None)


def prove_disjoint(members: Sequence[Member], splits: Sequence[str], pairs: Iterable[Pair]) -> int:
    """Check that no identity, group or near-duplicate pair crosses the split. Returns how many links were checked.

    `pairs` are found anew among the kept pictures. Raises StageFailed on the first that crosses.
    """
    checked = 0
    sides: dict[tuple[str, str], int] = {}
    links = [*pairs]
    for i, member in enumerate(members):
        links.append((sides.setdefault(("identity", member.identity), i), i))
        if member.group is not None:
            links.append((sides.setdefault(("group", member.group), i), i))
    for i, j in links:
        checked += 1
        if splits[i] != splits[j]:
            raise StageFailed(f"leak: {members[i].name} ({splits[i]}) and {members[j].name} ({splits[j]}) belong "
                              "together but lie on both sides of the split; this is a fault of Safelight, report it")
    return checked
