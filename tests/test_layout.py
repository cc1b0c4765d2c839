"""The import direction, the wheel's contents, and the lightness of `import xexport`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: each room may import those to its left, and itself
ORDER = ("core", "ops", "models", "exporter", "quant", "runtimes", "evaluate", "pipeline", "sweep", "cli")
#: rooms beside the line, and what they may import
ASIDE = {
    "targets": {"core"},
    "report": {"core"},
    "zoo": {"core", "ops", "models", "exporter", "quant", "runtimes", "evaluate"},
}
#: the top of the line also uses the rooms beside it
MAY_USE_ASIDE = {"pipeline": {"report", "targets", "zoo"}, "sweep": {"report", "zoo"}, "cli": {"report"}}


def allowed(room: str) -> set[str]:
    if room in ASIDE:
        return ASIDE[room] | {room}
    return set(ORDER[: ORDER.index(room) + 1]) | MAY_USE_ASIDE.get(room, set())


def sources() -> list[Path]:
    found = [ROOT / "pipeline.py", ROOT / "cli.py"]
    for room in (*(r for r in ORDER if (ROOT / r).is_dir()), *ASIDE):
        found += sorted((ROOT / room).rglob("*.py"))
    return found


def imported_rooms(path: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "xexport":
                names = [f"xexport.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("xexport.") and "__" not in n}
    return rooms


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    extra = imported_rooms(path) - allowed(room)
    assert not extra, f"{room} may not import {sorted(extra)}"


def test_the_import_test_sees_imports() -> None:
    assert {"core", "runtimes"} <= imported_rooms(ROOT / "pipeline.py")


def test_exporter_names_no_family() -> None:
    families = [p.stem for p in (ROOT / "models").glob("*.py") if not p.stem.startswith("_")]
    assert families
    for path in (ROOT / "exporter").rglob("*.py"):
        words = {
            node.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & set(families), f"{path} names a family"


def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    """Without the kernels, which take a minute to compile; the next test says what they add."""
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        str(tmp_path),
        "-C",
        "wheel.cmake=false",
        str(ROOT),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if ".dist-info/" not in n}
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]
    wanted: set[str] = set()
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    for name in tracked:
        for target, source in table.items():
            if name == source or name.startswith(f"{source}/"):
                wanted.add(target + name.removeprefix(source))
    assert inside == wanted


def test_cmake_adds_the_library_alone() -> None:
    """Beside the operators, where CI's installation, which requires the kernels, has to find it."""
    rules = re.findall(
        r"^\s*install\((.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE | re.DOTALL
    )
    assert rules == ["TARGETS xexport_ops LIBRARY DESTINATION ops RUNTIME DESTINATION ops"]
