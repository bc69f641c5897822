"""Tests what all inference routes share."""

from litestar.handlers import HTTPRouteHandler

from router.api.decoding import StrictRequest
from router.api.inference import InferenceRoute, format_indexes
from router.app import create_app
from router.config.settings import Settings
from router.limits.limiter import acquire_permit
from tests.testkit.backends import ScriptedBackend
from tests.testkit.servers import REGISTRY

INFERENCE_PATHS = {
    "/v1/embeddings", "/m/{model_id}/v1/embeddings", "/embeddings", "/openai/deployments/{model_id}/embeddings",
    "/", "/embed", "/embed_sparse", "/embed_all", "/tokenize", "/v1/embed", "/v2/embed", "/api/embed",
    "/api/embeddings", "/v1/contextualizedembeddings",
    "/v1/rerank", "/v2/rerank", "/rerank", "/infinity/rerank", "/v1/score", "/score", "/v1/classify", "/classify",
    "/predict",
}  # fmt: skip


def inference_routes() -> dict[str, HTTPRouteHandler]:
    app = create_app(Settings(), REGISTRY, ScriptedBackend("mini"))
    handlers = [
        (route.path_format, handler) for route in app.routes for handler in getattr(route, "route_handlers", ())
    ]
    return {path: handler for path, handler in handlers if isinstance(handler, InferenceRoute)}


def test_every_api_that_runs_a_model_has_an_inference_route() -> None:
    assert inference_routes().keys() == INFERENCE_PATHS


def test_an_inference_route_checks_the_key_once_and_then_takes_a_permit() -> None:
    for handler in inference_routes().values():
        guards = handler.resolve_guards()

        assert len(guards) == 2
        assert guards[1] is acquire_permit


def test_an_inference_route_decodes_strictly_and_answers_with_200() -> None:
    for handler in inference_routes().values():
        assert handler.resolve_request_class() is StrictRequest
        assert handler.status_code == 200


def test_truncated_inputs_are_listed_with_ranges_and_never_in_more_than_fits_a_header() -> None:
    assert format_indexes((0, 3, *range(7, 20))) == "0,3,7-19"
    assert format_indexes((1, 2, 2047)) == "1-2,2047"
    assert format_indexes(range(2048)) == "0-2047"
    assert format_indexes((0, 2, 4, 6), max_chars=6) == "0,..."
    assert len(format_indexes(range(0, 2048, 2))) <= 4096
