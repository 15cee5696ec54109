"""A journal cut into requests: MLflow's log-batch endpoint takes many facts at once, up to its limits."""

from collections.abc import Iterable, Iterator

from flows.journal import Entry

# limits of one request to MLflow's log-batch endpoint
BATCH_LIMITS = {"metrics": 1000, "params": 100, "tags": 100}
BATCH_ENTITIES = 1000
BATCH_BYTES = 500_000  # estimated; non-ASCII text takes up to twice as much, and a request must stay below 1 MB


def batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Group a journal for sending, in order: metrics, params and tags up to one request's limits, the rest alone."""
    batch: list[Entry] = []
    counts, size = dict.fromkeys(BATCH_LIMITS, 0), 0
    for entry in entries:
        number, weight = len(entry.body.get("values", ())), _weight(entry)
        together = entry.kind in BATCH_LIMITS
        fits = (
            together
            and counts[entry.kind] + number <= BATCH_LIMITS[entry.kind]
            and sum(counts.values()) + number <= BATCH_ENTITIES
            and size + weight <= BATCH_BYTES
        )
        if batch and not fits:
            yield batch
            batch, counts, size = [], dict.fromkeys(BATCH_LIMITS, 0), 0
        if together:
            batch.append(entry)
            counts[entry.kind] += number
            size += weight
        elif entry.kind != "run":
            yield [entry]
    if batch:
        yield batch


def _weight(entry: Entry) -> int:
    """Roughly the bytes of an entry in the request; a point of a series takes about 100 around its name."""
    return sum(100 + len(name) + len(str(value)) for name, value in entry.body.get("values", {}).items())
