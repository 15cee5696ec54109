"""Texts of different lengths: what is cut and widened is never text, and no batch is longer than its longest."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from components.catalog.encodings import locate
from components.latents.encoding import encode_missing
from components.latents.keys import Item, caption_item
from components.latents.ragged import Tensors, replaced, row_shape, shortened, stacked
from components.latents.reading import ShardReader
from components.stages import Bench
from components.workspace import Workspace


def texts(*lengths: int, width: int = 8) -> Tensors:
    """Rows whose text of those lengths holds 1, 2, 3, ... and whose padding holds what an encoder leaves there."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    count = torch.arange(1.0, width + 1).expand(len(lengths), -1)
    embeds = torch.where(mask, count, -7.0)[..., None].repeat(1, 1, 3)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "pooled": torch.tensor(lengths).float()[:, None]}


def words(tensors: Tensors, row: int) -> Tensor:
    return tensors["prompt_embeds"][row][tensors["prompt_embeds_mask"][row]][:, 0]


def test_a_batch_is_as_long_as_its_longest_text_and_holds_zeros_behind_the_others():
    batch = shortened(texts(3, 5, 1))
    assert batch["prompt_embeds"].shape == (3, 5, 3) and batch["prompt_embeds_mask"].sum(1).tolist() == [3, 5, 1]
    assert batch["prompt_embeds"][~batch["prompt_embeds_mask"]].eq(0).all()


def test_rows_of_different_shards_are_stacked_without_losing_a_word():
    long, short = shortened(texts(6, 2)), shortened(texts(1, 4))
    rows = [{name: t[i] for name, t in shard.items()} for shard in (long, short) for i in range(2)]
    batch = stacked([rows[1], rows[3], rows[2]])
    assert batch["prompt_embeds"].shape[1] == 4
    assert [words(batch, i).tolist() for i in range(3)] == [[1, 2], [1, 2, 3, 4], [1]]
    assert batch["pooled"].flatten().tolist() == [2, 4, 1]


@pytest.mark.parametrize("null_length", [1, 7])
def test_a_dropped_prompt_is_the_null_prompt_whatever_its_length(null_length: int):
    batch = replaced(shortened(texts(3, 5)), torch.tensor([False, True]), shortened(texts(null_length)))
    assert batch["prompt_embeds_mask"].sum(1).tolist() == [3, null_length]
    assert words(batch, 1).tolist() == list(range(1, null_length + 1))
    assert batch["prompt_embeds"].shape[1] == max(3, null_length)


def test_tensors_without_a_mask_pass_through_and_are_replaced_only_where_there_is_another():
    batch = {"prompt_embeds": torch.ones(2, 4, 3), "time_ids": torch.arange(12.0).view(2, 6)}
    dropped = replaced(batch, torch.tensor([True, False]), {"prompt_embeds": torch.zeros(1, 4, 3)})
    assert dropped["time_ids"] is batch["time_ids"]
    assert dropped["prompt_embeds"].sum((1, 2)).tolist() == [0, 12]


def test_text_that_does_not_come_first_is_refused():
    tensors = texts(3)
    tensors["prompt_embeds_mask"] = tensors["prompt_embeds_mask"].flip(1)
    with pytest.raises(ValueError, match="does not come first"):
        shortened(tensors)


def test_the_cache_keeps_the_text_alone_and_gives_it_back_whatever_it_is_read_with(tmp_path: Path):
    bench = Bench.open(Workspace(tmp_path))
    bench.catalog.migrate()
    items = [caption_item("x" * length) for length in range(1, 7)]

    def encode(batch: list[Item]) -> Tensors:
        return texts(*(len(item.caption) for item in batch), width=512)

    assert encode_missing(bench, "encoder", items, encode, lambda done: None) == len(items)
    places = locate(bench.catalog, "encoder", [item.key for item in items])
    ((shard, _), *_) = places.values()
    assert bench.store.path(shard).stat().st_size < 4096  # six rows of six places, not of 512
    batch = ShardReader(bench.store, places)([items[i].key for i in (2, 0)])
    assert [words(batch, i).tolist() for i in range(2)] == [[1, 2, 3], [1]] and batch["prompt_embeds"].shape[1] == 3


def test_rows_have_one_shape_whatever_the_length_of_their_text_and_another_for_anything_else():
    assert row_shape(texts(3, width=4)) == row_shape(texts(6, 2)) == ((1,), (3,), ())
    assert row_shape({"mean": torch.ones(2, 4, 8, 6)}) != row_shape({"mean": torch.ones(2, 4, 6, 8)})
