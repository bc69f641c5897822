"""Compares files of a model with the sha256 that the registry states, while the model is being built."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engines.errors import BrokenFiles
from engines.types import ModelFiles

_ADAPTER = "adapter/"


class Checksums:
    """Hashes files on a thread from construction on; hashlib releases the GIL, so loading goes on meanwhile.

    Args:
        folder: the model's folder.
        expected: sha256 in lower-case hex, by file name inside the folder.
        model_id: for messages.
        adapter: the folder of its adapter; names of files in it begin with `adapter/`.
    """

    def __init__(self, folder: Path, expected: Mapping[str, str], model_id: str, adapter: Path | None = None) -> None:
        self._expected = expected
        self._model_id = model_id
        self._found: dict[str, Future[str]] = {}
        if expected:
            thread = ThreadPoolExecutor(1, thread_name_prefix="checksum")
            self._found = {name: thread.submit(_sha256, _path(name, folder, adapter)) for name in expected}
            thread.shutdown(wait=False)

    def check(self) -> None:
        """Waits for the hashes.

        Raises:
            BrokenFiles: a file is missing, or is another one than the registry names.
        """
        for name, found in self._found.items():
            try:
                digest = found.result()
            except OSError as error:
                raise BrokenFiles(f"{name} of {self._model_id} cannot be read: {error.strerror}", file=name) from error
            if digest != self._expected[name]:
                raise BrokenFiles(
                    f"{name} of {self._model_id} is not the file that the registry names: its sha256 is {digest}, not "
                    f"{self._expected[name]}; fetch or install the model again, or correct `sha256` in the registry",
                    file=name,
                )


def _path(name: str, folder: Path, adapter: Path | None) -> Path:
    is_adapters = adapter is not None and name.startswith(_ADAPTER)
    return adapter / name.removeprefix(_ADAPTER) if adapter is not None and is_adapters else folder / name


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def last_written_s(files: ModelFiles) -> float:
    """Returns the latest mtime of files from a hub; 0 for a local folder, whose revision changes with its files."""
    stamped = (part for part in files.parts or (files,) if part.stamp)
    paths = (path for part in stamped for path in Path(part.path).rglob("*"))
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)
