"""`embedyard embed`: embeds files, in this process or by a running server."""

import asyncio
import logging
import shlex
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import structlog
from msgspec import structs

from engines.errors import InvalidValue, ModelNotFound
from router.backends.worker_config import memory_rules
from router.cli.completion import model_names
from router.config.setting_values import is_loopback
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.opening import choose_models, existing_folder, open_registry
from router.registry.registry import RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from router.bulk.job import BulkJob, Embedder, Observer, WindowRunner
    from router.bulk.journal import JobState

EXIT_REFUSED = 1
EXIT_INVALID = 2
EXIT_STOPPED = 3
EXIT_INTERRUPTED = 130
"""Exit codes: some texts were refused; the command or a file must be corrected; stopped before the end; by Ctrl+C."""

_LINE_BEGIN = "\r\x1b[K"
_OUTPUTS = ("dense", "sparse", "multi_vector")


def _outputs(_ctx: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in _OUTPUTS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(_OUTPUTS)}")
    return names


@click.command(
    epilog="""
\b
Examples:
  embedyard embed all-MiniLM-L6-v2 texts.txt -o vectors.npy
  embedyard embed bge-m3 docs.jsonl -o docs.parquet --id-column id --keep title --keep text
  embedyard embed ./my-model a.csv b.csv -o out.jsonl --text-column body --dimensions 256
  zcat docs.jsonl.gz | embedyard embed bge-m3 - --format jsonl -o docs.parquet
  embedyard embed bge-m3 docs.parquet -o out.parquet --url http://gpu-box:6008 --api-key KEY
  embedyard embed bge-m3 docs.parquet -o out.parquet --ray head-node:6379
"""
)
@click.argument("model", shell_complete=model_names)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="OUT",
              help="Output: .jsonl, .parquet, .npy (ids in OUT.ids.jsonl) or .arrow.")  # fmt: skip
@click.option("--format", "input_format", type=click.Choice(["jsonl", "csv", "tsv", "parquet", "lines"]),
              help="Format of the input. Default: by the suffix.")  # fmt: skip
@click.option("--output-format", type=click.Choice(["jsonl", "npy", "parquet", "arrow"]),
              help="Format of OUT. Default: by its suffix.")  # fmt: skip
@click.option("--text-column", default="text", show_default=True, metavar="NAME", help="Column or JSON field to embed.")
@click.option("--id-column", metavar="NAME", help="Column of ids. Default: the number of the line.")
@click.option("--keep", multiple=True, metavar="NAME", help="Column to copy into OUT. Repeatable.")
@click.option("--output", "outputs", default="dense", show_default=True, callback=_outputs, metavar="KINDS",
              help="What to compute: dense, sparse, multi_vector, or several with commas.")  # fmt: skip
@click.option("--dimensions", type=click.IntRange(1), help="Truncate dense vectors to this width.")
@click.option("--dtype", type=click.Choice(["float", "int8", "uint8", "binary", "ubinary"]), default="float",
              show_default=True, help="Numbers of the vectors; int8, uint8: with the model's calibration.")  # fmt: skip
@click.option("--input-type", help="Prompt to prepend: query, document or another of the model's.")
@click.option("--prompt", help="Text to prepend verbatim.")
@click.option("--truncate", type=click.Choice(["end", "start", "error"]),
              help="What happens to too long texts; error refuses them. Default: the model's own.")  # fmt: skip
@click.option("--url", help="A running server to send the texts to, instead of loading the model here.")
@click.option("--api-key", metavar="KEY", help="Default: API_KEY from the settings, for servers on this machine.")
@click.option("--concurrency", type=click.IntRange(1, 256), default=4, show_default=True, metavar="N",
              help="Requests in flight, with --url.")  # fmt: skip
@click.option("--ray", "ray_address", metavar="ADDRESS|local",
              help="Ray cluster that computes, one actor a device; local starts one on this machine.")  # fmt: skip
@click.option("--window", type=click.IntRange(1, 65_536), default=2048, show_default=True, metavar="TEXTS",
              help="Texts that are sorted by length and kept together.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT, and what another job has left beside it.")
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
def command(**chosen: Any) -> None:
    """Embed the texts of FILEs (- is standard input) with MODEL, and write ids and vectors to OUT.

    MODEL is a name of the registry, a hub id or a folder; with --url, a name that the server knows. The vectors are
    those of the server. A job that was stopped, also by kill -9, goes on where it was when the same command is run
    again; OUT appears when all of it is there. Texts that cannot be embedded are listed in OUT.errors.jsonl.

    Exit code 0: all texts are embedded; 1: some were refused; 2: invalid command, file, model or settings, or OUT
    exists; 3: stopped before the end, and 130: stopped by Ctrl+C; the same command goes on.
    """
    from router.bulk.records import BulkError, BulkStopped

    try:
        job, runner, observer = _prepare(chosen)
        state = asyncio.run(_run(job, runner, observer))
    except (BulkError, SettingsError, RegistryError, ModelNotFound, InvalidValue) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    except BulkStopped as error:
        _end(f"stopped: {error}\n{_how_to_continue()}")
        raise SystemExit(EXIT_STOPPED) from None
    except OSError as error:
        _end(f"stopped: {error.strerror or error}\n{_how_to_continue()}")
        raise SystemExit(EXIT_STOPPED) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        _end(f"interrupted\n{_how_to_continue()}")
        raise SystemExit(EXIT_INTERRUPTED) from None
    from router.bulk.progress import describe_end

    _end(describe_end(job.out, state))
    if state.refused:
        raise SystemExit(EXIT_REFUSED)


