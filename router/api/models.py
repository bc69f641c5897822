"""`GET /v1/models`: the registered models in OpenAI's format, with additional fields."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, Literal

from litestar import Controller, Request, get
from litestar.di import NamedDependency
from msgspec import structs

from engines.space import Listed, list_output_spaces, list_spaces
from engines.spec import ModelSpec, Task
from engines.types import ModelInfo, ModelStatus, State
from router.api.openapi import BEARER, GUARDED, failures
from router.auth.guards import key_of, requires
from router.auth.model_access import may_use
from router.schemas.admin import Slot
from router.schemas.inference import OUTPUTS, Model, ModelList
from router.server.state import ServerState, state_of

_NEAREST_FIRST: tuple[State, ...] = (
    "ready", "waking", "warming", "parked", "loading", "waiting_space", "fetching", "draining", "parking", "unloading",
    "cold", "failed", "absent", "retired",
)  # fmt: skip


_XINFERENCE_TYPES: dict[Task | None, Literal["embedding", "rerank"]] = {
    "embed": "embedding", "rerank": "rerank", None: "embedding"
}  # fmt: skip
_XINFERENCE_ABILITIES = {"embedding": ("embed",), "rerank": ("rerank",)}


class ModelsController(Controller):
    """OpenAI's models API."""

    path = "/v1/models"
    tags = ("models",)
    guards = (requires("embed"),)
    security = BEARER

    @get(responses=failures(*GUARDED), summary="List the models")
    async def list_models(self, request: Request[Any, Any, Any]) -> ModelList:
        """Lists the models that the key may use, in memory or not."""
        return list_visible_models(request)

    @get(
        "/{model_id:str}", responses=failures(*GUARDED, "model_not_found", "model_not_allowed"), summary="Show a model"
    )
    async def retrieve_model(self, request: Request[Any, Any, Any], spec: NamedDependency[ModelSpec]) -> Model:
        """Shows a model by id or alias."""
        return describe_model(request, spec)


def list_visible_models(request: Request[Any, Any, Any]) -> ModelList:
    """Return the models that the key of the request may use."""
    server_state = state_of(request)
    found, specs = visible_slots(request).items(), server_state.registry.models
    return ModelList(
        data=[_model(server_state, specs[model_id], slots) for model_id, slots in found if model_id in specs]
    )


def describe_model(request: Request[Any, Any, Any], spec: ModelSpec) -> Model:
    """Return a model as `GET /v1/models` lists it."""
    server_state = state_of(request)
    return _model(server_state, spec, slots_by_model(server_state)[spec.model_id])


def visible_slots(request: Request[Any, Any, Any]) -> dict[str, list[Slot]]:
    """Return the slots of the models that the key of the request may use, as `slots_by_model` does."""
    server_state = state_of(request)
    key, registry = key_of(request), server_state.registry
    return {name: slots for name, slots in slots_by_model(server_state).items() if may_use(key, registry, name)}


def slots_by_model(server_state: ServerState) -> dict[str, list[Slot]]:
    """Return each model's slots on all hosts, the slot nearest to serving first.

    A model that no host reports gets one slot in the state `absent`.
    """
    found: dict[str, list[Slot]] = {model_id: [] for model_id in server_state.registry.models}
    for host in server_state.backend.snapshots():
        for status in host.models:
            spec = server_state.registry.models.get(status.model_id)
            found.setdefault(status.model_id, []).append(_slot(status, spec))
    for model_id, slots in found.items():
        if not slots:
            spec = server_state.registry.models[model_id]
            absent = ModelStatus(
                model_id=model_id,
                state="absent",
                host_id="",
                device=spec.device,
                source=spec.source,
                pinned=spec.pinned,
            )
            slots.append(_slot(absent, spec))
        slots.sort(key=lambda slot: _NEAREST_FIRST.index(slot.state))
    return found


def _slot(status: ModelStatus, spec: ModelSpec | None) -> Slot:
    task = status.info.task if status.info else spec.task if spec else None
    return Slot(
        id=status.model_id,
        task=task,
        description=spec.description if spec else "",
        license=spec.license if spec else "",
        space=_plain_space(status.info, spec) if status.info and spec else None,
        **structs.asdict(status),
    )


def _model(server_state: ServerState, spec: ModelSpec, slots: Sequence[Slot]) -> Model:
    nearest, info = slots[0], slots[0].info
    task = nearest.task
    return Model(
        id=spec.model_id,
        created=server_state.started_at_s,
        owned_by=_owner(spec.model_id),
        state=nearest.state,
        source=_public_source(spec.source),
        adapter=_public_source(spec.adapter) if spec.adapter else None,
        aliases=server_state.registry.aliases_of(spec.model_id),
        task=task,
        outputs=(info.outputs if info and task == "embed" else ()) or (OUTPUTS[task] if task else ()),
        model_type=(model_type := _XINFERENCE_TYPES.get(task)),
        model_ability=() if model_type is None else _XINFERENCE_ABILITIES[model_type],
        labels=info.labels if info else (),
        dimensions=(info.dimensions or None) if info else None,
        vocab_size=(info.vocab_size or None) if info else None,
        vector_width=(info.vector_width or None) if info else None,
        matryoshka=info.matryoshka if info else spec.matryoshka,
        max_tokens=info.max_tokens if info else spec.max_tokens,
        prompts=info.prompts if info else spec.prompts,
        dtype=info.dtype if info else spec.dtype,
        bytes_by_dtype=nearest.bytes_by_dtype,
        shares=nearest.shares,
        precision=info.precision if info else None,
        space=_spaces(info, spec) if info else None,
        output_spaces=_output_spaces(info, spec) if info else None,
        device=nearest.device,
        memory_bytes=sum(map(_device_bytes, slots)),
        revision=nearest.revision or spec.revision,
        trust_remote_code=spec.trust_remote_code,
    )


def _device_bytes(slot: Slot) -> int:
    """Returns what a model takes of all devices that it is split over."""
    if slot.shares:
        return sum(share.device_bytes for share in slot.shares)
    return slot.weight_bytes + slot.workspace_bytes


def _spaces(info: ModelInfo, spec: ModelSpec) -> dict[str, dict[str, str]] | None:
    if info.ingredients is None or not info.dimensions:
        return None
    return list_spaces(info.ingredients, _listed(info, spec))


def _output_spaces(info: ModelInfo, spec: ModelSpec) -> dict[str, dict[str, dict[str, str]]] | None:
    return None if info.ingredients is None else list_output_spaces(info.ingredients, _listed(info, spec))


def _listed(info: ModelInfo, spec: ModelSpec) -> Listed:
    return Listed(
        width=info.dimensions,
        prompts=info.prompts,
        matryoshka=info.matryoshka,
        is_normalized=spec.normalize,
        outputs=info.outputs,
        vector_width=info.vector_width,
        token_pooling=info.token_pooling,
    )


def _plain_space(info: ModelInfo, spec: ModelSpec) -> str | None:
    spaces = _spaces(info, spec)
    return spaces[""][str(info.dimensions)] if spaces else None


def _owner(model_id: str) -> str:
    organisation, slash, _ = model_id.partition("/")
    return organisation if slash else "embedyard"


def _public_source(source: str) -> str:
    """Return the source as clients may see it: a local folder by its name, never its path."""
    is_local = source.startswith(("/", ".", "~"))
    return f"local:{PurePath(source).name}" if is_local else source
