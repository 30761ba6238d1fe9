"""A page that shows the OpenAPI document, without scripts and without requests to other sites."""

import json
from html import escape
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

CSS = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem; }
h2 { border-top: 1px solid #8888; padding-top: 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 1rem 0.3rem 0; }
tr { border-bottom: 1px solid #8884; }
td:last-child { overflow-wrap: anywhere; }
pre { padding: 0.7rem; border: 1px solid #8888; overflow-x: auto; font-size: 0.9rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{description}
<p>For programs, the same as <a href="openapi.json">an OpenAPI document</a>.</p>
{operations}
<h2>Schemas</h2>
{schemas}
</body>
</html>
"""


def add_description(app: FastAPI, document: dict) -> None:
    """Add ``/openapi.json``, the OpenAPI document, and ``/docs``, the page made from it."""
    page = render_page(document)

    async def show_document(_request: Request) -> JSONResponse:
        return JSONResponse(document)

    async def show_page(_request: Request) -> HTMLResponse:
        return HTMLResponse(page)

    app.add_route("/openapi.json", show_document, methods=["GET"])
    app.add_route("/docs", show_page, methods=["GET"])


def render_page(document: dict) -> str:
    """Render an OpenAPI document of this API as an HTML page."""
    info = document["info"]
    operations = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            operations.append(_render_operation(method.upper(), path, operation))
    schemas = []
    for name, schema in document["components"]["schemas"].items():
        schemas.append(f'<h3 id="{escape(name)}">{escape(name)}</h3>\n{_render_json(schema)}')
    paragraphs = info["description"].split("\n\n")
    return PAGE.format(
        title=escape(f"{info['title']} {info['version']}: API"),
        css=CSS,
        description="\n".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs),
        operations="\n".join(operations),
        schemas="\n".join(schemas),
    )


def _render_operation(method: str, path: str, operation: dict) -> str:
    parts = [f"<h2>{method} {escape(path)}</h2>", f"<p>{escape(operation['summary'])}</p>"]
    if "security" in operation:
        parts.append("<p>Requires a name and a password.</p>")
    body = operation.get("requestBody")
    if body is not None:
        content = _render_content(body["content"])
        parts.append(f"<p>Body: {content}. {escape(body['description'])} For example:</p>")
        parts.append(_render_json(body["content"]["application/json"]["example"]))
    parts.append("<table>\n<tr><th>Status</th><th>Meaning</th><th>Body</th></tr>")
    for status, response in operation["responses"].items():
        phrase = HTTPStatus(int(status)).phrase
        meaning = escape(response["description"])
        for name, header in response.get("headers", {}).items():
            meaning += f"<br>{escape(name)}: {escape(header['description'])}"
        content = _render_content(response.get("content", {}))
        parts.append(f"<tr><td>{status}<br>{phrase}</td><td>{meaning}</td><td>{content}</td></tr>")
    parts.append("</table>")
    return "\n".join(parts)


def _render_content(content: dict) -> str:
    """Name the media types of a body, and link the schemas of JSON."""
    names = []
    for media_type, body in content.items():
        schemas = body["schema"].get("anyOf", [body["schema"]])
        links = [_link(schema["$ref"]) for schema in schemas if "$ref" in schema]
        if links:
            names.append(" or ".join(links))
        elif media_type == "application/json":
            names.append(f"<code>{escape(json.dumps(_example(body['schema'])))}</code>")
        else:
            names.append(escape(media_type.partition(";")[0]))
    return ", ".join(names)


def _example(schema: dict) -> dict:
    """Return the only object that a schema of constants describes."""
    return {name: value["const"] for name, value in schema["properties"].items()}


def _link(reference: str) -> str:
    name = escape(reference.rpartition("/")[2])
    return f'<a href="#{name}">{name}</a>'


def _render_json(value: dict) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return f"<pre>{escape(text)}</pre>"
