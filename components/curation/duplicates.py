"""Near duplicates: perceptual hashes, the rule that two of them must pass, and groups that a chain cannot stretch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import fft
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from components.curation.joins import (
    FULL_COPIES,
    Hashes,
    Indices,
    Pairs,
    cosine_pairs,
    expand_copies,
    hamming_pairs,
)

__all__ = [
    "Group", "components_of", "cosine_pairs", "dhash", "duplicate_groups", "hamming_pairs", "hash_images",
    "near_duplicates", "phash", "says_something",
]

MIN_BITS, MAX_BITS = 6, 58    # set bits of a hash that says something: flat blue and flat white share every hash
MANY_IMAGES = 1_000_000       # from here on 6 bits find pairs by chance, 4 bits do not
MANY_IMAGES_BITS = 4


@dataclass(frozen=True, slots=True)
class Group:
    """Images that are all near duplicates of each other."""

    members: tuple[int, ...]   # ascending
    medoid: int                # the member with most near duplicates
    component_size: int        # images that a chain of near duplicates reaches; above len(members): the chain was cut


def phash(image: Image.Image) -> int:
    """64 bits: is each of the 8 x 8 lowest frequencies of the brightness above their median; as `ImageHash.phash`.

    Robust to scaling and compression. The first bit in reading order is the highest. Mirrored images are 32 bits apart.
    """
    return int(_phash_bits(_brightness(image, (32, 32))[None])[0])


def dhash(image: Image.Image) -> int:
    """64 bits: is each of 8 x 8 pixels brighter than its left neighbour; as `ImageHash.dhash`."""
    return int(_dhash_bits(_brightness(image, (9, 8))[None])[0])


def hash_images(images: Iterable[Image.Image]) -> tuple[Hashes, Hashes]:
    """pHash and dHash of many images, (n,) and (n,): the bits of `phash` and `dhash`, transformed all at once."""
    reduced = [(_brightness(image, (32, 32)), _brightness(image, (9, 8))) for image in images]
    if not reduced:
        return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)
    return _phash_bits(np.stack([p for p, _ in reduced])), _dhash_bits(np.stack([d for _, d in reduced]))


def says_something(hashes: Hashes) -> NDArray[np.bool_]:
    """False for the hash of a flat or nearly flat picture, (n,): it equals that of any other."""
    bits = np.bitwise_count(np.asarray(hashes, dtype=np.uint64))
    return (bits >= MIN_BITS) & (bits <= MAX_BITS)


def near_duplicates(phashes: ArrayLike, dhashes: ArrayLike, mean_colours: ArrayLike, *, phash_distance: int,
                    dhash_distance: int, colour_distance: float, brightness_gain: float = 1.0) -> Pairs:
    """Pairs (i, j), i < j, that agree in pHash and dHash and have close mean colours, ascending.

    phashes, dhashes (n,); mean_colours (n, 3) of RGB in 0 to 255, compared by Euclidean distance: an icon in red is no
    duplicate of the same icon in blue. One may be brighter by `brightness_gain`, a factor, before colours are compared.
    Flat pictures, whose hashes say nothing, pair with none. From a million images
    on at most 4 bits of pHash may differ.
    """
    p, d = np.asarray(phashes, dtype=np.uint64).reshape(-1), np.asarray(dhashes, dtype=np.uint64).reshape(-1)
    colours = np.asarray(mean_colours, dtype=np.float64).reshape(-1, 3)
    kept = np.flatnonzero(says_something(p) & says_something(d))
    if len(p) >= MANY_IMAGES:
        phash_distance = min(phash_distance, MANY_IMAGES_BITS)
    both, group = np.unique(np.column_stack([p, d])[kept], axis=0, return_inverse=True)
    alike = hamming_pairs(both[:, 0], phash_distance)
    alike = alike[np.bitwise_count(both[alike[:, 0], 1] ^ both[alike[:, 1], 1]) <= dhash_distance]
    pairs = kept[expand_copies(alike, group.reshape(-1))]
    apart = _colours_apart(colours[pairs[:, 0]], colours[pairs[:, 1]], brightness_gain)
    return pairs[apart <= colour_distance]


def components_of(n: int, pairs: Pairs) -> Indices:
    """Number of each item's connected component, (n,), in order of first appearance: what a split keeps together."""
    graph = coo_array((np.ones(len(pairs), dtype=bool), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = connected_components(graph, directed=False)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def duplicate_groups(n: int, pairs: Pairs) -> list[Group]:
    """Complete-link groups of two or more: every member pairs with every other, so A~B~C does not join A with C.

    Greedy from the item with most partners, ties to the lower index. Groups come in order of their first member. A copy
    that the joins paired with the first of more than 512 copies only belongs to that one's group.
    """
    partners: dict[int, set[int]] = {}
    for i, j in pairs.tolist():
        partners.setdefault(i, set()).add(j)
        partners.setdefault(j, set()).add(i)
    component = components_of(n, pairs)
    sizes = np.bincount(component)
    by_partners = sorted(partners, key=lambda item: (-len(partners[item]), item))
    place = {item: i for i, item in enumerate(by_partners)}
    groups: list[Group] = []
    taken: set[int] = set()
    for seed in by_partners:
        if seed in taken:
            continue
        members, common = [seed], partners[seed] - taken
        for item in sorted(common, key=place.__getitem__):
            if item in common:
                members.append(item)
                common &= partners[item]
        if len(partners[seed]) >= FULL_COPIES:
            members += [item for item in partners[seed] - taken - set(members) if partners[item] == {seed}]
        taken.update(members)
        if len(members) > 1:
            groups.append(Group(tuple(sorted(members)), seed, int(sizes[component[seed]])))
    return sorted(groups, key=lambda group: group.members)


def _colours_apart(a: NDArray[np.float64], b: NDArray[np.float64], gain: float) -> NDArray[np.float64]:
    """Distances of colours (n, 3) after a gain of at most this factor, half of it on either side, (n,)."""
    length = [np.maximum(np.linalg.norm(colour, axis=1, keepdims=True), 1e-9) for colour in (a, b)]
    half = np.sqrt(np.clip(length[0] / length[1], 1 / gain, gain))
    return np.linalg.norm(a / half - b * half, axis=1)


def _brightness(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS))


def _phash_bits(brightness: NDArray[np.uint8]) -> Hashes:
    """(n, 32, 32) -> (n,). Transformed in ImageHash's order of axes, so that ties and rounding fall alike."""
    frequencies = np.asarray(fft.dct(fft.dct(brightness.astype(np.float64), axis=1), axis=2))[:, :8, :8]
    return _pack(frequencies > np.median(frequencies, axis=(1, 2), keepdims=True))


def _dhash_bits(brightness: NDArray[np.uint8]) -> Hashes:
    """(n, 8, 9) -> (n,)."""
    return _pack(brightness[:, :, 1:] > brightness[:, :, :-1])


def _pack(bits: NDArray[np.bool_]) -> Hashes:
    """(n, 8, 8) bits -> (n,) uint64, first bit highest."""
    return np.packbits(bits.reshape(len(bits), 64), axis=1).view(">u8").ravel().astype(np.uint64)
