"""Reads a model from a folder on this machine or inside an installed Python package. Does not use the network.

The files belong to the operator: they are checked, never changed. Messages name files inside the folder, never its
path.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

from engines.errors import BrokenFiles, SourceNotFound
from engines.hub.file_selection import Selection, is_safe, select
from engines.hub.weight_files import WeightCount, count_weights, read_header, read_range
from engines.spec import ModelSpec, parts_of
from engines.types import ModelFiles, fingerprint

PACKAGE = "package:"
_FOLDER_STARTS = ("/", "./", "../", "~")


def is_local(source: str) -> bool:
    """Returns whether a registry's `source` is a folder or a package rather than a hub id."""
    return source.startswith((*_FOLDER_STARTS, PACKAGE)) or source in {".", ".."}


def is_on_disk(spec: ModelSpec) -> bool:
    """Returns whether no file of a model, or of its adapter, comes from a hub."""
    return all(is_local(part.source) for part in parts_of(spec))


def is_writable_in_place(source: str) -> bool:
    """Returns whether the files may be overwritten in use; those of a package are replaced, never changed in place."""
    return is_local(source) and not source.startswith(PACKAGE)


class LocalFolder:
    """The model in a folder, read once; create a new object to read the folder again.

    Raises:
        SourceNotFound: (on use) the folder or package does not exist.
        BrokenFiles: (on use) a file is missing, truncated or corrupt.
    """

    def __init__(self, source: str, model_id: str, *, with_code: bool) -> None:
        self._source = source
        self._model_id = model_id
        self._with_code = with_code

    def files(self) -> ModelFiles:
        """Returns the files after checking their headers. The revision changes when a file of the model changes."""
        with self._translate_read_errors():
            stats = {name: (self._root / name).stat() for name in self._selection.files}
            for name in self._selection.weights:
                if name.endswith(".safetensors"):
                    read_header(name, stats[name].st_size, partial(read_range, self._root))
        return ModelFiles(
            path=str(self._root),
            revision=fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]),
            size_bytes=sum(stat.st_size for stat in stats.values()),
        )

    def count_weights(self) -> WeightCount:
        """Counts the weights from the headers of the files."""
        with self._translate_read_errors():
            return count_weights(self._sizes, self._selection.weights, partial(read_range, self._root))

    @contextmanager
    def _translate_read_errors(self) -> Iterator[None]:
        """Raises `BrokenFiles`, naming the file, for an `OSError`."""
        try:
            yield
        except OSError as error:
            file = Path(error.filename).name if error.filename else None
            message = f"{file or 'a file'} of {self._model_id} cannot be read: {error.strerror}"
            raise BrokenFiles(message, file=file) from error

    @cached_property
    def _root(self) -> Path:
        root = self._package_folder() if self._source.startswith(PACKAGE) else Path(self._source).expanduser()
        if not root.is_dir():
            raise SourceNotFound(
                f"the folder in 'source' of {self._model_id} does not exist: correct it in the registry"
            )
        return root.absolute()

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Sizes of the files in the folder and in its direct subfolders, where modules are."""
        paths = (path for pattern in ("*", "*/*") for path in self._root.glob(pattern) if path.is_file())
        return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in paths}

    @cached_property
    def _selection(self) -> Selection:
        return select(
            self._sizes, lambda name: (self._root / name).read_bytes(), source=f"of {self._model_id}",
            with_code=self._with_code,
        )  # fmt: skip

    def _package_folder(self) -> Path:
        """Returns the folder of the package without importing it, so that none of its code runs."""
        name, _, folder = self._source.removeprefix(PACKAGE).partition("/")
        spec = find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise SourceNotFound(
                f"'source' of {self._model_id} names the Python package {name!r}, which is not installed: install it, "
                "or correct 'source' in the registry"
            )
        if folder and not is_safe(folder):
            raise SourceNotFound(
                f"'source' of {self._model_id} points outside the package {name!r}: correct it in the registry"
            )
        return Path(next(iter(spec.submodule_search_locations)), folder)
