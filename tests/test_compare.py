"""Comparing bundles: who is fed what in which order, what the report derives and says, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from xexport import pipeline
from xexport.cli import cli
from xexport.core.errors import InputError, OutputError
from xexport.core.manifest import Appended, Manifest, StateTensor, read_manifest
from xexport.core.records import Setup, Together, Turns
from xexport.core.results import read_records
from xexport.evaluate.together import Rival, default_positions, measure_together
from xexport.models._sizes import nearest_preset, preset_parameters
from xexport.report.along import overtakes, state_growth
from xexport.report.html import render_html
from xexport.report.jsonout import report_json
from xexport.report.markdown import render_markdown
from xexport.report.rivals import rivals_of, step_ratio
from xexport.report.versus import side_by_side, versus

ToyMaker = Callable[..., Path]
TOKENS = list(range(16))


@pytest.mark.parametrize(
    ("limits", "want"),
    [
        ((None, None), (0, 100, 300, 1000, 4000)),
        ((2048, None), (0, 100, 300, 1000, 1900)),
        ((2048, 512), (0, 100, 300, 400, 1000, 1900)),
        ((64, None), (0, 10)),
    ],
    ids=["unbounded", "bounded", "two bounds", "short"],
)
def test_positions_go_as_far_as_the_bounds(limits: tuple[int | None, ...], want: tuple[int, ...]) -> None:
    assert default_positions(limits, rounds=12, steps=4) == want


def test_all_take_turns_where_they_can(fake_runner: Any, setup: Setup) -> None:
    short, long = fake_runner(max_tokens=40), fake_runner()
    rivals = {"short": Rival(short, TOKENS, setup), "long": Rival(long, TOKENS, setup)}
    rows = measure_together(rivals, positions=(30, 0, 100), prefill=(8, 64), rounds=3, steps=2)
    assert [t.at for t in rows["short"].steps] == [0, 30]
    assert [t.at for t in rows["long"].steps] == [0, 30, 100]
    assert [t.at for t in rows["short"].prefill] == [8]
    assert all(len(t.ns) == 3 and len(t.ns[0]) == 2 for t in rows["long"].steps)
    assert all(len(t.ns) == 5 and len(t.ns[0]) == 1 for t in rows["long"].prefill)
    assert rows["short"].run == rows["long"].run
    assert rows["short"].members == ("short", "long")
    # 0: 2 to warm up and 6 timed; on to 30 in one piece; 8 more; on to 100; 8 more; then the prefills
    assert long.calls == [*[1] * 8, 22, *[1] * 8, 62, *[1] * 8, *[8] * 6, *[64] * 6]
    assert (short.position, long.position) == (0, 0)


@pytest.mark.parametrize(
    ("positions", "message"),
    [((), "bad positions"), ((-1,), "bad positions"), ((35,), "no bundle can reach")],
)
def test_positions_that_none_reaches_are_refused(
    fake_runner: Any, setup: Setup, positions: tuple[int, ...], message: str
) -> None:
    rivals = {n: Rival(fake_runner(max_tokens=40), TOKENS, setup) for n in "ab"}
    with pytest.raises(InputError, match=message):
        measure_together(rivals, positions=positions, rounds=2, steps=2)


def test_one_runner_is_no_comparison(fake_runner: Any, setup: Setup) -> None:
    with pytest.raises(InputError, match="at least two"):
        measure_together({"a": Rival(fake_runner(), TOKENS, setup)}, positions=(0,))


def together(setup: Setup, times: dict[int, float], run: str = "r") -> Together:
    steps = tuple(Turns(at, tuple((int(ms * 1e6) + i,) * 4 for i in range(6))) for at, ms in times.items())
    return Together(setup, run, ("a", "b"), 1, steps, (Turns(128, ((10_000_000,),) * 5),))


@pytest.fixture
def pair(make_toy_bundle: ToyMaker, setup: Setup) -> list[tuple[Manifest, list[Any]]]:
    """A model with a cache of 100 tokens that slows from 0.5 to 2 ms, and one of constant state at 1 ms."""
    cache = StateTensor("kv", "kv.next", "float32", ("B", 100, 8), 0.0, Appended("cached", 1, "at"))
    grows = read_manifest(make_toy_bundle("grows", max_tokens=100))
    grows = msgspec.structs.replace(grows, model=msgspec.structs.replace(grows.model, family="grows"))
    flat = read_manifest(make_toy_bundle("flat"))
    grows = msgspec.structs.replace(grows, state=(cache, flat.state[2]))
    return [
        (grows, [together(setup, {0: 0.5, 40: 1.2, 80: 2.0})]),
        (flat, [together(setup, {0: 1.0, 40: 1.0, 80: 1.0})]),
    ]


def test_state_along_the_stream(pair: Any) -> None:
    grows, flat = (state_growth(m) for m, _ in pair)
    assert (grows.fixed, grows.per_token, grows.allocated) == (8, 32.0, 3208)
    assert (grows.at(0), grows.at(10), grows.at(1000)) == (8, 328, 3208)
    assert not flat.grows
    place = overtakes(grows, flat)
    assert place is not None
    assert grows.at(place) > flat.allocated >= grows.at(place - 1)
    assert overtakes(flat, grows) is None
    assert overtakes(grows, flat._replace(allocated=10**6)) is None


def test_a_cache_is_known_by_its_length_too(pair: Any) -> None:
    manifest = pair[0][0]
    plain = tuple(msgspec.structs.replace(s, appended=None) for s in manifest.state)
    assert state_growth(msgspec.structs.replace(manifest, state=plain)) == state_growth(manifest)


def test_words_say_from_where_the_growing_state_loses(pair: Any) -> None:
    text = " ".join(s.text for s in versus(rivals_of(pair)))
    assert "grows is slower than toy from token 40 on, of the positions timed (not yet at 0)" in text
    assert "Fastest step at token 0: grows, 0.500 ms; toy takes 2.00× as long" in text
    assert "Fastest step at token 80: toy, 1.00 ms; grows takes 2.00× as long" in text
    assert "its step goes from 0.500 ms at token 0 to 2.00 ms at token 80" in text
    assert "About equal size" in text


def test_a_crossing_beyond_the_stream_is_said(pair: Any, setup: Setup) -> None:
    pair[0] = pair[0][0], [together(setup, {0: 0.5, 80: 0.6})]
    text = " ".join(s.text for s in versus(rivals_of(pair)))
    assert "Nowhere in what was timed is grows slower than toy; at this growth" in text
    assert "from about token 400 on, beyond its longest stream of 100" in text


def test_a_run_that_not_all_share_is_not_used(pair: Any, setup: Setup) -> None:
    pair[0][1].append(together(setup, {0: 9.0}, run="newer, of the first alone"))
    first, second = rivals_of(pair)
    assert first.turns is not None
    assert first.turns.run == "r"
    ratio = step_ratio(first, second, 80)
    assert ratio is not None
    assert ratio[0] == pytest.approx(2.0, rel=1e-5)
    pair[1] = pair[1][0], []
    assert [r.turns for r in rivals_of(pair)] == [None, None]
    assert "not timed in turns" in " ".join(s.text for s in versus(rivals_of(pair)))


def test_every_form_of_the_report_has_the_comparison(pair: Any) -> None:
    page = render_html(pair)
    for part in ("figure-steps-along", "figure-state-along", "compared-side", "from token 40 on"):
        assert part in page
    assert "from token 40 on" in render_markdown(pair)
    found = report_json(pair)["comparison"]
    wanted = {"0": 0.5, "40": 1.2, "80": 2.0}
    assert found["models"][0]["step_ms"] == pytest.approx(wanted, rel=1e-4)
    assert found["state_overtakes"][0]["growing"] == "grows"
    assert report_json(pair[:1])["comparison"] is None
    assert "figure-steps-along" not in render_html(pair[:1])


def test_one_name_twice_is_told_apart(pair: Any) -> None:
    assert [row[0] for row in side_by_side(rivals_of([pair[1], pair[1]])).rows] == ["toy", "toy (2)"]


def test_bundles_are_compared_and_remember_it(make_toy_bundle: ToyMaker, tmp_path: Path) -> None:
    one, two = make_toy_bundle("one", max_tokens=200), make_toy_bundle("two")
    out = tmp_path / "compared"
    arguments = ["compare", str(one), str(two), "--out", str(out), "--rounds", "2", "--prefill", "8"]
    done = CliRunner().invoke(cli, [*arguments, "--threads", "1", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [m["label"] for m in found["models"]] == ["toy", "toy (2)"]
    assert (out / "compare.html").is_file()
    rows = [read_records(b / "results.jsonl") for b in (one, two)]
    assert rows[0][-1].run == rows[1][-1].run  # type: ignore[union-attr]
    done = CliRunner().invoke(
        cli, ["compare", str(one), str(two), "-o", str(out / "again.md"), "--rounds", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "compared" in done.stdout
    assert (out / "again.md").read_text("utf-8").startswith("# 2 bundles")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["rwkv"], {}, "at least two"),
        (["rwkv", "rwvk"], {}, "neither a bundle nor a model"),
        (["rwkv", "rwkv"], {}, "named twice"),
        (["rwkv", "mamba"], {"preset": "tiny", "parameters": 9}, "exclude each other"),
        (["rwkv", "mamba"], {"report_path": "x.pdf"}, "unknown kind of report"),
        (["rwkv", "mamba"], {"parameters": 10**12}, "no preset of about"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_any_work(
    tmp_path: Path, names: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.compare(names, out=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_families_are_exported_once(
    make_toy_bundle: ToyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def export(model: str, *, out: Path, **options: Any) -> Any:
        made.append((model, options["preset"], options["target"]))
        folder = make_toy_bundle(f"compared/{out.name}")
        manifest = read_manifest(folder)
        model_info = msgspec.structs.replace(manifest.model, family=model, source="preset tiny, seed 0")
        changed = msgspec.structs.replace(manifest, model=model_info)
        (folder / "manifest.json").write_bytes(pipeline.encode_manifest(changed))
        return pipeline.load(folder)

    monkeypatch.setattr(pipeline, "export", export)
    options: dict[str, Any] = {"preset": "tiny", "out": tmp_path / "compared", "rounds": 2, "prefill": (8,)}
    pipeline.compare(["rwkv", "mamba"], **options, positions=(0, 9), threads=1)
    assert made == [("rwkv", "tiny", "cpu-fp32"), ("mamba", "tiny", "cpu-fp32")]
    pipeline.compare(["rwkv", "mamba"], **options, positions=(0, 9), threads=1)
    assert len(made) == 2
    # a folder of that name which holds another model is not taken for it
    (tmp_path / "compared" / "rwkv-tiny-cpu-fp32").rename(tmp_path / "compared" / "rwkv-cpu-fp32")
    with pytest.raises(OutputError, match="another bundle"):
        pipeline.compare(["rwkv", "mamba"], out=tmp_path / "compared", rounds=2)


def test_presets_by_number_of_parameters() -> None:
    sizes = preset_parameters("rwkv")
    assert list(sizes.values()) == sorted(sizes.values())
    assert nearest_preset("rwkv", 1_200_000) == "zoo"
    assert nearest_preset("rwkv", sizes["0.1B"]) == "0.1B"
