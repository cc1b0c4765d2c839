"""The command line: parse, call one function, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xexport import __version__
from xexport.core.errors import CheckpointError, InputError, XexportError, unknown_name

if TYPE_CHECKING:
    from xexport.core.progress import Progress

__all__ = ["cli", "main"]

_JSON = "xexport.json"
_PATH = click.Path(path_type=Path)
#: what an interrupted command left
_INTERRUPTED = {
    "export": "; nothing was written",
    "sweep": "; what is finished is kept: run the same command again to go on",
}


class _Group(click.Group):
    """Export is the default command; errors xexport raises on purpose become messages."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = "--json" in args
        own = {"-h", "--help", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except XexportError as error:
            _print_error(error, as_json=ctx.meta[_JSON])
            ctx.exit(1)
        except KeyboardInterrupt:
            written = _INTERRUPTED.get(str(ctx.invoked_subcommand), "")
            _print_error(XexportError(f"interrupted{written}"), as_json=ctx.meta[_JSON])
            ctx.exit(130)
        except click.UsageError as error:
            if ctx.meta[_JSON]:
                click.echo(_dump({"error": _fields(InputError(error.format_message()))}))
            raise


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="MODEL --target TARGET | COMMAND [ARGS]...",
    options_metavar="",
)
@click.version_option(__version__, message="xexport %(version)s")
def cli() -> None:
    """Turn RWKV, Mamba, RetNet, Hyena and their kin from PyTorch into ONNX bundles that carry their
    own state: quantized, checked against PyTorch, timed.

    \b
    xexport models                              what can be exported
    xexport targets                             where it can run
    xexport rwkv --target cpu-int8              export the checkpoint that ships with xexport
    xexport ./RWKV-x070-0.1B.pth --target cpu-int8 --tokenizer rwkv-world
    xexport run rwkv-cpu-int8 --prompt "Call me "

    \b
    Errors go to stderr. With --json stdout holds exactly one object, and on failure it is
    {"error": {"what", "got", "allowed", "fix"}}.
    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.
    """


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")
_runtime_option = click.option(
    "--runtime", metavar="R", help="cpu (ONNX Runtime here) runs any bundle; the target's own by default."
)


