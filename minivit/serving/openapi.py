"""The description of the interface as an OpenAPI document."""

from __future__ import annotations

from typing import Any

from ..inference.classifier import Classifier
from ..version import __version__
from .options import ServeOptions

Schema = dict[str, Any]

NUMBER: Schema = {"type": "number"}
FRACTION: Schema = {"type": "number", "minimum": 0, "maximum": 1}
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 1}


def describe(classifier: Classifier, options: ServeOptions) -> Schema:
    """The document for a server of this model."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"minivit: {classifier.model.name}", "version": __version__},
        "paths": {
            "/predict": {"post": _predict(options)},
            "/model": {"get": _get("What is served", _json(_reference("Model")))},
            "/healthz": {
                "get": _get("Whether images are answered", _json(_object({"status": {"enum": ["ok", "failed"]}})), {"503": "They are not"})
            },
            "/metrics": {"get": _get("Metrics in the text form of Prometheus", {"text/plain": {"schema": TEXT}})},
        },
        "components": {"schemas": _schemas(classifier)},
    }


def _predict(options: ServeOptions) -> Schema:
    file = {"type": "string", "format": "binary"}
    failures = {
        "400": "A parameter or the body is wrong, or no image was sent",
        "408": f"The body did not come within {options.timeout:g} seconds",
        "413": f"The body has more than {options.max_upload:g} MiB",
        "422": f"A file is no image that can be read, or has more than {options.max_pixels:,} pixels",
        "500": "The server failed",
    }
    busy = {
        "description": "The server is busy",
        "headers": {"Retry-After": {"description": "Seconds until another try makes sense", "schema": COUNT}},
        "content": _json(_reference("Error")),
    }
    return {
        "summary": "Label images",
        "operationId": "predict",
        "parameters": [
            _parameter("budget", NUMBER, "Of a calibrated cascade: largest mean cost of an image, in the unit of its calibration"),
            _parameter("attention", {"type": "boolean", "default": False}, "Whether to tell where the model looked"),
        ],
        "requestBody": {
            "required": True,
            "description": f"Image files as parts with any name, at most {options.max_queue}, or one file as the body itself",
            "content": {
                "multipart/form-data": {"schema": {"type": "object", "additionalProperties": {"type": "array", "items": file}}},
                "image/*": {"schema": file},
                "application/octet-stream": {"schema": file},
            },
        },
        "responses": {
            "200": {"description": "A prediction for each image, in their order", "content": _json(_reference("Answer"))},
            **{status: {"description": text, "content": _json(_reference("Error"))} for status, text in failures.items()},
            "503": busy,
        },
    }


def _schemas(classifier: Classifier) -> Schema:
    names = classifier.class_names
    prediction = {
        "name": {**TEXT, "description": "The name of the file; empty if it was the body"},
        "label": {**TEXT, "enum": list(dict.fromkeys(names))},
        "probability": FRACTION,
        "probabilities": _object({name: FRACTION for name in names}),
    }
    of_cascades = {"exit": {**COUNT, "maximum": classifier.num_exits}, "macs": {**NUMBER, "description": "Multiply-adds up to this exit"}}
    attention = {
        "picture": {**TEXT, "description": "What the model saw, as a PNG in a data: URL"},
        "maps": {
            "description": "Attention rollout, rows of patches; one for each branch of a CrossViT",
            "type": "array",
            "items": {"type": "array", "items": {"type": "array", "items": FRACTION}},
        },
    }
    required = list(prediction)
    if classifier.num_exits > 1:
        prediction |= of_cascades
        required += of_cascades
    prediction["attention"] = _object(attention)
    numbers = {"type": "array", "items": NUMBER}
    return {
        "Answer": _object({"predictions": {"type": "array", "items": _reference("Prediction")}, "milliseconds": NUMBER}),
        "Prediction": {"type": "object", "properties": prediction, "required": required},
        "Model": _object(
            {
                "model": TEXT,
                "classes": {"type": "array", "items": TEXT},
                "input": {**numbers, "description": "Channels, rows, columns"},
                "exits": COUNT,
                "budgets": numbers,
                "attention": {"type": "boolean"},
            }
        ),
        "Error": _object({"error": TEXT}),
    }


def _get(summary: str, content: Schema, failures: dict[str, str] | None = None) -> Schema:
    responses = {"200": {"description": summary, "content": content}}
    return {"summary": summary, "responses": responses | {status: {"description": text} for status, text in (failures or {}).items()}}


def _parameter(name: str, schema: Schema, text: str) -> Schema:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": text}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}
