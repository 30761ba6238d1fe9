"""Calls the page's handlers as the page does."""

import json
import re


def call(client, api, *data, session="one"):
    """Call a handler through the queue, as the page does: (event, data)."""
    body = {"data": data, "session_hash": session}
    joined = client.post(f"/gradio_api/call/{api}", json=body)
    assert joined.status_code == 200, joined.text
    events = client.get(f"/gradio_api/call/{api}/{joined.json()['event_id']}").text
    event, data = re.fullmatch(r"event: (\w+)\ndata: (.*?)\s*", events, re.DOTALL).groups()
    return event, json.loads(data)
