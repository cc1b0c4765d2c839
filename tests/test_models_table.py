"""The table of models: README as rendered, formulas that hold, errors as the tests found them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from oracle_record import Watched, keep, oracle_of, watch
from tolerances import TOLERANCES

from xexport import pipeline
from xexport.core.registry import family_names, get_family
from xexport.report.family_table import MARKS, render

ROOT = Path(__file__).resolve().parents[1]
TABLE = json.loads((ROOT / "models" / "_table.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models_table", ROOT / "benchmarks" / "models_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_has_the_table_as_it_was_made() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    shown = text.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
    fix = "run `python benchmarks/models_table.py` (CONTRIBUTING.md): the table is not typed"
    assert shown == render(TABLE), fix


def test_the_table_is_of_families_that_exist() -> None:
    assert set(TABLE["families"]) <= set(family_names())
    assert [row["name"] for row in pipeline.models()] == list(family_names())
    for row in pipeline.models():
        assert row["measured"] == TABLE["families"].get(row["name"])


@pytest.mark.parametrize("name", ["rwkv", "retnet", "transformer"])
def test_a_formula_gives_the_bytes_of_a_state(script: ModuleType, name: str) -> None:
    family = get_family(name)
    config = family.presets["zoo"]
    text = script.formula(family, config)
    wider = dataclasses.replace(config, width=5 * config.width, layers=7)
    values = {"layers": 7, "width": 5 * config.width, "length": getattr(config, "max_tokens", 0)}
    python = text.replace(",", "").replace("·", "*").replace("²", "**2")
    assert eval(python, values) == pytest.approx(script.state_bytes(family, wider), rel=1e-3)


def test_a_config_that_can_not_be_scaled_has_no_formula(script: ModuleType) -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = 3

    assert script.formula(get_family("rwkv"), Config()) is None


def test_a_tolerance_remembers_what_it_let_pass() -> None:
    with pytest.MonkeyPatch.context() as patch:
        watched = watch(patch)
        tolerance = TOLERANCES["oracle_fp32"]
        assert tolerance > 2e-5
        assert tolerance * 10 >= 6e-4
        assert not tolerance > 1.0
        assert max(watched.found) == pytest.approx(6e-5)
    assert not isinstance(TOLERANCES["oracle_fp32"], Watched)


@pytest.mark.oracle("some package", family="rwkv5")
def test_a_marker_may_name_family_and_oracle(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    assert oracle_of(request.node) == ("rwkv5", "some package")
    path = tmp_path / "o.json"
    for error in (1e-6, 2e-6):
        keep(path, request.node, error)
    rows: dict[str, Any] = json.loads(path.read_text("utf-8"))
    assert [(r["oracle"], r["error"]) for r in rows["rwkv5"]] == [("some package", 2e-6)]