def _how_to_continue() -> str:
    return f"what is done is kept; go on with: embedyard {shlex.join(_without_key(sys.argv[1:]))}"


def _without_key(arguments: list[str]) -> list[str]:
    """Return the arguments with the API key left out: the line may land in a log."""
    shown = [f"{text.partition('=')[0]}=KEY" if text.startswith("--api-key=") else text for text in arguments]
    return ["KEY" if index and shown[index - 1] == "--api-key" else text for index, text in enumerate(shown)]


def _prepare(chosen: dict[str, Any]) -> "tuple[BulkJob, WindowRunner, Observer]":
    from router.bulk.job import BulkJob
    from router.bulk.progress import LineProgress, Meter
    from router.bulk.records import EmbedOptions
    from router.bulk.sources import Columns, open_sources
    from router.bulk.writers import output_format

    options = EmbedOptions(
        outputs=chosen["outputs"],
        dimensions=chosen["dimensions"],
        dtype=chosen["dtype"],
        input_type=chosen["input_type"],
        prompt=chosen["prompt"],
        truncate=chosen["truncate"],
    )
    _check_combined(chosen)
    job = BulkJob(
        sources=open_sources(chosen["files"], chosen["input_format"]),
        columns=Columns(chosen["text_column"], chosen["id_column"], tuple(dict.fromkeys(chosen["keep"]))),
        options=options,
        out=chosen["out"],
        format=output_format(chosen["out"], chosen["output_format"]),
        overwrite=chosen["overwrite"],
        window_texts=chosen["window"],
    )
    registry_flag = chosen["registry"]
    settings = load_settings(flags={"REGISTRY": str(registry_flag)} if registry_flag else {})
    meter = Meter(job.sources)
    progress = (
        LineProgress(meter, _write_over, every_s=0.0) if sys.stderr.isatty() else LineProgress(meter, _write_line)
    )
    return job, _open_runner(job, chosen, settings), progress


def _check_combined(chosen: dict[str, Any]) -> None:
    """Check options that exclude each other.

    Raises:
        InvalidValue: naming them.
    """
    if chosen["prompt"] is not None and chosen["input_type"] is not None:
        raise InvalidValue("--prompt cannot be combined with --input-type")
    if chosen["ray_address"] and chosen["url"]:
        raise InvalidValue("--ray cannot be combined with --url: a server's own hosts compute what is sent to it")
    if chosen["ray_address"] and "-" in chosen["files"]:
        raise InvalidValue("standard input (-) cannot be read with --ray, where a task reads: name a file")


def _open_runner(job: "BulkJob", chosen: dict[str, Any], settings: Settings) -> "WindowRunner":
    from router.bulk.job import EmbedderRunner

    if chosen["url"]:
        from router.bulk.remote import RemoteEmbedder

        own = settings.api_key if is_loopback(urlsplit(chosen["url"]).hostname or "") else None
        key = chosen["api_key"] or own
        remote = RemoteEmbedder(chosen["url"], chosen["model"], job.options, key=key, concurrency=chosen["concurrency"])
        return EmbedderRunner(job, remote)
    from router.bulk.local import open_local

    registry = open_registry(settings)
    try:
        spec = registry.resolve(chosen["model"])
    except ModelNotFound:
        if "/" not in chosen["model"] and existing_folder(chosen["model"]) is None:
            raise
        spec = choose_models(registry, [chosen["model"]]).resolve(None)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    memory = memory_rules(settings, registry)
    if chosen["ray_address"]:
        return _open_cluster(job, chosen["ray_address"], settings, partial(open_local, memory=memory, spec=spec))
    return EmbedderRunner(job, open_local(settings, memory, spec, job.options))


def _open_cluster(
    job: "BulkJob", address: str, settings: Settings, open_with: "Callable[..., Embedder]"
) -> "WindowRunner":
    """Join the cluster; the actors open the model."""
    from router.bulk.ray_data import RayRunner, join_cluster, plan_devices  # late: Ray is optional

    join_cluster(address)
    plan = plan_devices(settings.device)
    there = structs.replace(settings, device=("cuda" if plan.gpus else "cpu",))  # the GPU that Ray shows to an actor
    open_embedder = partial(open_with, there, options=job.options, cores=plan.cpus)
    return RayRunner(job, open_embedder, plan, _write_line)


async def _run(job: "BulkJob", runner: "WindowRunner", observer: "Observer") -> "JobState":
    from router.bulk.job import run_job

    task = asyncio.current_task()
    assert task is not None
    with suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run_job(job, runner, observer)


def _end(text: str) -> None:
    """Write the last line in the place of the progress."""
    click.echo(f"{_LINE_BEGIN}{text}" if sys.stderr.isatty() else text, err=True)


def _write_line(line: str) -> None:
    click.echo(line, err=True)


def _write_over(line: str) -> None:
    """Write over the terminal's present line."""
    click.echo(f"{_LINE_BEGIN}{line}", err=True, nl=False)