@cli.command()
@click.argument("model")
@click.option("--target", metavar="T", help="Where it is to run; `xexport targets` lists them.")
@click.option("--weights", type=_PATH, metavar="P", help="A .pth, .safetensors or Hugging Face folder.")
@click.option("--preset", metavar="N", help="A named size with random weights; `xexport models` lists them.")
@click.option(
    "--distill",
    type=int,
    metavar="M",
    help="Approximate long filters by M modes each: a state of constant size.",
)
@click.option("--out", type=_PATH, metavar="D", help="The folder to write. [default: MODEL-TARGET]")
@click.option(
    "--tokenizer", metavar="K", help="bytes, dna, none, rwkv-world, a tokenizer.json or World vocabulary."
)
@click.option(
    "--eval-text", type=_PATH, metavar="F", help="Text to measure accuracy on instead of the built-in."
)
@click.option("--seed", type=int, default=0, show_default=True, help="For --preset's random weights.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@_json_option
@_quiet_option
def export(
    model: str,
    target: str | None,
    weights: Path | None,
    preset: str | None,
    distill: int | None,
    out: Path | None,
    tokenizer: str | None,
    eval_text: Path | None,
    seed: int,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export MODEL, a name or a checkpoint's path, for a target.

    It writes a folder with the graph, its weights, the tokenizer, what was measured, and a report.

    The word "export" may be left out. The export is checked against PyTorch, also fed in chunks;
    it is written to a temporary folder and renamed, so a failure leaves nothing behind.

    \b
    xexport rwkv --target cpu-int8
    xexport ./mamba-130m-hf --target cpu-fp32 --out mamba-fp32
    xexport hyena --target cpu-int8 --distill 16
    xexport retnet --target cpu-int4 --eval-text my.txt --json > figures.json
    """
    from xexport.core.registry import family_aliases, family_names

    if model not in family_names() and model not in family_aliases() and not Path(model).exists():
        if any(mark in model for mark in "/\\."):
            raise CheckpointError("the checkpoint does not exist", got=model, fix="check the path")
        raise unknown_name("model or command", model, {*family_names(), *family_aliases(), *cli.commands})
    if target is None:
        from xexport.core.target import target_names

        raise click.UsageError(f"name a target with --target: {', '.join(target_names())}")
    from xexport import pipeline

    with _working(quiet) as progress:
        bundle = pipeline.export(
            model,
            target=target,
            out=out,
            weights=weights,
            preset=preset,
            distill=distill,
            tokenizer=tokenizer,
            eval_text=eval_text,
            force=force,
            progress=progress,
            seed=seed,
        )
        record = pipeline.summary(bundle)
    _print("export", record, as_json)


@cli.command()
@_json_option
def models(as_json: bool) -> None:
    """List the models xexport knows."""
    from xexport import pipeline

    _print("models", {"models": pipeline.models()}, as_json)


@cli.command()
@_json_option
def targets(as_json: bool) -> None:
    """List the targets a model can be exported for."""
    from xexport import pipeline

    _print("targets", {"targets": pipeline.targets()}, as_json)


@cli.command()
@click.argument("bundle", type=_PATH)
@_json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in BUNDLE.

    Model, state, formats of the weights, operators, checks and figures, from its manifest; nothing
    is run. `xexport validate` also hashes the files and runs them.

    \b
    xexport inspect rwkv-cpu-int8
    xexport inspect rwkv-cpu-int8 --json | jq .decisions
    """
    from xexport import pipeline

    _print("inspect", pipeline.inspect(bundle), as_json)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--prompt", metavar="TEXT", help="The text to go on from; - reads stdin.")
@click.option(
    "--audio", type=_PATH, metavar="F", help="Instead, for a model of speech: a 16 kHz .wav (or .flac)."
)
@click.option("--frames", type=int, metavar="N", help="With --audio: frames of 10 ms fed at a time.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="How many tokens to generate.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Nucleus sampling; 1 is off.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is off.")
@click.option("--seed", type=int, default=None, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated.")
@click.option("--threads", type=int, default=0, show_default=True, help="0 takes every core.")
@_runtime_option
@click.option("--ids", is_flag=True, help="The prompt is token ids between spaces; print ids.")
@click.option("--no-verify", is_flag=True, help="Don't hash the files first (large bundles start faster).")
@_json_option
@_quiet_option
def run(
    bundle: Path,
    prompt: str | None,
    audio: Path | None,
    frames: int | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    threads: int,
    runtime: str | None,
    ids: bool,
    no_verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Generate text with BUNDLE, or hear a recording.

    The text streams to stdout, the speed follows on stderr. Needs no torch. Of a recording the letters'
    ids are written (greedy CTC), in a streaming model chunk by chunk as it would come from a microphone.
    A model of whole sequences can't generate: of it the likeliest tokens at every position are printed,
    --top-k of them.

    \b
    xexport run rwkv-cpu-int8 --prompt "Call me " --temperature 0.8 --top-p 0.9 --seed 0
    xexport run rwkv-cpu-int8 --prompt "67 97 108 108" --ids
    xexport run conformer-cpu-int8 --audio speech.wav --frames 8
    """
    if (prompt is None) == (audio is None):
        raise click.UsageError("name one: --prompt TEXT, or --audio FILE for a model of speech")
    if frames is not None and audio is None:
        raise click.UsageError("--frames goes with --audio")
    if audio is not None:
        _listen(bundle, audio, frames, threads, runtime, not no_verify, as_json, quiet)
        return
    assert prompt is not None
    from xexport.runtimes.bundle import load
    from xexport.runtimes.tokenizers import NoTokenizer, parse_ids

    text = sys.stdin.read() if prompt == "-" else prompt
    stream = load(bundle, verify=not no_verify).stream(threads=threads, runtime=runtime)
    if ids:
        stream.tokenizer = NoTokenizer()
    if not stream.contract.streams:
        from xexport.runtimes.predict import predict

        prompt_ids = parse_ids(text) if ids else stream.tokenizer.encode(text)
        _print("predict", {"positions": predict(stream, prompt_ids, top_k or 5)}, as_json)
        return
    generation = stream.generate(
        parse_ids(text) if ids else text, max_tokens, temperature, top_p, top_k, seed, stop or None
    )
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if not as_json:
            click.echo(_printable(piece), nl=False)
            sys.stdout.flush()
    stats = generation.stats.record()
    if as_json:
        click.echo(_dump({"text": "".join(pieces), "ids": generation.ids, **stats}))
        return
    click.echo()
    if not quiet:
        click.secho(
            f"prompt {stats['prompt_tokens']} tokens, {stats['prompt_tokens_per_s']:,.0f} tokens/s; "
            f"generated {stats['new_tokens']} tokens, {stats['decode_tokens_per_s']:,.0f} tokens/s",
            err=True,
            dim=True,
        )


def _listen(
    bundle: Path,
    audio: Path,
    frames: int | None,
    threads: int,
    runtime: str | None,
    verify: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """``run --audio``: ids to stdout as they come, then latency on stderr."""
    from xexport.runtimes.audio import read_audio
    from xexport.runtimes.bundle import load
    from xexport.runtimes.listen import Listener, hear

    samples = read_audio(audio)
    loaded = load(bundle, verify=verify)
    model = loaded.manifest.model
    stream = loaded.stream(threads=threads, runtime=runtime)
    listener = Listener(stream, int(model.config.get("blank", 0)), frames)
    for letters in hear(listener, samples):
        if letters and not as_json:
            click.echo(" ".join(map(str, letters)) + " ", nl=False)
            sys.stdout.flush()
    stats = listener.stats.record()
    notes = [n for n in model.notes if n.startswith("random weights")]
    if as_json:
        click.echo(_dump({"ids": listener.ids, "positions": listener.positions, "notes": notes, **stats}))
        return
    click.echo()
    if not quiet:
        for note in notes:
            click.secho(f"{note}: the ids mean nothing", err=True, dim=True)
        click.secho(listener.stats.sentence(), err=True, dim=True)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--eval-text", type=_PATH, metavar="F", help="Text to measure on instead of the built-in.")
@_runtime_option
@_json_option
@_quiet_option
def validate(bundle: Path, eval_text: Path | None, runtime: str | None, as_json: bool, quiet: bool) -> None:
    """Check BUNDLE on this machine.

    Files against their hashes, logits against those PyTorch gave at export (they travel with the
    bundle, so this needs no torch), chunks against whole, bits per byte of a text. Exits with 1 if
    something is wrong, and says what.

    \b
    xexport validate rwkv-cpu-int8
    xexport validate rwkv-cpu-int8 --eval-text my.txt --json
    xexport validate rwkv-openvino-fp32 --runtime cpu
    """
    from xexport import pipeline

    with _working(quiet) as progress:
        record = pipeline.validate(bundle, eval_text=eval_text, runtime=runtime, progress=progress)
    _print("validate", record, as_json)
    if not record.get("ok", True):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("bundle", type=_PATH)
@click.option("--threads", type=int, default=None, help="0 takes every core.")
@click.option("--steps", type=click.IntRange(1), metavar="N", help="How many single tokens to time.")
@click.option(
    "--prefill",
    type=click.IntRange(1),
    multiple=True,
    metavar="N",
    help="Length of a prefill to time; may be repeated.",
)
@click.option(
    "--position",
    "positions",
    type=click.IntRange(0),
    multiple=True,
    metavar="N",
    help="Time steps after N tokens of a stream too; may be repeated. [default: 100, 1000, 1900]",
)
@_runtime_option
@_json_option
@_quiet_option
def profile(
    bundle: Path,
    threads: int | None,
    steps: int | None,
    prefill: tuple[int, ...],
    positions: tuple[int, ...],
    runtime: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time BUNDLE on this machine.

    Single tokens, also far along a stream, prefill, loading, memory, where the time goes by operator,
    and which execution provider ran which nodes.

    \b
    xexport profile rwkv-cpu-int8 --threads 1 --steps 500 --prefill 64 --prefill 512
    xexport profile transformer-cpu-int8 --position 100 --position 1900
    """
    from xexport import pipeline

    with _working(quiet) as progress:
        record = pipeline.profile(
            bundle,
            threads=threads,
            steps=steps,
            prefill=prefill or None,
            positions=positions or None,
            runtime=runtime,
            progress=progress,
        )
    _print("profile", record, as_json)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=_PATH, metavar="BUNDLE...")
@click.option(
    "-o",
    "--out",
    type=_PATH,
    default=Path("report.html"),
    show_default=True,
    help="A .html, .md or .json file.",
)
@_json_option
@_quiet_option
def report(bundles: tuple[Path, ...], out: Path, as_json: bool, quiet: bool) -> None:
    """Write one report that compares BUNDLEs.

    The ending of the name picks the format: .html (one file, works offline), .md or .json.

    \b
    xexport report rwkv-cpu-fp32 rwkv-cpu-int8 rwkv-cpu-int4 -o compare.html
    """
    from xexport import pipeline

    with _working(quiet) as progress:
        written = pipeline.report(list(bundles), out, progress=progress)
    _print("report", {"report": str(written)}, as_json)


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="BUNDLE|MODEL...")
@click.option(
    "--target", metavar="T", default="cpu-fp32", show_default=True, help="What MODELs are exported for."
)
@click.option("--preset", metavar="N", help="A size that every MODEL has, with random weights.")
@click.option(
    "--parameters",
    metavar="N",
    help="Instead: each MODEL's preset nearest to N parameters, as in 1.2M or 130M.",
)
@click.option(
    "--out",
    type=_PATH,
    metavar="D",
    default=Path(),
    help="The folder of new bundles and of the report. [default: here]",
)
@click.option(
    "-o",
    "--report",
    "report_path",
    type=_PATH,
    metavar="F",
    help="The report, a .html, .md or .json file. [default: OUT/compare.html]",
)
@click.option(
    "--position",
    "positions",
    type=int,
    multiple=True,
    metavar="N",
    help="Time steps after N tokens; may be repeated.",
)
@click.option(
    "--prefill", type=int, multiple=True, metavar="N", help="Length of a prefill to time; may be repeated."
)
@click.option(
    "--rounds", type=int, default=12, show_default=True, help="Rounds at each position; more is surer."
)
@click.option("--threads", type=int, default=0, show_default=True, help="0 takes every core.")
@click.option("--force", is_flag=True, help="Export again what is in OUT already.")
@_json_option
@_quiet_option
def compare(
    names: tuple[str, ...],
    target: str,
    preset: str | None,
    parameters: str | None,
    out: Path,
    report_path: Path | None,
    positions: tuple[int, ...],
    prefill: tuple[int, ...],
    rounds: int,
    threads: int,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare BUNDLEs or MODELs side by side.

    Accuracy, prefill, step time and state, also far along the stream, where a Transformer's step grows
    with its cache and a recurrent one's stays. All take turns in one process, round by round, so that
    a busy machine slows them alike; who is faster is said with its interval. The measurements are kept
    in the bundles, and `xexport report` shows them again.

    A MODEL is exported from the trained checkpoint that ships with xexport, or with --preset or
    --parameters at one size with random weights: speed and state are the same then, accuracy is not.

    \b
    xexport compare rwkv-cpu-int8 mamba-cpu-int8
    xexport compare rwkv mamba retnet hyena --target cpu-int8 --out compared
    xexport compare rwkv mamba transformer --preset zoo --position 100 --position 1900
    xexport compare rwkv mamba transformer --parameters 130M -o compare.md
    """
    from xexport import pipeline

    with _working(quiet) as progress:
        record = pipeline.compare(
            names,
            target=target,
            preset=preset,
            parameters=_parameters(parameters),
            out=out,
            report_path=report_path,
            positions=positions or None,
            prefill=prefill or None,
            rounds=rounds,
            threads=threads,
            force=force,
            progress=progress,
        )
    _print("compare", record, as_json)


@cli.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--targets",
    "patterns",
    multiple=True,
    required=True,
    metavar="T,...",
    help="Targets or patterns between commas; may be repeated.",
)
@click.option(
    "--out",
    type=_PATH,
    metavar="D",
    default=Path("xexport-sweep"),
    show_default=True,
    help="Store, bundles, report.",
)
@click.option("--preset", metavar="N", help="A size that every MODEL has, with random weights.")
@click.option("--seed", type=int, default=0, show_default=True, help="For --preset's random weights.")
@click.option("--eval-text", type=_PATH, metavar="F", help="Text to measure on instead of the built-in.")
@click.option("--threads", type=int, default=None, help="0 takes every core.")
@click.option("--steps", type=click.IntRange(1), default=None, help="How many single tokens to time.")
@click.option(
    "--prefill", type=click.IntRange(1), multiple=True, help="Length of a prefill to time; may be repeated."
)
@click.option("--scheduler", metavar="URL", help="A Dask scheduler's address, to sweep on several machines.")
@click.option(
    "--workers", type=int, metavar="N", help="Processes to start here instead. [default: by memory]"
)
@click.option("--retry", is_flag=True, help="Try again what was refused before.")
@click.option(
    "-o", "--report", "report_path", type=_PATH, metavar="F", help=".html, .md or .json [default: in OUT]"
)
@_json_option
@_quiet_option
def sweep(
    models: tuple[str, ...], patterns: tuple[str, ...], as_json: bool, quiet: bool, **options: Any
) -> None:
    """Export and profile a grid of MODELs and targets.

    Every cell is exported, validated and profiled, and one report shows them all. Exports run side by
    side, profiles one at a time on a machine. Finished cells are kept in a store in OUT: after an
    interruption the same command goes on where it was. Exits with 1 if a cell failed.

    \b
    xexport sweep rwkv mamba retnet --targets 'cpu-*'
    xexport sweep rwkv ./mamba-130m-hf --targets 'cpu-*,openvino-*' --out grid
    xexport sweep rwkv mamba --targets 'cpu-*,arm64-*' --scheduler tcp://192.168.1.5:8786
    """
    from xexport.sweep.run import sweep as run_sweep

    wanted = [name for pattern in patterns for name in pattern.split(",")]
    with _working(quiet) as progress:
        record = run_sweep(models, wanted, progress=progress, **options)
    _print("sweep", record, as_json)
    if record["counts"].get("failed"):
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("scheduler")
@click.option("--name", metavar="N", help="What the scheduler calls this worker.")
@click.option("--no-profile", is_flag=True, help="Export only: measure nothing here.")
@_quiet_option
def worker(scheduler: str, name: str | None, no_profile: bool, quiet: bool) -> None:
    """Let this machine work for the sweeps of a SCHEDULER.

    Connects to Dask's scheduler until it ends, and announces what `xexport doctor` says this machine can
    run. Whoever controls the scheduler can run code here: use it in a network you trust.

    \b
    dask scheduler                                # on one machine
    xexport worker tcp://192.168.1.5:8786         # on every machine, a Raspberry Pi too
    """
    from xexport.sweep.worker import offer, serve

    resources = offer(profile=not no_profile)
    if not quiet:
        click.echo(f"{scheduler}: offering {', '.join(resources) or 'nothing'}", err=True)
    serve(scheduler, resources, name=name)


def _parameters(text: str | None) -> int | None:
    """``1.2M`` -> 1 200 000."""
    if text is None:
        return None
    scale = {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1:].upper(), 1.0)
    try:
        count = float(text if scale == 1.0 else text[:-1]) * scale
    except ValueError:
        count = math.nan
    if not 1 <= count < 1e13:
        raise InputError(
            "bad number of parameters", got=text, allowed="a number such as 1200000, 1.2M, 130M or 7B"
        )
    return round(count)


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=_PATH, metavar="BUNDLE...")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere."
)
@click.option("--port", type=int, default=8765, show_default=True, help="0 takes a free one.")
@click.option("--ort", type=_PATH, metavar="D", help="The folder dist of the npm package onnxruntime-web.")
@_json_option
def serve(bundles: tuple[Path, ...], host: str, port: int, ort: Path | None, as_json: bool) -> None:
    """Serve a page that runs BUNDLEs in a browser.

    A prompt is typed and its text streams. The page runs the bundle itself, with WebAssembly or WebGPU;
    this machine only sends it the files. Nothing is loaded from elsewhere: onnxruntime-web comes from
    the environment "web" (python -m xexport.runtimes.environments install web). It serves this machine
    alone unless told otherwise, until it is interrupted.

    \b
    xexport rwkv --target web-int8
    xexport serve rwkv-web-int8
    """
    from xexport.runtimes.environments import get_environment
    from xexport.runtimes.serve import make_server

    packages = get_environment("web").folder / "node_modules"
    with make_server(
        bundles, ort=ort or packages / "onnxruntime-web" / "dist", host=host, port=port
    ) as server:
        if as_json:
            click.echo(_dump({"url": server.url, "bundles": [str(b) for b in bundles]}))
        else:
            click.echo(f"Open {server.url} (Ctrl-C ends it)")
        sys.stdout.flush()
        server.serve_forever()


@cli.command()
@_json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has and what runs here.

    Versions, processor, memory, native kernels or why there are none, and every target.
    """
    from xexport import pipeline

    _print("doctor", pipeline.doctor(), as_json)


@contextmanager
def _working(quiet: bool) -> Iterator[Progress]:
    """Progress on stderr; what libraries print meanwhile goes there too, so that stdout stays clean."""
    from xexport.core.progress import Silent, for_terminal

    progress = Silent() if quiet else for_terminal()
    try:
        with redirect_stdout(sys.stderr):
            yield progress
    finally:
        progress.close()


def _print(kind: str, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(_dump(record))
        return
    from rich.console import Console

    from xexport.report.terminal import show

    show(kind, record, Console(highlight=False))


def _print_error(error: XexportError, *, as_json: bool) -> None:
    head, *rest = str(error).split("\n")
    click.secho(f"error: {head}", fg="red", err=True)
    for line in rest:
        click.echo(line, err=True)
    if as_json:
        click.echo(_dump({"error": _fields(error)}))


def _dump(record: Any) -> str:
    """JSON as the standard has it: an infinite or undefined number is null."""
    return json.dumps(_standard(record), allow_nan=False)


def _standard(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _standard(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _fields(error: XexportError) -> dict[str, str | None]:
    values = {"what": error.what, "got": error.got, "allowed": error.allowed, "fix": error.fix}
    return {key: None if value is None else str(value) for key, value in values.items()}


def _printable(text: str) -> str:
    """Text a model can't steer a terminal with; files and pipes get it as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def main() -> None:
    """The entry point ``xexport``."""
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # deprecations inside libraries are not the user's
    cli(prog_name="xexport")


if __name__ == "__main__":
    main()
