"""Lets one load read its model's quantised form from disk, or keep it there once the model has passed its check."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import structlog

from engines.errors import BadModel, OutOfMemory, is_device_error, is_out_of_memory
from engines.form_cache import FormCache
from engines.loading.form_files import FormReader, FormSource, FormUnusable, FormWriter
from engines.space import Ingredients
from engines.spec import ModelSpec
from engines.types import fingerprint

log = structlog.get_logger(__name__)

Built = TypeVar("Built")


class FormLoad:
    """One load of a model whose form may be kept.

    Args:
        forms: where; None keeps nothing.
        spec: the model, in the dtype of the load.
        revision: of its files.
        read: hashes everything that decides the model's vectors; blocks.
    """

    def __init__(
        self, forms: FormCache | None, spec: ModelSpec, revision: str, read: Callable[[], Ingredients] | None = None
    ) -> None:
        self._forms = FormCache(None) if forms is None or read is None else forms
        self._spec, self._read_ingredients = spec, read
        self._path = self._forms.path(spec)
        self._identity = self._forms.identity(spec, revision)
        self._writer: FormWriter | None = None
        self.is_read = False

    def build(self, build: Callable[[FormSource], Built]) -> Built:
        """Builds a model from what is kept; where nothing is that fits, from its own files.

        Args:
            build: builds the model; it is called again where the first call fails on what is kept.
        """
        if self._path is None:
            return build(FormSource())
        if self._path.exists():
            try:
                return self._build_from(self._path, build)
            except Exception as error:
                if is_device_error(error) or is_out_of_memory(error) or isinstance(error, OutOfMemory):
                    raise
                reason = str(error) if isinstance(error, FormUnusable) else type(error).__name__
                log.warning("form.ignored", model=self._spec.model_id, file=self._path.name, reason=reason)
        self._writer = FormWriter(self._path)
        return build(self._writer)

    def _build_from(self, path: Path, build: Callable[[FormSource], Built]) -> Built:
        with FormReader(path, self._identity, self._content) as reader:
            built = build(reader)
            reader.check_all_taken()
        self.is_read = True
        self._forms.mark_used(path)
        return built

    @contextmanager
    def accepting(self, *, waits: bool = False) -> Iterator[None]:
        """Checks the model in the block. Where that ends, keeps what was written, on a thread; where it raises, keeps
        nothing, and removes what was read.

        Args:
            waits: for the thread.
        """
        writer, self._writer = self._writer, None
        try:
            yield
        except BaseException as error:
            if self.is_read and isinstance(error, BadModel):
                self._forms.remove(self._spec)
            if writer is not None:
                writer.close()
            raise
        if writer is not None:
            name = f"form-{self._spec.model_id}"
            keeping = threading.Thread(target=self._keep, args=(writer,), name=name, daemon=True)
            keeping.start()
            if waits:
                keeping.join()

    def _keep(self, writer: FormWriter) -> None:
        assert self._path is not None, "it is written there"
        try:
            content = self._content()
            if not self._forms.make_room(writer.size_bytes, keep=self._path):
                log.info("form.not_kept", file=self._path.name, reason="the disk has too little room")
            elif writer.commit(self._identity, content):
                log.info("form.kept", model=self._spec.model_id, file=self._path.name, bytes=writer.size_bytes)
        except Exception as error:  # noqa: BLE001  # the model serves anyway
            log.warning("form.not_kept", file=self._path.name, reason=str(error) or type(error).__name__)
        finally:
            writer.close()

    def _content(self) -> str:
        assert self._read_ingredients is not None, "it has a path"
        return fingerprint(sorted(self._read_ingredients().values.items()))
