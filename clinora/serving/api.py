"""The HTTP API: health checks, and the predicted classes of one or several notes as JSON.

    POST /v1/classify  {"note": "…"}           → {"predicted_class": 0, "label": "…", …}
    POST /v1/classify  {"notes": ["…", "…"]}   → {"results": [{…}, {"error": "…"}]}
    GET /v1/model                              → {"run": "…", "labels": ["…", …], …}

Where several adapters are served, ``"adapter": "NAME"`` in the body chooses one of them.

An error response never repeats the request body, since that may contain a note.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

import clinora
from clinora.classifier import Classifier, Prediction
from clinora.notes import clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.activity import ACTIVITY, CLIENT_CLOSED
from clinora.serving.batcher import Batcher, BusyError
from clinora.serving.metrics import MEDIA_TYPE, Metrics
from clinora.serving.proxy import network_of
from clinora.serving.rate_limit import RateLimitError
from clinora.serving.server import MOST_BODY_BYTES

MOST_NOTES = 32  # in a request
MOST_CHARACTERS = 100_000  # in a note
REQUEST_SECONDS = 30  # after this time, the response says that the service is busy
RETRY_AFTER = {"Retry-After": "1"}  # seconds
EXPECTED = f'expected {{"note": "text"}} or {{"notes": ["text", …]}} with 1 to {MOST_NOTES} notes'


class RequestBody(BaseModel):
    """The body of a classification request: one note or several, and which adapter reads them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    note: str | None = None
    notes: list[str] | None = Field(None, min_length=1, max_length=MOST_NOTES)
    adapter: str | None = None  # its name; None: that of ``--run``


class DuplicateKeyError(ValueError):
    """A JSON object has the same key twice, so it is not clear which value is meant."""


def read_body(headers: Headers, content: bytes) -> RequestBody:
    """Parse and check the body of a classification request.

    Raises:
        HTTPException: 415 or 422; the body does not have the expected form. The detail says what
            is wrong and what was expected. It quotes nothing from the body.
    """
    check_headers(headers)
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique)
        body = RequestBody.model_validate(value)
    except UnicodeDecodeError:
        wrong = "The body is not UTF-8"
    except RecursionError:
        wrong = "The JSON is nested too deeply"
    except DuplicateKeyError:
        wrong = "The JSON has a duplicate key"
    except ValidationError:
        wrong = "The JSON has a wrong key, type or number of notes"
    except ValueError:
        wrong = "The body is not JSON"
    else:
        has_note = body.note is not None
        has_notes = body.notes is not None
        if has_note != has_notes:
            return body
        wrong = "The JSON does not have exactly one of note and notes"
    raise HTTPException(422, f"{wrong}; {EXPECTED}")


