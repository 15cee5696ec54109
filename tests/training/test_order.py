from collections import Counter
from itertools import islice

import pytest

from components.training.order import batches_from, epoch_order

IDS = tuple(f"sample-{i}" for i in range(7))


def test_every_epoch_holds_every_sample_once():
    places = [i for batch in islice(batches_from(0, IDS, 3, seed=0), 14) for i in batch]  # 6 epochs of 7
    for epoch in range(6):
        assert sorted(places[7 * epoch : 7 * epoch + 7]) == list(range(7))


def test_epochs_and_seeds_differ():
    assert epoch_order(0, 0, IDS) != epoch_order(0, 1, IDS)
    assert epoch_order(0, 0, IDS) != epoch_order(1, 0, IDS)


def test_starting_at_a_step_yields_what_an_unbroken_run_sees_there():
    unbroken = list(islice(batches_from(0, IDS, 4, seed=5), 20))
    assert list(islice(batches_from(11, IDS, 4, seed=5), 9)) == unbroken[11:]


def test_the_order_of_ids_does_not_depend_on_how_they_are_listed():
    listed_backwards = IDS[::-1]
    forwards = [IDS[i] for i in epoch_order(2, 3, IDS)]
    assert [listed_backwards[i] for i in epoch_order(2, 3, listed_backwards)] == forwards


def test_a_batch_larger_than_the_data_runs_over_several_epochs():
    batch = next(batches_from(0, IDS[:2], 6, seed=0))
    assert sorted(batch) == [0, 0, 0, 1, 1, 1]


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        next(batches_from(0, (), 4, seed=0))


BUCKETS = [(64, 64)] * 4 + [(32, 96)] * 2 + [(96, 32)]


def test_a_batch_holds_one_bucket_and_every_sample_is_seen_as_often():
    batches = list(islice(batches_from(0, IDS, 3, seed=0, buckets=BUCKETS), 14 * 7))
    assert all(len(batch) == 3 and len({BUCKETS[i] for i in batch}) == 1 for batch in batches)
    counts = Counter(i for batch in batches for i in batch)
    assert sum(counts.values()) / 7 == 42
    assert all(abs(counts[i] - 42) <= 3 for i in range(7))  # at most a batch more or less
    order = [BUCKETS[batch[0]] for batch in batches]
    assert order != sorted(order) and order[:7] != order[7:14]


def test_buckets_take_turns_from_any_step_on_as_in_an_unbroken_run():
    unbroken = list(islice(batches_from(0, IDS, 2, seed=5, buckets=BUCKETS), 40))
    assert list(islice(batches_from(23, IDS, 2, seed=5, buckets=BUCKETS), 17)) == unbroken[23:]
    assert unbroken != list(islice(batches_from(0, IDS, 2, seed=6, buckets=BUCKETS), 40))


def test_within_a_bucket_the_order_is_that_of_its_samples_alone():
    alone = list(islice(batches_from(0, IDS[:4], 2, seed=3), 8))
    mixed = [batch for batch in islice(batches_from(0, IDS, 2, seed=3, buckets=BUCKETS), 40) if batch[0] < 4]
    assert mixed[:8] == alone
