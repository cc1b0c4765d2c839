"""One self-contained HTML file: no external request, light and dark, every figure from records.

Names in a manifest are untrusted. Jinja escapes them, figures travel as JSON in which no "<" is
left, and the page's own policy lets no script run but the two constant ones whose hashes it lists.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from xexport.core.errors import InputError, OutputError
from xexport.core.manifest import Manifest
from xexport.core.records import Record
from xexport.report.entries import Entry, op_times_of
from xexport.report.rivals import rivals_of
from xexport.report.versus import versus
from xexport.report.view import Section, bundle_view, compared, compared_tables, subtitle, title_of

__all__ = ["render_html", "write_html"]


_MANY = "Each bundle on its own below."


class _Figure(NamedTuple):
    id: str
    json: Any


def render_html(
    entries: Sequence[tuple[Manifest, Sequence[Record]]],
    *,
    sections: Sequence[Section] = (),
    details: bool = True,
) -> str:
    """The report on one or several bundles.

    ``sections`` come before all others; without ``details`` each bundle's own part is left out.

    Raises:
        MissingDependencyError: plotly is not installed (the extra ``report``).
        InputError: no bundle was given.
    """
    if not entries:
        raise InputError("a report needs at least one bundle")
    from markupsafe import Markup

    import xexport
    from xexport.report import charts, charts_along, charts_pareto

    both = [Entry(*e) for e in entries]
    figures = _Figures()
    scatter = figures.add("scatter", charts_pareto.scatter(both))
    rivals = rivals_of(both)
    steps_along = figures.add("steps-along", charts_along.steps_along(rivals))
    state_along = figures.add("state-along", charts_along.state_along(rivals))
    bundles = [_bundle(index, entry, figures) for index, entry in enumerate(both if details else ())]
    plotly, script = charts.plotly_js() if figures.count else "", _asset("report.js")
    manifests = [e.manifest for e in both]
    # The marked values are the package's own constants, or JSON made safe by charts.py.
    text: str = _template().render(
        title=title_of(manifests),
        subtitle=subtitle(manifests[0]) if len(both) == 1 else _MANY if details else "",
        several=len(both) > 1,
        sections=sections,
        version=xexport.__version__,
        policy=_policy([plotly, script] if plotly else [script]),
        css=Markup(_asset("report.css")),
        plotly=Markup(plotly),
        script=Markup(script),
        has_charts=bool(figures.count),
        scatter=scatter,
        compared=compared(both),
        versus=versus(rivals),
        tables=compared_tables(rivals),
        steps_along=steps_along,
        state_along=state_along,
        bundles=bundles,
    )
    return text


@cache
def _template() -> Any:
    """The page, compiled once a process."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    loader = FunctionLoader(_asset)
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return page.get_template("report.html.j2")


def write_html(
    path: Path,
    entries: Sequence[tuple[Manifest, Sequence[Record]]],
    *,
    sections: Sequence[Section] = (),
    details: bool = True,
) -> None:
    """Render and write, through a temporary file in the same folder.

    Raises:
        OutputError: the file can't be written.
    """
    text = render_html(entries, sections=sections, details=details)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError("the report can't be written", got=f"{path}: {error.strerror}") from error


class _Figures:
    """Gives every figure an id of the page's own making."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, name: str, json: str | None) -> _Figure | None:
        from markupsafe import Markup

        if json is None:
            return None
        self.count += 1
        return _Figure(f"figure-{name}", Markup(json))


def _bundle(index: int, entry: Entry, figures: _Figures) -> dict[str, Any]:
    from xexport.report import charts

    manifest, records = entry
    prefill, unit = op_times_of(records, "prefill"), manifest.model.input.unit
    drawn = {
        "drift_kl": charts.drift_kl(records, unit),
        "drift_state": charts.drift_state(records, unit),
        "ecdf": charts.latency_ecdf(records),
        "positions": charts.position_times(records, unit),
        "ops": charts.op_times(op_times_of(records, "step") or op_times_of(records, "whole")),
        "prefill_ops": charts.op_times(prefill),
        "sizes": charts.sizes(manifest),
    }
    return {
        "id": f"bundle-{index}",
        **bundle_view(manifest, records),
        "ops_title": f"Where a {'step' if manifest.model.contract.streams else 'pass'}'s time goes",
        "prefill_note": f"One call of {prefill.tokens_per_call} {unit}s." if prefill else "",
        **{name: figures.add(f"{index}-{name}", json) for name, json in drawn.items()},
    }


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched from anywhere, and only these scripts run."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _asset(name: str) -> str:
    return (files("xexport.report") / "templates" / name).read_text(encoding="utf-8")
