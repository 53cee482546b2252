"""The gateway's OpenAPI document: every route, body, answer, status and way to identify oneself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from tessera.serving.schemas import IGNORED, NEUTRAL, ChatRequest, CompletionRequest, EmbeddingRequest
from tessera.serving.upstreams.passing import PASSED

__all__ = ["describe"]

Json = dict[str, Any]
KINDS = {kind.route: kind for kind in (ChatRequest, CompletionRequest, EmbeddingRequest)}
ERRORS = {
    400: "The request is wrong; `param` names where.",
    401: "The API key is missing or unknown, and nothing else pays here.",
    402: "Pay, then ask again: the header `PAYMENT-REQUIRED` tells what.",
    403: "A policy said no.",
    404: "No such route or model.",
    405: "The route has other methods.",
    408: "The body did not arrive in time.",
    409: "Somebody was first; read again, then retry.",
    413: "The body is too large.",
    429: "Too many requests or tokens; wait as `Retry-After` says.",
    503: "Full, or the model is out of reach; wait as `Retry-After` says.",
    504: "No token in time.",
}


def describe(app: FastAPI, models: Sequence[str]) -> None:
    """Makes `/openapi.json` tell all of it; routes of other parts are told as FastAPI knows them.

    Args:
        models: the ids that requests may name.
    """

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for path, methods in document["paths"].items():
                if path in ROUTES:
                    for method, operation in methods.items():
                        methods[method] = operation | ROUTES[path]
            parts = document.setdefault("components", {})
            parts["schemas"] = parts.get("schemas", {}) | _requests(models) | ANSWERS
            parts["securitySchemes"] = parts.get("securitySchemes", {}) | SECURITY
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _requests(models: Sequence[str]) -> Json:
    """The request bodies as a model of ours takes them, with what is read and ignored."""
    _, made = models_json_schema(
        [(kind, "validation") for kind in KINDS.values()], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = made["$defs"]
    for kind in KINDS.values():
        properties = schemas[kind.__name__]["properties"]
        properties["model"]["enum"] = list(models)
        for name in IGNORED:
            properties.setdefault(name, {"description": "Read and ignored."})
        for name, values in NEUTRAL.items():
            told = {"description": "Changes nothing here.", "enum": [None, *values]}
            if name in PASSED:
                told["description"] = "An upstream takes more; a model of ours takes what asks for nothing."
            properties.setdefault(name, told)
    return schemas


def _object(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Json:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _json(schema: Json, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _responses(*good: tuple[int, Json], errors: tuple[int, ...]) -> Json:
    told = {str(status): response for status, response in good}
    return told | {str(status): _json(_ref("Error"), ERRORS[status]) for status in errors}


def _post(path: str, answer: str, stream: bool) -> Json:
    good = _json(_ref(answer), "The answer.")
    if stream:
        good["content"]["text/event-stream"] = {"schema": {"description": "Chunks, each the data of one event."}}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref(KINDS[path].__name__)}},
        },
        "responses": _responses((200, good), errors=tuple(ERRORS)),
        "security": [{}, {"api_key": []}, {"payment": []}],
    }


def _get(schema: Json, *errors: int) -> Json:
    return {"responses": _responses((200, _json(schema, "The answer.")), errors=(*errors, 405))}


TEXT = {"type": "string"}
WHOLE = {"type": "integer", "minimum": 0}
USAGE = _object({"prompt_tokens": WHOLE, "total_tokens": WHOLE}, {"completion_tokens": WHOLE})
CHOICE = {"index": WHOLE, "finish_reason": {"type": ["string", "null"]}}
TOLD = {"logprobs": {"type": ["object", "null"]}}
NAMED = {"id": TEXT, "object": TEXT, "created": WHOLE, "model": TEXT}
READY = _object({"ready": {"type": "boolean"}, "models": {"type": "object"}})
ANSWERS: Json = {
    "Error": _object({"error": _object({
        "message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
    })}),
    "Model": _object({"id": TEXT, "object": TEXT, "created": WHOLE, "owned_by": TEXT}, {"context_length": WHOLE}),
    "ModelList": _object({"object": TEXT, "data": _array(_ref("Model"))}),
    "ChatCompletion": _object(
        NAMED | {"choices": _array(_object({"message": {"type": "object"}, **CHOICE}, TOLD)), "usage": USAGE}
    ),
    "Completion": _object(NAMED | {"choices": _array(_object({"text": TEXT, **CHOICE}, TOLD)), "usage": USAGE}),
    "Embeddings": _object({"object": TEXT, "data": _array(_object({
        "object": TEXT, "index": WHOLE, "embedding": {"type": ["array", "string"], "items": {"type": "number"}},
    })), "model": TEXT, "usage": USAGE}),
}  # fmt: skip
SECURITY: Json = {
    "api_key": {"type": "http", "scheme": "bearer"},
    "payment": {"type": "apiKey", "in": "header", "name": "PAYMENT-SIGNATURE"},
}
METRICS = {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}
ROUTES: Mapping[str, Json] = {
    "/v1/chat/completions": _post("/v1/chat/completions", "ChatCompletion", stream=True),
    "/v1/completions": _post("/v1/completions", "Completion", stream=True),
    "/v1/embeddings": _post("/v1/embeddings", "Embeddings", stream=False),
    "/v1/models": _get(_ref("ModelList")),
    "/v1/models/{model}": _get(_ref("Model"), 404),
    "/healthz": _get(_object({"status": TEXT, "active": WHOLE, "capacity": WHOLE})),
    "/healthz/ready": {"responses": _responses(
        (200, _json(READY, "A request would be served.")), (503, _json(READY, "It would not.")), errors=(405,)
    )},
    "/metrics": {"responses": _responses((200, METRICS), errors=(405,))},
}  # fmt: skip
