"""Figures as pictures inside the page, without a file and without a request of their own."""

import base64
import io

from matplotlib.figure import Figure


def data_url(figure: Figure) -> str:
    """Draw a figure as PNG, at its own resolution, and return it as a data URL."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
