"""Reads the parts of models that may be split, and says to the loader where they go."""

import structlog
from msgspec import structs

from engines.pool.messages import StartLoad
from engines.pool.runtime import LoaderTask, Workers
from engines.pool.slot import NO_MEMORY, MemoryNeed
from engines.protocols import Engine, Loader, Placement, SplitLoader
from engines.spec import ModelSpec
from engines.types import ModelFiles

log = structlog.get_logger(__name__)


class PartsReader:
    """Reads the parts of models from their files, on the loader's thread. `hang_s`: when that counts as hanging."""

    def __init__(self, loader: Loader, workers: Workers, hang_s: float) -> None:
        self._loader = loader
        self._workers = workers
        self._hang_s = hang_s

    async def add(self, spec: ModelSpec, files: ModelFiles, need: MemoryNeed) -> MemoryNeed:
        """Returns the need of a model with its parts, where it may be split and can be."""
        if spec.offload != "allowed":
            return need
        loader = self._loader
        if not isinstance(loader, SplitLoader):
            return structs.replace(need, parts=None)
        task = LoaderTask(f"measuring the parts of model {spec.model_id!r}", self._hang_s)
        try:
            found = await self._workers.load(lambda: loader.parts(spec, files), task)
        except Exception as error:  # noqa: BLE001  # the load reports what is wrong with the files
            log.warning("model.parts_not_measured", model=spec.model_id, error=str(error))
            found = None
        if found is None:
            log.warning("model.not_splittable", model=spec.model_id)
            return structs.replace(need, parts=None)
        return structs.replace(need, parts=found.parts, workspace_bytes=found.workspace_bytes, workspace_known=True)


def load_engine(loader: Loader, spec: ModelSpec, files: ModelFiles, placement: Placement | None) -> Engine:
    """Loads a model, split where it has a placement."""
    if placement is None:
        return loader.load(spec, files)
    assert isinstance(loader, SplitLoader), "it has told the parts"
    return loader.load_split(spec, files, placement)


def placement_of(load: StartLoad) -> Placement | None:
    """Returns where a load puts the parts of a split model; None for others."""
    if load.split is None:
        return None
    shares = [share for share in load.split.shares if share.need != NO_MEMORY]
    return Placement(
        devices=load.devices,
        num_parts=tuple(share.num_parts for share in shares),
        num_host_parts=load.split.num_host_parts,
    )
