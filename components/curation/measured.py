"""Figures of pictures that cost something to find, kept in the catalog by content: nothing is measured twice.

A measure is called by its name and revision, an item by the digest of its pixels (and of its caption, where that is
read too). Thresholds are no part of either, so a rule can change without a picture being opened.
"""

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, insert, select

from components.catalog.database import Catalog
from components.catalog.models import MeasuredItem

Figures = NDArray[np.float64]
QUERY_ITEMS = 500   # items in one SQL statement


def known_figures(catalog: Catalog, measure: str, items: Collection[str]) -> dict[str, Figures]:
    """What `measure` found in `items`, as far as it has seen them."""
    wanted = list(items)
    known: dict[str, Figures] = {}
    with catalog.read() as session:
        for start in range(0, len(wanted), QUERY_ITEMS):
            query = select(MeasuredItem.item, MeasuredItem.figures).where(
                MeasuredItem.measure == measure, MeasuredItem.item.in_(wanted[start:start + QUERY_ITEMS]))
            known.update({item: np.frombuffer(body, dtype="<f8") for item, body in session.execute(query)})
    return known


def remember_figures(catalog: Catalog, measure: str, figures: Mapping[str, Figures]) -> None:
    """Keep what `measure` found, (k,) per item, in one transaction; what it found earlier in them is replaced."""
    if not figures:
        return
    with catalog.write() as session:
        session.execute(delete(MeasuredItem).where(MeasuredItem.measure == measure, MeasuredItem.item.in_(figures)))
        session.execute(insert(MeasuredItem), [
            {"measure": measure, "item": item, "figures": np.asarray(found, dtype="<f8").tobytes()}
            for item, found in figures.items()])
