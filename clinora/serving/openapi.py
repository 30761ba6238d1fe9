"""The OpenAPI document of the API: its routes, with every status that they answer.

It is written by hand, because FastAPI knows neither the answers of the middleware nor those of the
connection itself.
"""

from clinora.serving.activity import REQUEST_ID
from clinora.serving.api import MOST_CHARACTERS, MOST_NOTES, REQUEST_SECONDS
from clinora.serving.metrics import MEDIA_TYPE
from clinora.serving.server import MOST_BODY_BYTES

DESCRIPTION = (
    "Predicts the class of clinical notes. A demonstration, not a medical device.\n\n"
    "Every GET route also answers HEAD. A request may choose its id with the header "
    f"{REQUEST_ID}: 1 to 64 letters, digits and hyphens. The response has the same header, with "
    "this id or a new one."
)
EXAMPLE = {"note": "Severe chest pain. ECG shows ST elevation."}
CLOSED = "Without a body: there are too many connections, or the service is ending."

RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds to wait before the next request.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
WWW_AUTHENTICATE = {
    "WWW-Authenticate": {"description": "How to log in.", "schema": {"type": "string"}}
}


def build_document(model: dict, root: str, needs_password: bool) -> dict:
    """Build the OpenAPI 3.1 document of the API.

    Args:
        model: The JSON object of ``/v1/model``.
        root: Address or path of the page behind a proxy; "" without a sub-path.
        needs_password: Whether users have to log in.
    """
    paths = {
        "/v1/classify": {"post": _classify(model)},
        "/v1/model": {"get": _show_model()},
        "/metrics": {"get": _show_metrics()},
    }
    components = {"schemas": _schemas(model)}
    if needs_password:
        components["securitySchemes"] = {"password": {"type": "http", "scheme": "basic"}}
        for operations in paths.values():
            for operation in operations.values():
                _require_password(operation)
    paths["/health"] = {"get": _health()}
    paths["/ready"] = {"get": _ready()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Clinora", "version": model["version"], "description": DESCRIPTION},
        "servers": [{"url": root or "/"}],
        "paths": paths,
        "components": components,
    }


# --- the routes -----------------------------------------------------------------------------------


def _classify(model: dict) -> dict:
    responses = _common_responses()
    responses["200"] = _json(
        "The prediction of the note, or the results of several notes in their order.",
        {"anyOf": [*_predictions(model), _schema("Results")]},
    )
    responses["415"] = _json("The body is not announced as uncompressed application/json.")
    responses["422"] = _json(
        "The body is not what was expected, or its only note cannot be classified: it has nothing "
        f"visible, or more than {MOST_CHARACTERS:,} characters."
    )
    responses["429"] = _json("The user has sent too many notes in a minute.", headers=RETRY_AFTER)
    responses["503"] = _json(
        f"The queue is full, or there was no prediction within {REQUEST_SECONDS} s. {CLOSED}",
        headers=RETRY_AFTER,
    )
    return {
        "operationId": "classify",
        "summary": "Predict the class of one note or of several.",
        "requestBody": {
            "required": True,
            "description": "JSON in UTF-8. No object may have the same key twice.",
            "content": {"application/json": {"schema": _schema("Request"), "example": EXAMPLE}},
        },
        "responses": dict(sorted(responses.items())),
    }


def _show_model() -> dict:
    ok = _json("The model and the limits.", _schema("Model"))
    return {
        "operationId": "show_model",
        "summary": "Describe the model and the limits of the API.",
        "responses": {"200": ok, **_common_responses()},
    }


def _show_metrics() -> dict:
    ok = {
        "description": "The metrics in Prometheus's text format.",
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}}},
    }
    return {
        "operationId": "show_metrics",
        "summary": "Give the metrics of the service, for Prometheus.",
        "responses": {"200": ok, **_common_responses()},
    }


def _health() -> dict:
    return {
        "operationId": "health",
        "summary": "Say that the service is alive.",
        "responses": {"200": _json("It is alive.", _status("ok")), **_common_responses()},
    }


def _ready() -> dict:
    responses = {"200": _json("It has room.", _status("ready")), **_common_responses()}
    responses["503"] = _json(f"The queue is full. {CLOSED}", _status("busy"), RETRY_AFTER)
    return {
        "operationId": "ready",
        "summary": "Say whether the queue has room for a note.",
        "responses": responses,
    }


def _common_responses() -> dict:
    """Return the responses that every route has, from the middleware or the connection."""
    return {
        "400": {
            "description": "The Host header has no accepted name. Without a body: not HTTP.",
            "content": {"text/plain; charset=utf-8": {"schema": {"type": "string"}}},
        },
        "403": _json("The request comes from a page of another site."),
        "408": {"description": "The request took too long to arrive. There is no body."},
        "413": _json(f"The body has more than {MOST_BODY_BYTES:,} bytes."),
        "500": _json("An unexpected error; the detail has a reference to the service's log."),
        "503": {"description": CLOSED},
    }


