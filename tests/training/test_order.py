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
