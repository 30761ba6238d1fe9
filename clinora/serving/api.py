"""The HTTP interface: whether the service is well, and the classes of one or many notes as JSON.

    POST /v1/classify  {"note": "…"}           → {"predicted_class": 0, "label": "…", …}
    POST /v1/classify  {"notes": ["…", "…"]}   → {"results": [{…}, {"error": "…"}]}

No answer to a wrong question repeats it: it may hold a note.
"""

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import Future

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clinora.classifier import Classifier, Prediction
from clinora.notes import clean_text, has_visible
from clinora.serving import report_error
from clinora.serving.batcher import Batcher, BusyError
from clinora.serving.proxy import network_of

MOST_NOTES = 32  # of a request
MOST_CHARACTERS = 100_000  # of a note
REQUEST_SECONDS = 30  # after which a request is told that the service is busy
RETRY_AFTER = {"Retry-After": "1"}  # seconds
EXPECTED = f'expected {{"note": "text"}} or {{"notes": ["text", …]}} with 1 to {MOST_NOTES} notes'


class Question(BaseModel):
    """A note, or several."""

    model_config = ConfigDict(extra="forbid", strict=True)

    note: str | None = None
    notes: list[str] | None = Field(None, min_length=1, max_length=MOST_NOTES)


def read_question(content_type: str, body: bytes) -> Question:
    """Read the body of a request.

    Raises:
        HTTPException: The body does not have the expected form. The detail says what is wrong and
            what was expected, and repeats nothing of the body.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, f"The Content-Type is not application/json; {EXPECTED}")
    try:
        value = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_unique)
        question = Question.model_validate(value)
    except UnicodeDecodeError:
        wrong = "The body is not UTF-8"
    except RecursionError:
        wrong = "The JSON is nested too deeply"
    except DuplicateKeyError:
        wrong = "The JSON has a key twice"
    except ValidationError:
        wrong = "The JSON has a wrong key, type or number of notes"
    except ValueError:
        wrong = "The body is not JSON"
    else:
        if (question.note is None) != (question.notes is None):
            return question
        wrong = "The JSON does not have exactly one of note and notes"
    raise HTTPException(422, f"{wrong}; {EXPECTED}")


class DuplicateKeyError(ValueError):
    """A JSON object has a key twice: which value counts would be a guess."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DuplicateKeyError
    return values


def refuse(note: str) -> str | None:
    """Say why a note cannot be classified; None if it can."""
    if not has_visible(note):
        return "The note is empty."
    if len(note) > MOST_CHARACTERS:
        return f"The note has {len(note):,} characters, more than {MOST_CHARACTERS:,}."
    return None


def describe(prediction: Prediction, classifier: Classifier) -> dict:
    """Give a prediction as JSON knows it, the published form first."""
    return prediction.as_json() | {
        "confidence": prediction.confidence,
        "refer": prediction.refer,
        "probabilities": dict(zip(classifier.labels, prediction.probabilities, strict=True)),
        "tokens": prediction.tokens,
        "tokens_exact": not prediction.truncated,  # or it has at least so many
        "tokens_read": min(prediction.tokens, classifier.token_limit),
    }


def add_routes(app: FastAPI, batcher: Batcher) -> None:
    """Add ``/health``, ``/ready`` and ``/v1/classify`` to an app."""

    async def health(_request: Request) -> JSONResponse:  # a busy service still answers
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> JSONResponse:
        if batcher.ready(network_of(request.client)):
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "busy"}, 503, RETRY_AFTER)

    async def classify(request: Request) -> JSONResponse:
        question = read_question(request.headers.get("Content-Type", ""), await request.body())
        asked = question.notes or [question.note]
        notes = [clean_text(note) for note in asked]
        refusals = [refuse(note) for note in notes]
        accepted = [n for n, refusal in zip(notes, refusals, strict=True) if refusal is None]
        try:
            futures = batcher.submit(accepted, client=network_of(request.client))
            predictions = iter(await _wait(futures, request))
        except (BusyError, TimeoutError):
            return JSONResponse({"detail": "The service is busy: try again."}, 503, RETRY_AFTER)
        results = []
        for refusal in refusals:
            if refusal is not None:
                results.append({"error": refusal})
            else:
                results.append(_result(next(predictions), batcher.classifier))
        if question.notes is not None:
            return JSONResponse({"results": results})
        (result,) = results
        if "error" in result:
            status = 422 if refusals[0] is not None else 500
            return JSONResponse({"detail": result["error"]}, status)
        return JSONResponse(result)

    app.add_route("/health", health, methods=["GET"])
    app.add_route("/ready", ready, methods=["GET"])
    app.add_route("/v1/classify", classify, methods=["POST"])

    @app.exception_handler(405)
    async def wrong_method(_request: Request, error: HTTPException) -> JSONResponse:
        allowed = ", ".join(sorted(error.headers["Allow"].split(", ")))  # Starlette's order varies
        detail = {"detail": f"Expected the method {allowed}."}
        return JSONResponse(detail, 405, {"Allow": allowed})


async def _wait(futures: Sequence[Future], request: Request) -> list[Prediction | BaseException]:
    """Wait for answers; what nobody waits for any more and is not begun is not computed.

    Raises:
        TimeoutError: Time is up, or the client has hung up.
    """
    answers = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    hung_up = asyncio.create_task(_cancel_when_hung_up(futures, request))
    try:
        found = await asyncio.wait_for(answers, REQUEST_SECONDS)
        if hung_up.done():
            raise TimeoutError
        return found
    finally:
        hung_up.cancel()


async def _cancel_when_hung_up(futures: Sequence[Future], request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for future in futures:
        future.cancel()


def _result(answer: Prediction | BaseException, classifier: Classifier) -> dict:
    if isinstance(answer, Prediction):
        return describe(answer, classifier)
    return {"error": f"This did not work; reference {report_error(answer)}."}
