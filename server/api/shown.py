"""Settings and sources as clients are told them: without folders, and without credentials."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from urllib.parse import urlsplit

from server.settings import Settings

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# Texts that may name a file or folder; those whose type says so need not be named.
_PATHS = {"model", "chat_template", "draft_model"}


def shown(settings: Settings) -> dict[str, str]:
    """The settings in force; of paths only the last part, of addresses only scheme, host and port."""
    found = {}
    for name, value in settings.model_dump(mode="json").items():
        if value is None:
            continue
        text = str(value)
        if _URL.match(text):
            text = _origin(text)
        elif isinstance(getattr(settings, name), PurePath) or name in _PATHS:
            text = name_of(text)
        elif name == "ray_model":
            text = str({model: name_of(source) for model, source in value.items()})
        found[name] = text
    return found


def name_of(source: str) -> str:
    """The last part of a path; a hub name or a package's requirement stays as it is."""
    path = Path(source)
    is_path = path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2 or path.exists()
    return path.name if is_path else source


def _origin(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return url.partition("://")[0] + "://..."
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")
