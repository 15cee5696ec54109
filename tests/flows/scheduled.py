"""A flow that stands in for a retraining: it notes that it ran, with which recipe."""

import os
from pathlib import Path

from prefect import flow

from components.config import Recipe


@flow(name="noted")
def noted(recipe: Recipe) -> None:
    with Path(os.environ["NOTES"]).open("a", encoding="utf-8") as notes:
        notes.write(f"{recipe.name}\n")


if __name__ == "__main__":  # the deployment runner, serving this flow
    import anyio

    from components.workspace import Workspace
    from flows.deployments import serve
    from tests.flows.scheduled import noted as importable

    anyio.run(serve, Workspace.from_environment(), importable)
