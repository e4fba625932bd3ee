"""Whether the W&B server answers and takes the key that is here. wandb is not imported for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from .wandb_mode import find_key, server_url

_QUERY = {"query": "query Viewer { viewer { id } }", "operationName": "Viewer"}


def why_unreached(environ: Mapping[str, str], *, timeout: float = 5.0) -> str:
    """Ask the server who the key's owner is; what is wrong, or empty if nothing is.

    With an identity token instead of a key only the server's answering is looked at.
    """
    url, key = server_url(environ), find_key(environ)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
    try:
        request = Request(f"{url.rstrip('/')}/graphql", json.dumps(_QUERY).encode(), headers)  # noqa: S310  # the user's own server
    except ValueError:
        return f"'{url}' is no URL"
    try:
        with urlopen(request, timeout=timeout) as answer:  # noqa: S310  # see above
            viewer = json.load(answer)["data"]["viewer"]
    except HTTPError as error:
        return f"{url} refuses this API key" if error.code in (401, 403) else f"{url} answers with {error}"
    except (OSError, URLError) as error:
        return f"{url} does not answer: {getattr(error, 'reason', error)}"
    except (HTTPException, ValueError, LookupError, TypeError):
        return f"{url} does not answer as a W&B server does"
    return f"{url} does not know this API key" if key and viewer is None else ""
