"""What the documents promise exists: commands parse, snippets run, files are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import xexport
from xexport.cli import cli
from xexport.core.registry import family_aliases, family_names
from xexport.core.target import target_names

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    p for folder in (ROOT, ROOT / "docs", ROOT / "zoo", ROOT / "benchmarks") for p in folder.glob("*.md")
)
README = ROOT / "README.md"
ToyMaker = Callable[..., Path]

pytestmark = pytest.mark.skipif(not README.is_file(), reason="README.md is not written yet")


def commands() -> Iterator[tuple[str, str]]:
    """(document, line) of every xexport command in a block of code."""
    for path in DOCUMENTS:
        fenced = False
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("```"):
                fenced = not fenced
            text = line.strip().removeprefix("$ ")
            if (fenced or line.startswith("    ")) and text.startswith("xexport ") and "..." not in text:
                yield path.name, text.split("  #")[0].split(" > ")[0].split(" | ")[0].strip()


def snippets(path: Path) -> list[str]:
    """The python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize(("document", "line"), sorted(set(commands())))
def test_command_in_a_document_parses(document: str, line: str) -> None:
    _, *args = shlex.split(line)
    if args[0] in ("--help", "--version"):
        return
    name = args.pop(0) if args[0] in cli.commands else "export"
    command = cli.commands[name]
    context = command.make_context(name, args, parent=click.Context(cli))  # a wrong option raises
    if name == "export":
        model, target = context.params["model"], context.params["target"]
        assert model in {*family_names(), *family_aliases(), "MODEL"} or model.startswith("./")
        assert target in {*target_names(), "T", "TARGET"}


def test_readme_shows_every_command_and_family() -> None:
    text = README.read_text(encoding="utf-8")
    for name in (*cli.commands, *family_names()):
        assert name in text, f"README.md says nothing of {name}"
    assert text.index("make demo") < text.index("make test") < 1000
    assert "make demo" in (ROOT / "CONTRIBUTING.md").read_text("utf-8") + text
    for target in ("demo:", "test:"):
        assert target in (ROOT / "Makefile").read_text("utf-8")


def test_readmes_stream_runs(make_toy_bundle: ToyMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy_bundle()
    real = xexport.load
    called: list[Any] = []

    def export(model: Any, *, target: str, out: str | None = None, **_: Any) -> Any:
        called.append((model, target, out))
        return real(toy)

    (code,) = [s for s in snippets(README) if "stream.generate" in s]
    monkeypatch.setattr(xexport, "export", export, raising=False)
    monkeypatch.setattr(xexport, "load", lambda _: real(toy), raising=False)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert called[0][0] in family_names()
    assert called[0][1] in target_names()
    assert names["logits"].shape == (1, 3, 256)
    assert names["stream"].position > 60


def test_readmes_own_model_is_exported(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    given: list[Any] = []
    real = xexport.load
    monkeypatch.setattr(
        xexport, "export", lambda module, **options: given.append((module, options)), raising=False
    )
    (code,) = [s for s in snippets(README) if "torch.nn.Module" in s]
    exec(compile(code, "README.md", "exec"), {"torch": torch, "xexport": xexport})
    ((module, options),) = given
    monkeypatch.undo()
    folder = exporter.export(module, options["target"], tmp_path / options["out"])
    assert real(folder).stream().feed([1, 2, 3]).shape == (1, 3, module.vocab_size)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_document_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+/[\w.-]*\.(?:md|py|toml|txt|json))`", text))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", text))
    missing = [n for n in named if not any((base / n).exists() for base in (ROOT, path.parent))]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"@@\w+@@|TODO|FIXME|XXX", text) == []