def check_headers(headers: Headers) -> None:
    """Check what the headers of a classification request say about its body.

    Raises:
        HTTPException: 415; the headers do not announce plain JSON.
    """
    content_type = headers.get("Content-Type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    coding = headers.get("Content-Encoding", "").strip().lower()
    if not media_type:
        wrong = "The Content-Type header is missing; send Content-Type: application/json"
    elif media_type != "application/json":
        wrong = "The Content-Type is not application/json"
    elif coding not in ("", "identity"):
        wrong = "The body has a Content-Encoding; send it uncompressed"
    else:
        return
    raise HTTPException(415, f"{wrong}; {EXPECTED}")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DuplicateKeyError
    return values


def note_error(note: str) -> str | None:
    """Return the reason why a note cannot be classified, or None if it can."""
    if not has_visible(note):
        return "The note is empty."
    if len(note) > MOST_CHARACTERS:
        return f"The note has {len(note):,} characters, more than {MOST_CHARACTERS:,}."
    return None


def describe(prediction: Prediction, classifier: Classifier) -> dict:
    """Convert a prediction to a JSON object; the keys of the published form come first."""
    return prediction.as_json() | {
        "confidence": prediction.confidence,
        "refer": prediction.refer,
        "out_of_distribution": prediction.out_of_distribution,
        "probabilities": dict(zip(classifier.labels, prediction.probabilities, strict=True)),
        "tokens": prediction.tokens,
        "tokens_exact": not prediction.truncated,  # if false, the note has at least ``tokens``
        "tokens_read": min(prediction.tokens, classifier.token_limit),
    }


def describe_model(
    classifier: Classifier, run: str, adapters: Mapping[str, Classifier], notes_per_minute: int
) -> dict:
    """Return the JSON object of ``/v1/model``.

    Args:
        classifier: The run's classifier.
        run: Name of the run.
        adapters: The classifiers that a request can choose by name.
        notes_per_minute: How many notes a user may send.
    """
    base = classifier.model.source.name
    if Path(base).is_absolute():
        base = Path(base).name  # the path of a folder says more than a user has to know
    return {
        "run": run,
        "base": base,
        **_describe_classifier(classifier),
        "adapters": {name: _describe_classifier(other) for name, other in adapters.items()},
        "limits": {
            "notes_in_request": MOST_NOTES,
            "characters_in_note": MOST_CHARACTERS,
            "bytes_in_request": MOST_BODY_BYTES,
            "notes_per_minute": notes_per_minute,
        },
        "version": clinora.__version__,
    }


def _describe_classifier(classifier: Classifier) -> dict:
    return {
        "labels": list(classifier.labels),
        "token_limit": classifier.token_limit,
        "calibrated": classifier.calibration is not None,
        "detects_out_of_distribution": classifier.outliers is not None,
    }


def add_routes(
    app: FastAPI,
    batcher: Batcher,
    adapters: Mapping[str, Classifier],
    metrics: Metrics,
    model: dict,
) -> None:
    """Add the routes of the API to an app; ``serving/openapi.py`` describes them.

    Args:
        app: The app that is served.
        batcher: Runs the model for all clients.
        adapters: The classifiers that a request can choose by name, besides the batcher's own.
        metrics: The metrics of ``/metrics``.
        model: The JSON object that ``describe_model`` returned.
    """

    async def health(_request: Request) -> JSONResponse:  # also answers while the model is busy
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> JSONResponse:
        if batcher.ready(network_of(request.client)):
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503, RETRY_AFTER)

    async def classify(request: Request) -> JSONResponse:
        body = read_body(request.headers, await request.body())
        if body.adapter is None:
            classifier = batcher.classifier
        elif body.adapter in adapters:
            classifier = adapters[body.adapter]
        else:
            names = ", ".join(adapters) or "none: leave the key out"
            raise HTTPException(422, f"There is no adapter of this name; expected one of: {names}")
        activity = request.scope[ACTIVITY]
        activity.adapter = body.adapter
        texts = [body.note] if body.notes is None else body.notes
        notes = [clean_text(text) for text in texts]
        errors = [note_error(note) for note in notes]
        accepted = [note for note, error in zip(notes, errors, strict=True) if error is None]
        try:
            activity.admit(len(notes))
            futures = batcher.submit(
                accepted, client=network_of(request.client), classifier=classifier
            )
            answers = iter(await _wait(futures, request))
        except (BusyError, TimeoutError):
            return JSONResponse({"detail": "The service is busy: try again."}, 503, RETRY_AFTER)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED)  # nobody receives it
        except RateLimitError as error:
            retry_after = {"Retry-After": str(error.seconds)}
            return JSONResponse({"detail": str(error)}, 429, retry_after)
        results = []
        for error in errors:
            if error is not None:
                results.append({"error": error})
            else:
                answer = next(answers)
                if isinstance(answer, Prediction):
                    activity.add(answer)
                results.append(_result(answer, classifier))
        if body.notes is not None:
            return JSONResponse({"results": results})
        result = results[0]
        if "error" not in result:
            return JSONResponse(result)
        status = 500 if errors[0] is None else 422
        return JSONResponse({"detail": result["error"]}, status)

    async def show_model(_request: Request) -> JSONResponse:
        return JSONResponse(model)

    async def show_metrics(_request: Request) -> Response:
        return Response(metrics.text(), media_type=MEDIA_TYPE)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/ready", ready, methods=["GET"])
    app.add_route("/v1/classify", classify, methods=["POST"])
    app.add_route("/v1/model", show_model, methods=["GET"])
    app.add_route("/metrics", show_metrics, methods=["GET"])

    @app.exception_handler(405)
    async def wrong_method(_request: Request, error: HTTPException) -> JSONResponse:
        allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))  # Starlette's order varies
        detail = {"detail": f"Expected the method {allowed}."}
        return JSONResponse(detail, 405, {"Allow": allowed})


async def _wait(futures: Sequence[Future], request: Request) -> list[Prediction | BaseException]:
    """Wait for the predictions of a request, or for the errors in their place.

    After a timeout or a disconnect, notes that the model has not started on are cancelled.

    Raises:
        ClientDisconnect: The client has disconnected.
        TimeoutError: ``REQUEST_SECONDS`` have passed.
    """
    awaitables = [asyncio.wrap_future(future) for future in futures]
    gathered = asyncio.gather(*awaitables, return_exceptions=True)
    disconnect = asyncio.create_task(_cancel_on_disconnect(futures, request))
    try:
        await asyncio.wait(
            [gathered, disconnect], timeout=REQUEST_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        if disconnect.done():
            raise ClientDisconnect
        if not gathered.done():
            raise TimeoutError
        return gathered.result()
    finally:
        gathered.cancel()
        disconnect.cancel()


async def _cancel_on_disconnect(futures: Sequence[Future], request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for future in futures:
        future.cancel()


def _result(answer: Prediction | BaseException, classifier: Classifier) -> dict:
    if isinstance(answer, Prediction):
        return describe(answer, classifier)
    return {"error": f"This did not work; reference {report_error(answer)}."}
