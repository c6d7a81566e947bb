"""`loraplex bench ...`: load generator, transformers + peft baseline, and the table of ratios."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loraplex.platform.cli import output
from loraplex.platform.cli.bench_cold import cold
from loraplex.platform.cli.bench_overhead import overhead
from loraplex.platform.cli.output import CliError, UsageError
from loraplex.platform.cli.server_api import ApiKey, AsJson, ServerApi

if TYPE_CHECKING:
    from loraplex.platform.bench.workload import PlannedRequest

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a server, and what it is compared with.",
)

app.command()(cold)
app.command()(overhead)

PromptLen = Annotated[str, typer.Option(help="Tokens per prompt; LOW:HIGH draws from [LOW, HIGH).")]
OutputLen = Annotated[str, typer.Option(help="Tokens per answer; LOW:HIGH draws from [LOW, HIGH).")]
Popularity = Annotated[
    str | None,
    typer.Option(
        help="base, identical, uniform, skewed or distinct (Punica); default: base, or uniform "
        "with adapters."
    ),
]
NumRequests = Annotated[int, typer.Option(min=1, help="How many requests.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests in flight at most.")]


@app.command()
def serve(
    base_url: Annotated[
        str, typer.Option(help="Any OpenAI-style server.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Name of the base model; default: ask the server.")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="Model names of the adapters, comma-separated.")
    ] = None,
    upload: Annotated[
        int, typer.Option(min=0, help="Register so many random adapters first (Loraplex only).")
    ] = 0,
    ranks: Annotated[str, typer.Option(help="Ranks of the uploaded ones, in turn.")] = "8,16,32,64",
    model_dir: Annotated[
        Path | None, typer.Option(help="Folder with the model's config.json, for --upload.")
    ] = None,
    popularity: Popularity = None,
    concurrency: Concurrency = 32,
    num_requests: NumRequests = 128,
    prompt_len: PromptLen = "128",
    output_len: OutputLen = "64",
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second, arriving at random; default: all at once."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option(help="slora: S-LoRA's synthetic trace, by the four flags below.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Trace: 1 = all adapters alike, less = skewed.")
    ] = 1.0,
    cv: Annotated[float, typer.Option(help="Trace: burstiness, 1 = Poisson.")] = 1.0,
    duration: Annotated[float, typer.Option(help="Trace: seconds.")] = 60.0,
    vocab_size: Annotated[
        int, typer.Option(min=16, help="Prompts are random token ids below this.")
    ] = 256,
    seed: Annotated[
        int | None,
        typer.Option(help="Of the prompts; default: new ones each time, so no prefix hits."),
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured requests sent first.")] = 4,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Drive a server and report tokens/s, time to first token and inter-token latency.

    Sends streaming completions of random token ids, greedy, with ignore_eos. The last line is JSON.
    """
    from loraplex.platform.bench import workload
    from loraplex.platform.bench.loadgen import LoadGenerator
    from loraplex.platform.bench.measure import summarize
    from loraplex.platform.bench.report import json_line, result_table

    names = [name.strip() for name in (adapters or "").split(",") if name.strip()]
    if upload:
        names += _upload(base_url, model_dir, upload, ranks, api_key)
    lengths = _range("--prompt-len", prompt_len), _range("--output-len", output_len)
    how: dict[str, Any] = {"concurrency": concurrency, "rate": rate}
    try:
        if trace == "slora":
            rate = rate or 2.0
            how = {"trace": trace, "alpha": alpha, "cv": cv, "rate": rate, "trace_s": duration}
            plan = workload.slora(len(names), alpha, rate, cv, duration, *lengths)
        elif trace is not None:
            raise UsageError(f"--trace {trace}: slora is the only one")
        else:
            popularity = popularity or ("uniform" if names else "base")
            plan = _punica(popularity, num_requests, len(names), *lengths)
            if rate is not None:
                plan = workload.poisson(plan, rate)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if model is None:
        with ServerApi(base_url, api_key) as api:
            model = api.base_model()
    seed = time.time_ns() if seed is None else seed
    prompts = workload.prompts(plan, vocab_size, seed)
    generator = LoadGenerator(
        base_url, model, names, api_key=api_key, concurrency=None if trace else concurrency
    )
    _warm(generator, plan, vocab_size, warmup, seed)
    cpu = time.process_time()
    records = _with_progress(generator, plan, prompts, show=not as_json)
    cpu = time.process_time() - cpu
    result = summarize(records).as_dict()
    if result["output_tokens"]:
        result["client_cpu_us_per_token"] = round(cpu / result["output_tokens"] * 1e6, 1)
    if not as_json:
        output.stdout().print(result_table(f"{model} at {base_url}", result))
    print(
        json_line(
            "serve",
            base_url=base_url,
            model=model,
            popularity=None if trace else popularity,
            **how,
            prompt_len=prompt_len,
            output_len=output_len,
            seed=seed,
            **workload.describe(plan),
            **result,
        )
    )
    if result["errors"]:
        raise CliError(f"{result['errors']} of {result['requests']} requests failed")


