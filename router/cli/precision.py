"""`embedyard precision`: measures what reduced dtypes of a model cost and gain on this machine."""

from collections.abc import Sequence
from pathlib import Path

import click
import msgspec

from engines.errors import BadModel, InvalidValue, ModelNotFound
from engines.precision import PrecisionStore, why_refused
from engines.spec import CalibrationTexts, ModelSpec, Precision
from router.cli.completion import model_names
from router.cli.output import print_rows
from router.cli.texts import read_texts
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.opening import choose_models, existing_folder, open_registry
from router.registry.registry import RegistryError

EXIT_FAILED = 1
EXIT_INVALID = 2
"""Exit codes: the model cannot be loaded; invalid command, text file, registry or settings."""

COLUMNS = ("dtype", "texts", "worst cosine", "median cosine", "recall@10", "speed", "memory", "verdict")


@click.command(
    epilog="""
\b
Examples:
  embedyard precision all-MiniLM-L6-v2                on built-in texts in many languages
  embedyard precision bge-m3 texts.txt --dtype int8   on texts of your own
  embedyard precision ./my-model                      a folder, or a hub id, that no registry names
"""
)
@click.argument("model", shell_complete=model_names)
@click.argument("texts", required=False, type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(["bfloat16", "int8", "int4"]),
    help="Default: those fast on this CPU.",
)
@click.option("--registry", type=click.Path(path_type=Path), help="Registry file, instead of REGISTRY.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(model: str, texts: Path | None, *, dtypes: tuple[str, ...], registry: Path | None, as_json: bool) -> None:
    """Compare reduced dtypes of MODEL with float32 on this machine's CPU, and keep the results in STATE_DIR.

    TEXTS has one text per line, at least a few dozen, similar to those that will be embedded; what is measured on them
    decides about `min_cosine`, and what is measured on the built-in texts is kept beside it. MODEL is a name of the
    registry, a hub id or a folder, and must be on disk (embedyard pull). A server reads the results at the next load of
    the model, and the int8 weights, which are kept too.

    Exit code 0: measured; 1: the model cannot be loaded; 2: invalid command, text file, registry or settings.
    """
    try:
        settings = load_settings(flags={"REGISTRY": str(registry)} if registry else {})
        spec = _spec(settings, model)
        lines = read_texts(texts) if texts else None
    except (SettingsError, RegistryError, ModelNotFound, InvalidValue, ValueError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    from engines.machine import measure_precisions  # late: torch takes seconds to import
    from engines.planner import ModelStore, fast_dtypes

    wanted = dtypes or fast_dtypes()
    if not wanted:
        click.echo("no reduced dtype is faster than float32 on this CPU; --dtype measures one anyway", err=True)
    models = ModelStore()
    try:
        files = models.locate(spec)
        if files is None:
            click.echo(f"{spec.model_id} is not on disk; run embedyard pull {model}", err=True)
            raise SystemExit(EXIT_FAILED)
        measured = list(measure_precisions(spec, files, wanted, lines, settings.state_dir))
        store = PrecisionStore(settings.state_dir)
        known = [store.get_on(kind, spec, files.revision, dtype, "cpu") for dtype in wanted for kind in _KINDS]
    except BadModel as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_FAILED) from None
    finally:
        models.close()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(measured), indent=2))
    else:
        _print([one for one in known if one is not None], spec.min_cosine)


def _spec(settings: Settings, model: str) -> ModelSpec:
    """Return a model of the registry, else a folder or hub id as `serve` takes it.

    Raises:
        ModelNotFound, RegistryError: it is none of these.
    """
    registry = open_registry(settings)
    try:
        return registry.resolve(model)
    except ModelNotFound:
        if "/" not in model and existing_folder(model) is None:
            raise
    return choose_models(registry, [model]).resolve(None)


_KINDS: tuple[CalibrationTexts, ...] = ("own", "built-in")
"""In the order in which they decide."""


def _print(known: Sequence[Precision], min_cosine: float | None) -> None:
    """Print what is known of each dtype, the texts that decide first."""
    decided: set[str] = set()
    rows = []
    for one in known:
        verdict = "your own texts decide" if one.dtype in decided else why_refused(one, min_cosine) or "allowed"
        decided.add(one.dtype)
        rows.append(_cells(one, verdict))
    print_rows(COLUMNS, rows)


def _cells(one: Precision, verdict: str) -> tuple[str, ...]:
    return (
        one.dtype,
        f"{one.texts} ({one.num_texts})",
        f"{one.worst_cosine:.5f}",
        f"{one.median_cosine:.5f}",
        f"{one.recall_at_10:.3f}",
        f"{one.speedup:.2f} ×",
        f"{one.size_ratio:.0%}",
        verdict,
    )
