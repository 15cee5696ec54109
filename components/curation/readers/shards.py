"""Files that hold many pictures: a damaged one is rejected by name and costs the others nothing."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from components.curation.items import Item, Problem, printable
from components.curation.memory import why_unreadable
from components.curation.readers.walking import Entry
from components.errors import BadInput

Rows = list[dict[str, Any]]


def read_shards(
    shards: Sequence[Entry], indexes: Mapping[str, bytes | OSError]
) -> tuple[list[tuple[Entry, Rows]], list[Item]]:
    """The shards that can be read, with what they hold, and the others as items with the reason.

    An index is JSON: a list, or the reason why there is none. Raises BadInput, one line, where no shard can be read.
    """
    readable: list[tuple[Entry, Rows]] = []
    refused: list[tuple[Entry, Problem]] = []
    for shard in shards:
        found = shard.problem or _read(indexes[shard.location])
        if isinstance(found, Problem):
            refused.append((shard, found))
        else:
            readable.append((shard, found))
    if refused and not readable:
        shard, problem = refused[0]
        raise BadInput(f"{shard.path}: {problem.reason}")
    return readable, [Item(printable(shard.file_name), None, problem=problem) for shard, problem in refused]


def _read(index: bytes | OSError) -> Rows | Problem:
    if isinstance(index, OSError):
        return Problem("file", why_unreadable(index))
    found = json.loads(index)
    return Problem("file", found) if isinstance(found, str) else found
