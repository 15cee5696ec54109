"""Migrations: the models and the newest revision agree, and every downgrade works."""

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import inspect

from components.catalog import runs
from components.catalog.database import MIGRATIONS, Catalog


def alembic_config(catalog: Catalog) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["engine"] = catalog.engine
    return config


def new_catalog(tmp_path: Path) -> Catalog:
    return Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")


def test_the_models_are_what_the_migrations_build(tmp_path: Path):
    catalog = new_catalog(tmp_path)
    catalog.migrate()
    command.check(alembic_config(catalog))  # raises when a difference is found


def test_every_downgrade_works_and_leaves_no_table_but_alembics(tmp_path: Path):
    catalog = new_catalog(tmp_path)
    catalog.migrate()
    command.downgrade(alembic_config(catalog), "base")
    assert inspect(catalog.engine).get_table_names() == ["catalog_alembic_version"]
    catalog.migrate()
    assert "run" in inspect(catalog.engine).get_table_names()


def test_several_starts_on_an_empty_workspace_migrate_once(tmp_path: Path):
    failures: list[BaseException] = []

    def start() -> None:
        try:
            new_catalog(tmp_path).migrate()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_retried_run_keeps_its_uid_and_is_running_again(tmp_path: Path):
    catalog = new_catalog(tmp_path)
    catalog.migrate()
    uid = runs.open_run(catalog, name="cats", kind="retrain", recipe={}, git_commit=None)
    runs.close_run(catalog, uid, "failed", error="disk full")
    assert runs.running(catalog) == []
    assert runs.open_run(catalog, name="cats", kind="retrain", recipe={}, git_commit=None, run_uid=uid) == uid
    (run,) = runs.running(catalog)
    assert (run.error, run.ended_at, run.created_at.utcoffset() is not None) == (None, None, True)
