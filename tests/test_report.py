"""Reports: self-contained, escaped, honest in words, valid in every form."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from xexport.core.contract import InputSpec
from xexport.core.errors import InputError, MissingDependencyError, OutputError
from xexport.core.manifest import (
    FileEntry,
    Lowering,
    Manifest,
    StateTensor,
    TensorDecision,
    read_manifest,
)
from xexport.core.records import (
    AtPosition,
    Bandwidth,
    Fidelity,
    Latency,
    Memory,
    OpTime,
    OpTimes,
    PairedLatency,
    Prefill,
    Record,
    Setup,
)
from xexport.core.results import append_records
from xexport.evaluate.chunks import chunk_law
from xexport.evaluate.drift import compare_and_drift
from xexport.evaluate.fidelity import compare
from xexport.report.entries import compared_latency, fidelity_of, latency_of, read_entry
from xexport.report.format import bytes_text, figure, plus_minus
from xexport.report.html import render_html, write_html
from xexport.report.jsonout import report_json, summary
from xexport.report.markdown import render_markdown
from xexport.report.pareto import Point, front, points
from xexport.report.terminal import show
from xexport.report.view import reproduce
from xexport.report.words import headline, verdict

TEXT = np.random.default_rng(1).integers(0, 16, 260)
EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return read_manifest(toy_bundle)


def latency_row(setup: Setup, runner: str, ms: float) -> Latency:
    ns = int(ms * 1e6)
    return Latency(
        setup=msgspec.structs.replace(setup, runner=runner),
        batch=1,
        warmup=5,
        step_ns=tuple(ns + ns * i // 1000 for i in range(100)),
        prefill=(Prefill(128, (ns * 10,)),),
        load_ns=(30_000_000,),
        prompt=32,
        first_token_ns=(2 * ns,),
        positions=(AtPosition(100, (ns,)), AtPosition(1000, (ns,))),
    )


def make_records(
    fake: Any, setup: Setup, *, step: float = 0.2, ms: float = 1.0, torch_ms: float = 4.0
) -> list[Record]:
    """What an export of a quantized model leaves, with the given loss and speed."""
    setup = msgspec.structs.replace(
        setup,
        runner="bundle",
        environment=msgspec.structs.replace(setup.environment, load_average=0.1),
    )
    runners = {"onnx": fake(step=1e-5), "bundle": fake(step=step, drift=1e-9)}
    pair = PairedLatency(
        setup=setup,
        other="torch",
        ns=tuple((int(ms * 1e6) + i,) * 3 for i in range(8)),
        other_ns=tuple((int(torch_ms * 1e6) + i,) * 3 for i in range(8)),
    )
    ops = tuple(OpTime(op, "CPUExecutionProvider", 2, 20, 5000) for op in ("MatMul", "Mul"))
    return [
        *compare(fake(), runners, TEXT, setup=setup).values(),
        *compare_and_drift(fake(), runners, TEXT, setup=setup)[1].values(),
        chunk_law(fake(), TEXT[:40], setup=setup),
        latency_row(setup, "torch", torch_ms),
        latency_row(setup, "onnx", 2.0),
        latency_row(setup, "bundle", ms),
        pair,
        Memory(setup, 16_384, 72, 10, 1 << 26, 1 << 26, 1 << 26, (1 << 26) + 4096),
        OpTimes(setup, "step", 10, 1, ops, (3000,) * 10),
        OpTimes(setup, "prefill", 3, 128, ops, (30_000,) * 3),
        Bandwidth(setup, 1, 1 << 20, (100_000,), 16_384),
    ]


class Page(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            kind = dict(attrs).get("type") or tag
            self._inside = kind
            if kind == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside is None:
            self.text.append(data)


@pytest.fixture
def page(manifest: Manifest, fake_runner: Any, setup: Setup) -> str:
    return render_html([(manifest, make_records(fake_runner, setup))])


def test_nothing_is_fetched_from_anywhere(page: str) -> None:
    fetched = [
        (tag, name, value)
        for tag, attributes in Page(page).tags
        for name, value in attributes.items()
        if name in ("src", "srcset", "data", "poster", "action", "background")
        or (name == "href" and not str(value).startswith("#"))
    ]
    assert fetched == []
    assert "@import" not in page.split("</style>")[0]
    assert "url(" not in page.split("</style>")[0]
    assert not any(tag in ("link", "iframe", "img", "object", "embed") for tag, _ in Page(page).tags)


def test_the_policy_forbids_the_network_and_names_the_two_scripts(page: str) -> None:
    import base64
    import hashlib

    parsed = Page(page)
    policy = next(
        str(a["content"]) for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none';")
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert len(parsed.scripts) == 2
    for script in parsed.scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_plotly_is_there_once(page: str) -> None:
    assert page.count("* plotly.js v") == 1
    assert len(page) < 6_000_000


def test_every_figure_is_valid_json_with_a_place_on_the_page(page: str) -> None:
    ids = re.findall(r'data-figure="([^"]+)"', page)
    assert len(ids) == 8
    for name in ids:
        match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
        assert match
        assert json.loads(match[1])["data"]


def test_names_from_a_manifest_are_never_markup(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    evil = msgspec.structs.replace(
        manifest,
        model=msgspec.structs.replace(
            manifest.model, family=EVIL, title=EVIL, source=EVIL, notes=(EVIL,), config={EVIL: EVIL}
        ),
        target=EVIL,
        precision=EVIL,
        provider=EVIL,
        decisions=(TensorDecision(EVIL, EVIL, (2, 2), EVIL, 16, EVIL, 0.1),),
        lowerings=(Lowering(EVIL, EVIL, EVIL, EVIL, 1),),
        state=(StateTensor(EVIL, EVIL, "float32", ("B", 2), 0.0),),
        files=(FileEntry(EVIL, EVIL, 3),),
        checks={EVIL: {EVIL: 1.0}},
        environment={EVIL: EVIL},
        warnings=(EVIL,),
    )
    records = make_records(fake_runner, msgspec.structs.replace(setup, text=EVIL, text_sha256=EVIL))
    html = render_html([(evil, records), (evil, records)])
    parsed = Page(html)
    assert not any(tag == "img" for tag, _ in parsed.tags)
    assert len(parsed.scripts) == 2
    assert not any("alert" in script and "x" in script and EVIL in script for script in parsed.scripts)
    assert EVIL not in html
    assert EVIL in "".join(parsed.text)
    markdown = render_markdown([(evil, records)])
    assert "<script" not in markdown.split("```")[0]
    assert "<img" not in markdown.split("```")[0]


def test_the_words_say_what_was_paid_for_what(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    records = make_records(fake_runner, setup, step=1e-5)
    said = verdict(manifest, records)
    text = " ".join(s.text for s in said)
    assert (
        "That is 4.00× as fast as PyTorch (95% interval 4.00 to 4.00, measured in alternate rounds)" in text
    )
    assert "No loss can be measured on 259 tokens of made up" in text
    assert not any(s.tone == "bad" for s in said)
    assert headline(records) == "4.00× as fast as PyTorch, at no measurable loss."


def test_a_slower_and_worse_target_is_said_to_be_so(
    manifest: Manifest, fake_runner: Any, setup: Setup
) -> None:
    records = make_records(fake_runner, setup, step=30.0, ms=8.0)
    bad = [s.text for s in verdict(manifest, records) if s.tone == "bad"]
    assert any(
        s.startswith("This target makes the model slower than PyTorch here: a step takes 2.00×") for s in bad
    )
    assert any(s.startswith("This target makes the model slower than ONNX fp32 here") for s in bad)
    assert any(s.startswith("This target makes the model worse than fp32: it costs") for s in bad)
    assert any(s.startswith("Prefill is slower than ONNX fp32 here: 0.25× as fast") for s in bad)
    assert headline(records).startswith("A step takes 2.00× as long as in PyTorch")


def test_a_broken_bundle_is_said_to_be_broken(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    with pytest.warns(RuntimeWarning, match="not finite"):
        rows = list(compare(fake_runner(), {"bundle": fake_runner(bad_at=3)}, TEXT, setup=setup).values())
    assert any("broken" in s.text and s.tone == "bad" for s in verdict(manifest, rows))
    html = render_html([(manifest, rows)])
    assert "1 of 259 tokens gave logits that are not finite" in "".join(Page(html).text)
    assert summary(manifest, rows)["kl"] == {"mean": None, "median": None, "p99": None, "max": None}


def test_a_bundle_without_measurements_has_a_report_all_the_same(manifest: Manifest) -> None:
    html = render_html([(manifest, [])])
    assert "Neither accuracy nor speed was measured" in "".join(Page(html).text)
    assert "Neither accuracy nor speed was measured" in render_markdown([(manifest, [])])
    assert summary(manifest, [])["latency"]["step_ms"] == {"p50": None, "p90": None, "p99": None}


def test_times_of_another_machine_are_not_compared(
    manifest: Manifest, fake_runner: Any, setup: Setup
) -> None:
    records = make_records(fake_runner, setup)
    elsewhere = msgspec.structs.replace(
        setup, environment=msgspec.structs.replace(setup.environment, cpu="another", load_average=None)
    )
    records.append(latency_row(elsewhere, "bundle", 9.0))
    assert list(compared_latency(records)) == ["bundle"]
    text = " ".join(s.text for s in verdict(manifest, records))
    assert "PyTorch (95%" not in text
    assert "of another." in text


def test_times_of_another_run_are_not_compared(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    records = make_records(fake_runner, setup)
    later = latency_row(msgspec.structs.replace(setup, date="2099-01-01T00:00:00+00:00"), "bundle", 9.0)
    records.append(later)
    assert latency_of(records) is later
    assert compared_latency(records)["bundle"].step_ms(0) == 1.0
    assert [p.ms for p in points([(manifest, records)]) if p.runner == "bundle"] == [pytest.approx(1.0495)]
    markdown = render_markdown([(manifest, records)])
    assert "This bundle again, 2099-01-01 00:00" in markdown


def test_a_short_recorded_check_does_not_replace_the_comparison(fake_runner: Any, setup: Setup) -> None:
    live = compare(fake_runner(), {"bundle": fake_runner()}, TEXT, setup=setup)["bundle"]
    later = compare(
        fake_runner(), {"bundle": fake_runner()}, TEXT[:20], setup=setup, reference_name="torch (recorded)"
    )["bundle"]
    assert fidelity_of([live, later]) is live
    assert fidelity_of([later]) is later


def point(ms: float, bits: float, error: float = 0.0) -> Point:
    return Point("m", "l", "bundle", ms, bits, error, "")


def test_pareto_front() -> None:
    fast, slow, both, beaten = point(1, 2.5), point(4, 2.0), point(2, 2.2), point(3, 2.3)
    assert front([slow, beaten, fast, both]) == [fast, both, slow]
    assert front([]) == []


def test_a_difference_within_its_error_does_not_join_the_front() -> None:
    fast, slow = point(1, 2.00010, 0.0001), point(5, 2.0)
    assert front([fast, slow]) == [fast]


def test_points_of_several_bundles_share_their_reference(
    manifest: Manifest, fake_runner: Any, setup: Setup
) -> None:
    records = make_records(fake_runner, setup)
    other = msgspec.structs.replace(manifest, target="cpu-int4")
    found = points([(manifest, records), (other, records)])
    assert [p.label for p in found] == ["PyTorch", "ONNX fp32", "cpu-fp32", "cpu-int4"]


def test_several_bundles_are_compared(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    other = msgspec.structs.replace(manifest, target="cpu-int4")
    both = [(manifest, make_records(fake_runner, setup)), (other, make_records(fake_runner, setup, step=2.0))]
    html = render_html(both)
    assert 'id="compared"' in html
    assert html.count("<section") == 2
    assert html.count("* plotly.js v") == 1
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "toy · cpu-int4" in render_markdown(both)


def test_a_model_of_frames_is_not_said_to_read_tokens(
    manifest: Manifest, fake_runner: Any, setup: Setup
) -> None:
    """Several frames a call: everything that was timed and cut says so, alone, compared and in a terminal."""
    model = msgspec.structs.replace(manifest.model, input=InputSpec("features", "log_mel", 80, 4))
    inputs = (msgspec.structs.replace(manifest.inputs[0], name="log_mel", dtype="float32"),)
    heard = msgspec.structs.replace(manifest, model=model, inputs=inputs)
    records = [
        msgspec.structs.replace(r, unit=4) if isinstance(r, Latency) else r
        for r in make_records(fake_runner, setup)
        if not isinstance(r, Fidelity)
    ]
    other = msgspec.structs.replace(heard, target="cpu-int4")
    for text in (render_markdown([(heard, records)]), render_markdown([(heard, records), (other, records)])):
        assert re.findall(r".*token.*", text, re.IGNORECASE) == []
        for words in ("A step of 4 frames takes", "at frame 100", "each one call of 4 frames", "First call"):
            assert words in text
    page = render_html([(heard, records)])
    assert re.findall(r"[^>]*token[^<]*", "".join(Page(page).text), re.IGNORECASE) == []
    shown = io.StringIO()
    show("export", summary(heard, records), Console(file=shown, width=200))
    assert "one call of 4 frames" in shown.getvalue()
    assert "frames/s" in shown.getvalue()
    assert "token" not in shown.getvalue()


def test_markdown_tables_are_rectangular(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    text = render_markdown([(manifest, make_records(fake_runner, setup))])
    assert text.startswith("# toy for cpu-fp32\n")
    tables = [b.splitlines() for b in text.split("\n\n") if b.startswith("| ")]
    assert len(tables) >= 8
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
        assert len(widths) == 1, table[0]


def test_json_has_the_summary_and_every_sample(manifest: Manifest, fake_runner: Any, setup: Setup) -> None:
    records = make_records(fake_runner, setup)
    data = json.loads(json.dumps(report_json([(manifest, records)]), allow_nan=False))
    row = data["bundles"][0]["summary"]
    assert set(row) >= {
        "model", "target", "bundle", "bytes", "bits_per_byte", "kl", "same_top1", "chunk_error", "latency",
        "native_kernels", "warnings",
    }  # fmt: skip
    assert set(row["bits_per_byte"]) == {"torch", "onnx", "bundle"}
    assert row["latency"]["step_ms"]["p50"] == pytest.approx(1.0495)
    assert row["speedup"]["torch"]["ratio"] == pytest.approx(4.0, rel=1e-4)
    assert row["kl"]["mean"] > 0
    assert msgspec.convert(data["bundles"][0]["records"], list[Record]) == records


def test_a_bundle_folder_is_read_and_written(toy_bundle: Path, fake_runner: Any, setup: Setup) -> None:
    records = make_records(fake_runner, setup)
    append_records(toy_bundle / "results.jsonl", records)
    entry = read_entry(toy_bundle)
    assert list(entry.records) == records
    write_html(toy_bundle / "report.html", [entry])
    assert (toy_bundle / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [p.name for p in toy_bundle.iterdir() if "report" in p.name] == ["report.html"]


def test_what_can_not_be_rendered(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="at least one"):
        render_html([])
    with pytest.raises(InputError, match="at least one"):
        render_markdown([])
    with pytest.raises(OutputError):
        write_html(tmp_path / "nowhere" / "report.html", [(manifest, [])])
    monkeypatch.setattr("xexport.core.extras.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="plotly"):
        render_html([(manifest, [])])


@pytest.mark.parametrize(
    ("source", "first"),
    [
        ("toy.safetensors", "xexport toy --target cpu-fp32 --out toy-cpu-fp32"),
        ("my file.pth", "xexport toy --target cpu-fp32 --weights 'my file.pth' --out toy-cpu-fp32"),
        ("preset 0.1B, seed 3", "xexport toy --target cpu-fp32 --preset 0.1B --out toy-cpu-fp32"),
        (
            "module my.Net",
            "xexport.export(module, target='cpu-fp32', out='toy-cpu-fp32')  # in Python: module my.Net",
        ),
    ],
)
def test_how_to_make_it_again(manifest: Manifest, source: str, first: str) -> None:
    model = msgspec.structs.replace(manifest.model, source=source)
    assert reproduce(msgspec.structs.replace(manifest, model=model)).splitlines()[0] == first


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1,234"),
        (0.12345, "0.123"),
        (0.00012345, "1.2e-4"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "infinite"),
        (-2.5, "-2.50"),
    ],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_errors_decide_the_digits() -> None:
    assert plus_minus(1.23456, 0.0123) == "1.235 ± 0.012"
    assert plus_minus(1.23456, float("nan")) == "1.235"
    assert bytes_text(2_900_000) == "2.9 MB"
    assert bytes_text(999) == "999 B"
    assert bytes_text(None) == "–"
