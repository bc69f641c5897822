"""`embedyard spaces`: lists the spaces of a registry's or server's models; of two, says which indexes stay valid."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from engines.space import Ingredients
from engines.spec import ModelSpec
from router.cli.client import RemoteError, get
from router.cli.output import print_rows
from router.cli.space_comparison import Compared, ModelSide, Side, compare
from router.config.settings import Settings, SettingsError, load_settings
from router.registry.registry import RegistryError, read_registry
from router.schemas.admin import SlotList
from router.schemas.inference import ModelList

EXIT_CHANGED = 1
EXIT_INVALID = 2
"""Exit codes: an index of A is not valid with B, or it is not known; invalid registry, settings or address."""

COLUMNS = ("name", "output", "prompt", "dimensions", "space")
COMPARED_COLUMNS = ("name", "verdict", "why")

_NOT_LOADED = "not loaded since the server started; preload it"
_GPU_DRIVER = Path("/dev/nvidiactl")


@click.command(
    epilog="""
\b
Examples:
  embedyard spaces registry.yaml                        the spaces of its models, from the files on disk
  embedyard spaces http://127.0.0.1:6008                those of a server's models that are in memory
  embedyard spaces registry.yaml next.yaml              which indexes must be rebuilt for the next registry
  embedyard spaces http://old:6008 http://new:6008      the same of two servers
"""
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="[B]", required=False)
@click.option("--device", help="Of registries: `cpu` or `cuda`, which decides what `dtype: auto` means.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(a: str, b: str | None, *, device: str | None, as_json: bool) -> None:
    """List the embedding spaces of A, a registry or the URL of a server; with B, compare.

    Vectors may be compared where their spaces are equal. A registry's are computed from the files on disk, without
    loading models: the first time it hashes their weights, a second or so for each GB. A server's key is ADMIN_API_KEY
    or API_KEY.

    Exit code 0: listed, or every index of A stays valid with B; 1: some must be rebuilt, or cannot be compared; 2:
    invalid registry, settings or address.
    """
    try:
        settings = load_settings()
        sides = [_read(place, settings, device) for place in (a, b) if place is not None]
    except (RegistryError, SettingsError, RemoteError) as error:
        click.echo(str(error), err=True)
        raise SystemExit(EXIT_INVALID) from None
    if len(sides) == 1:
        _print_side(sides[0], as_json=as_json)
        return
    verdicts = compare(*sides)
    _print_verdicts(verdicts, as_json=as_json)
    if not all(each.is_good for each in verdicts):
        raise SystemExit(EXIT_CHANGED)


def _read(place: str, settings: Settings, device: str | None) -> Side:
    if place.startswith(("http://", "https://")):
        return _read_server(place, settings.admin_api_key or settings.api_key)
    return _read_registry(Path(place), settings, device)


def _read_server(url: str, key: str | None) -> Side:
    models = get(url, "/v1/models", ModelList, key).data
    try:
        slots = get(url, "/admin/models", SlotList, key).data
    except RemoteError:  # without a key for it, only that a space differs can be said, and in which part
        slots = []
    known: dict[str, Ingredients] = {
        slot.id: slot.info.ingredients for slot in slots if slot.info is not None and slot.info.ingredients is not None
    }
    return {
        model.id: ModelSide(
            spaces=model.space or {},
            output_spaces=model.output_spaces,
            ingredients=known.get(model.id),
            prompts=model.prompts,
            why_unknown="" if model.space or model.output_spaces else _NOT_LOADED,
        )
        for model in models
        if model.task in (None, "embed")
    }


def _read_registry(path: Path, settings: Settings, device: str | None) -> Side:
    from engines.disk_spaces import ContentDigests, spaces_on_disk  # late: these import huggingface_hub
    from engines.planner import ModelStore

    digests, store = ContentDigests(settings.state_dir), ModelStore()

    def side(spec: ModelSpec) -> ModelSide:
        found = spaces_on_disk(store, spec, device or _device(spec, settings), digests)
        return ModelSide(
            spaces=found.spaces,
            output_spaces=found.output_spaces,
            ingredients=found.ingredients,
            prompts=found.prompts,
            why_unknown=found.why_unknown,
        )

    try:
        specs = read_registry(path).models.values()
        return {spec.model_id: side(spec) for spec in specs if spec.task in (None, "embed")}
    finally:
        store.close()


def _device(spec: ModelSpec, settings: Settings) -> str:
    """Return the device that a model would run on here, without importing torch."""
    wanted = spec.device if spec.device != "auto" else settings.device[0]
    return ("cuda" if _GPU_DRIVER.exists() else "cpu") if wanted == "auto" else wanted


def _print_side(side: Side, *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(side), indent=2))
        return
    rows = [row for name, model in side.items() for row in _rows(name, model)]
    print_rows(COLUMNS, rows)


def _rows(name: str, model: ModelSide) -> Sequence[tuple[str, str, str, str, str]]:
    """Return a row for each space; not those of several outputs together, which are many."""
    rows = [(name, *row) for row in _dense_rows(model)] + [(name, *row) for row in _output_rows(model)]
    return rows or [(name, "", "", "", model.why_unknown)]


def _dense_rows(model: ModelSide) -> Iterator[tuple[str, str, str, str]]:
    for prompt, row in model.spaces.items():
        for width, space in row.items():
            yield "dense", prompt or "-", width, space


def _output_rows(model: ModelSide) -> Iterator[tuple[str, str, str, str]]:
    for output, prompts in (model.output_spaces or {}).items():
        for prompt, row in prompts.items():
            for side, space in row.items():
                if "+" not in output:
                    yield f"{output} of a {side}", prompt or "-", "-", space


def _print_verdicts(verdicts: Sequence[Compared], *, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(verdicts), indent=2))
        return
    print_rows(COMPARED_COLUMNS, [(each.model, each.verdict, "; ".join(each.why)) for each in verdicts])