def _require_password(operation: dict) -> None:
    responses = operation["responses"]
    responses["401"] = _json("A name and a password are required.", headers=WWW_AUTHENTICATE)
    attempts = "There are too many attempts to log in."
    limit = responses.get("429", {"description": ""})["description"]
    responses["429"] = _json(f"{limit} {attempts}".strip(), headers=RETRY_AFTER)
    operation["responses"] = dict(sorted(responses.items()))
    operation["security"] = [{"password": []}]


# --- schemas --------------------------------------------------------------------------------------


def _json(description: str, schema: dict | None = None, headers: dict | None = None) -> dict:
    response = {
        "description": description,
        "content": {"application/json": {"schema": schema or _schema("Detail")}},
    }
    if headers is not None:
        response["headers"] = headers
    return response


def _schema(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def _status(word: str) -> dict:
    return _object({"status": {"const": word}})


def _object(properties: dict) -> dict:
    """Return the schema of an object that has exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _predictions(model: dict) -> list[dict]:
    """Return the schemas of a prediction: of the run, and of each adapter."""
    return [_schema("Prediction"), *(_schema(f"Prediction-{name}") for name in model["adapters"])]


def _schemas(model: dict) -> dict:
    result = {"anyOf": [*_predictions(model), _schema("NoteError")]}
    results = {"type": "array", "items": result, "minItems": 1, "maxItems": MOST_NOTES}
    schemas = {"Request": _request(model), "Prediction": _prediction(model)}
    for name, adapter in model["adapters"].items():
        schemas[f"Prediction-{name}"] = _prediction(adapter)
    return schemas | {
        "Results": _object({"results": results}),
        "NoteError": _object({"error": {"type": "string"}}),
        "Model": _model_schema(),
        "Detail": _object({"detail": {"type": "string"}}),
    }


def _request(model: dict) -> dict:
    note = {"type": "string", "minLength": 1, "maxLength": MOST_CHARACTERS}
    notes = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_NOTES}
    one = _object({"note": note}) | {"title": "One note"}
    many = _object({"notes": notes}) | {"title": "Several notes"}
    # These may be null, or left out.
    one["properties"]["notes"] = {"type": "null"}
    many["properties"]["note"] = {"type": "null"}
    for body in (one, many):
        body["properties"]["adapter"] = {"enum": [None, *model["adapters"]]}
    return {"oneOf": [one, many]}


def _prediction(classifier: dict) -> dict:
    """Return the schema of a prediction of a run or an adapter, as ``/v1/model`` describes it."""
    labels = classifier["labels"]
    probability = {"type": "number", "minimum": 0, "maximum": 1}
    confidence = probability | {
        "description": "Calibrated probability that the predicted class is right."
    }
    refer = {"type": "boolean", "description": "Whether to refer the note to a person."}
    unlike = {
        "type": "boolean",
        "description": "Whether the text is unlike the notes that the run was trained on. Such a "
        "note is referred to a person.",
    }
    if not classifier["detects_out_of_distribution"]:
        unlike = {"type": "null", "description": "The run does not recognise such texts."}
    if not classifier["calibrated"]:
        confidence = {"type": "null", "description": "The run was not calibrated."}
        refer = confidence
        if classifier["detects_out_of_distribution"]:
            refer = {"enum": [None, True], "description": "True for a text unlike the run's notes."}
    return _object(
        {
            "predicted_class": {"type": "integer", "minimum": 0, "maximum": len(labels) - 1},
            "label": {"enum": labels},
            "confidence": confidence,
            "refer": refer,
            "probabilities": _object(dict.fromkeys(labels, probability)),
            "tokens": {"type": "integer", "minimum": 1, "description": "Tokens of the note."},
            "tokens_exact": {
                "type": "boolean",
                "description": "If false, the note has tokens or more, and its end was not read.",
            },
            "tokens_read": {
                "type": "integer",
                "minimum": 1,
                "maximum": classifier["token_limit"],
                "description": "Tokens that the model has read.",
            },
            "out_of_distribution": unlike,
        }
    )


def _model_schema() -> dict:
    name = {"type": "string"}
    count = {"type": "integer", "minimum": 1}
    labels = {"type": "array", "items": name, "minItems": 1}
    classifier = {
        "labels": labels | {"description": "Names of the classes, by index."},
        "token_limit": count | {"description": "Tokens of a note that are read."},
        "calibrated": {"type": "boolean"},
        "detects_out_of_distribution": {
            "type": "boolean",
            "description": "Whether the run recognises texts unlike those that it was trained on.",
        },
    }
    limits = ("notes_in_request", "characters_in_note", "bytes_in_request", "notes_per_minute")
    return _object(
        {
            "run": name | {"description": "Name of the run's folder."},
            "base": name | {"description": "Name of the base model."},
            **classifier,
            "adapters": {
                "type": "object",
                "additionalProperties": _object(classifier),
                "description": "The other runs that a request can choose, by name.",
            },
            "limits": _object(dict.fromkeys(limits, count)),
            "version": name | {"description": "Version of Clinora."},
        }
    )