@app.command()
def baseline(
    model: Annotated[Path, typer.Option(help="Model folder.")],
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Adapter folder; give it several times.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="static, mixed, sequential, or all that are possible.")
    ] = "all",
    popularity: Popularity = None,
    concurrency: Concurrency = 8,
    num_requests: NumRequests = 16,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="As transformers calls it.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the same workload by transformers + peft, without a server.

    static: full batches of the base model. mixed: a batch with peft's adapter_names. sequential:
    one request at a time with set_adapter. One JSON line per mode.
    """
    from loraplex.platform.bench.peer import BaselinePeer, PeerError
    from loraplex.platform.bench.report import json_line, result_table

    folders = adapters or []
    modes = (
        (["static", "mixed", "sequential"] if folders else ["static"]) if mode == "all" else [mode]
    )
    case = {
        "concurrency": concurrency,
        "num_requests": num_requests,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "popularity": popularity or "distinct",
        "seed": seed,
    }
    try:
        with BaselinePeer(model, folders, dtype=dtype) as peer:
            with _status("loading transformers and peft", show=not as_json):
                peer.wait_ready()
            for one in modes:
                with _status(f"{one} ...", show=not as_json):
                    result = peer.run({**case, "mode": one})
                if not as_json:
                    output.stdout().print(result_table(result["system"], result))
                print(json_line("baseline", model=str(model), **result), flush=True)
    except PeerError as error:
        raise CliError(str(error)) from error


@app.command()
def table(
    quick: Annotated[bool, typer.Option("--quick", help="Small model, one round.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="small or medium; default: both.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Default: 3, or 1 with --quick.")
    ] = None,
    rotation: Annotated[
        bool, typer.Option(help="Also 200 adapters with room for 16 (small only).")
    ] = True,
    folder: Annotated[
        Path | None,
        typer.Option(help="Keep models and adapters here; default: a temporary folder."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a server with transformers + peft on random models, and print the ratios of the
    README.

    Takes about 5 minutes with --quick and half an hour without, and a few GB of disk.
    """
    from loraplex.platform.bench import compare, models
    from loraplex.platform.bench.peer import PeerError
    from loraplex.platform.bench.report import json_line
    from loraplex.platform.bench.upload import UploadError

    wanted = model or (["small"] if quick else list(models.SHAPES))
    unknown = [name for name in wanted if name not in models.SHAPES]
    if unknown:
        raise UsageError(f"--model {unknown[0]}: must be one of {', '.join(models.SHAPES)}")
    progress = output.stderr()
    reached = True
    place = (
        nullcontext(str(folder))
        if folder
        else tempfile.TemporaryDirectory(prefix="loraplex-bench-")
    )
    with place as root:
        for name in wanted:
            comparison = compare.Comparison(
                models.SHAPES[name],
                Path(root),
                rounds or (1 if quick else 3),
                lambda text: progress.print(f"[dim]{escape(text)}[/]", soft_wrap=True),
            )
            try:
                measured = comparison.run(rotation=rotation and name == "small")
            except (PeerError, UploadError) as error:
                raise CliError(str(error)) from error
            results = compare.evaluate(name, measured)
            reached &= all(r.reached for r in results)
            if not as_json:
                output.stdout().print(ratio_table(name, results))
            for case, rows in measured.items():
                print(json_line("table", model=name, case=case, **compare.medians(rows)))
    if not reached:
        raise CliError("not every target was reached; see the table")


def ratio_table(model: str, results: list[Any]) -> Table:
    rows = output.table("what", ">ours", ">against", ">ratio", ">target", "", title=f"\n{model}")
    for r in results:
        mark = "[green]reached[/]" if r.reached else "[bold red]missed[/]"
        rows.add_row(
            r.ratio.name,
            f"{r.over:,.1f}",
            f"{r.under:,.1f}",
            f"{r.value:.2f}",
            r.target,
            mark if r.target != "-" else "",
        )
    return rows


def _upload(
    base_url: str, model_dir: Path | None, count: int, ranks: str, api_key: str | None
) -> list[str]:
    from loraplex.platform.bench.upload import UploadError, upload_random

    if model_dir is None:
        raise UsageError("--upload needs --model-dir, to make adapters that fit")
    try:
        sizes = [int(rank) for rank in ranks.split(",")]
        return upload_random(base_url, model_dir, count, sizes, api_key)
    except UploadError as error:
        raise CliError(str(error)) from error
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot make adapters for {model_dir}: {error!r}") from error


def _punica(
    popularity: str, count: int, adapters: int, prompt: tuple[int, int], answer: tuple[int, int]
) -> list[PlannedRequest]:
    from loraplex.platform.bench import workload

    if prompt[1] != prompt[0] + 1 or answer[1] != answer[0] + 1:
        raise UsageError("lengths LOW:HIGH need --trace slora; give one number")
    return workload.punica(popularity, count, adapters, prompt[0], answer[0])


def _range(flag: str, text: str) -> tuple[int, int]:
    """`128` is [128, 129), `8:512` is [8, 512)."""
    low, _, high = text.partition(":")
    try:
        first = int(low)
        bounds = (first, int(high) if high else first + 1)
    except ValueError:
        raise UsageError(f"{flag} {text}: must be a number or LOW:HIGH") from None
    if not 0 < bounds[0] < bounds[1]:
        raise UsageError(f"{flag} {text}: must be positive, and LOW below HIGH")
    return bounds


def _warm(
    generator: Any, plan: list[PlannedRequest], vocab_size: int, count: int, seed: int
) -> None:
    from loraplex.platform.bench import workload
    from loraplex.platform.bench.loadgen import drive

    first = [workload.PlannedRequest(p.adapter, p.prompt_len, 2) for p in plan[:count]]
    if first:
        drive(generator.run(first, workload.prompts(first, vocab_size, seed + 1)))


def _with_progress(generator: Any, plan: Any, prompts: Any, *, show: bool) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from loraplex.platform.bench.loadgen import drive

    # Few redraws: the bar would otherwise compete with the server for the processor.
    console = output.stderr()
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not (show and console.is_terminal),
    )
    with progress:
        task = progress.add_task("requests", total=len(plan))
        return drive(generator.run(plan, prompts, lambda record: progress.advance(task)))


def _status(text: str, *, show: bool) -> Any:
    return output.stderr().status(text) if show else nullcontext()
