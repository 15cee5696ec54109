"""Where encoded items lie: rows of the catalog, read without what encoded them."""

from collections.abc import Sequence

from sqlalchemy import select

from components.catalog.database import Catalog
from components.catalog.models import EncodedItem

QUERY_ITEMS = 500  # keys in one SQL statement
Places = dict[str, tuple[str, int]]  # key -> (shard, row)


def locate(catalog: Catalog, encoder: str, keys: Sequence[str]) -> Places:
    """Where each of `keys` lies, as far as it is encoded: key -> (shard, row)."""
    found: Places = {}
    with catalog.read() as session:
        for start in range(0, len(keys), QUERY_ITEMS):
            rows = session.execute(
                select(EncodedItem.item, EncodedItem.shard, EncodedItem.row).where(
                    EncodedItem.encoder == encoder, EncodedItem.item.in_(keys[start : start + QUERY_ITEMS])
                )
            )
            found.update({item: (shard, row) for item, shard, row in rows})
    return found
