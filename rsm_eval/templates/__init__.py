"""Templates of the pages that rsm-eval writes, and their common style sheet."""

from __future__ import annotations

import base64

import jinja2

from rsm_eval.formats import format_ms, format_return


def load_template(name: str) -> jinja2.Template:
    """A template of this folder.

    Its filters are `ms` and `number` for milliseconds and returns, and `data_uri` for files inside the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rsm_eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": format_ms, "number": format_return, "data_uri": _data_uri}
    return environment.get_template(name)


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
