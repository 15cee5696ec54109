"""Rules of the house: who may import what, what is written once, which code a stage's version stands for."""

import ast
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from components.config import Config, Recipe
from components.stages import STAGE_VERSIONS

ROOT = Path(__file__).parents[1]
ORCHESTRATION = {"prefect", "mlflow", "streamlit"}
TORCH = {"torch", "diffusers", "transformers", "peft"}

# Where a stage's work begins: its code is what can be reached from there by imports.
ENTRIES = {
    "curate": "components.curation.snapshots",
    "cache": "components.latents.caching",
    "fine-tune": "components.training.finetune",
    "generate": "components.evaluation.generation",
    "evaluate": "components.evaluation.evaluate",
    "register": "components.training.export",
    "study": "components.evaluation.study",
}
PLUMBING = {
    "catalog",
    "config",
    "errors",
    "shards",
    "stages",
    "storage",
    "workspace",
}  # they move results, they do not shape them
PINNED = ROOT / "tests" / "stage_sources.txt"


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports anywhere, also inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_components_know_no_orchestrator_tracker_or_dashboard():
    forbidden = {
        named(path): used
        for path in modules("components")
        if (used := (ORCHESTRATION | {"flows", "dashboard"}) & set(imported(path)))
    }
    assert forbidden == {}


def test_one_package_talks_to_mlflow():
    talking = [path for path in modules("flows", "dashboard", "components") if "mlflow" in imported(path)]
    assert {named(path.parent) for path in talking} == {"flows/tracking"}


def test_pages_hold_neither_sql_nor_torch():
    pages = [path for path in modules("dashboard") if path.parent.name in ("pages", "views")]
    assert pages
    forbidden = {
        named(path): used
        for path in pages
        if (used := (TORCH | {"sqlalchemy", "sqlite3", "prefect", "mlflow"}) & set(imported(path)))
    }
    assert forbidden == {}
    assert [named(path) for path in pages if "SELECT " in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize(
    "module", ["flows.retrain", "flows.tracking.tracker", "flows.deployments", "flows.reconcile", "flows.promote"]
)
def test_a_flow_process_never_loads_torch(module: str):
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def configs(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from configs(field.annotation)


def test_every_setting_is_frozen_described_and_refuses_unknown_keys():
    for model in configs():
        assert issubclass(model, Config) and model.model_config["frozen"] and model.model_config["extra"] == "forbid"
        undescribed = [
            name
            for name, field in model.model_fields.items()
            if not field.description and not isinstance(field.default, BaseModel) and name not in ("data", "sources")
        ]
        assert undescribed == [], model


def test_no_function_below_the_recipe_repeats_a_default_of_the_configuration():
    """No parameter that is called like a setting has the setting's default again."""
    settings = {
        (name, field.default)
        for model in configs()
        for name, field in model.model_fields.items()
        if isinstance(field.default, float) and field.default not in (0.0, 1.0)
    }
    repeated = []
    for path in modules("components/training", "components/latents", "flows"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                plain = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                pairs = [
                    *zip(plain, node.args.defaults, strict=True),
                    *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
                ]
                repeated += [
                    f"{named(path)}:{node.lineno} {argument.arg}"
                    for argument, default in pairs
                    if isinstance(default, ast.Constant) and (argument.arg, default.value) in settings
                ]
    assert repeated == []


def test_nothing_reads_the_environment_below_the_entry_points():
    """Outside the workspace's addresses, components take values, they do not look for them."""
    readers = [
        named(path)
        for path in modules("components")
        if "os.environ.get" in path.read_text(encoding="utf-8") and path.name != "workspace.py"
    ]
    assert readers == []


def source_digest(stage: str) -> str:
    """Of the code that a stage's result depends on."""
    reached, pending = set(), [ENTRIES[stage]]
    while pending:
        module = pending.pop()
        path = ROOT / f"{module.replace('.', '/')}.py"
        if module in reached or not path.exists() or module.split(".")[1] in PLUMBING:
            continue
        reached.add(module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("components."):
                pending.append(node.module)
    digest = hashlib.sha256()
    for module in sorted(reached):
        digest.update((ROOT / f"{module.replace('.', '/')}.py").read_bytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("stage", STAGE_VERSIONS)
def test_a_stage_whose_code_changed_says_so_in_its_version(stage: str):
    """`python -m tests.test_architecture` pins the code as it is; raise STAGE_VERSIONS first where results change."""
    pinned = dict(line.split(maxsplit=1) for line in PINNED.read_text(encoding="utf-8").splitlines())
    assert pinned[stage] == f"{STAGE_VERSIONS[stage]} {source_digest(stage)}", (
        f"the code of stage {stage!r} is not the code its version was pinned for: if its results change, raise"
        " STAGE_VERSIONS in components/stages.py; then pin it with `python -m tests.test_architecture`"
    )


if __name__ == "__main__":
    PINNED.write_text(
        "".join(f"{stage} {version} {source_digest(stage)}\n" for stage, version in STAGE_VERSIONS.items()),
        encoding="utf-8",
    )
