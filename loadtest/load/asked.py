"""Options of the command line that take more than a type to read."""

from __future__ import annotations

import json
import math
import os
import urllib.parse
from importlib.util import find_spec

from loadtest.load.targets import LONGSPAN, Endpoint
from loadtest.load.types import ClosedLoop, Load, LoadTestError, OpenLoop


def loads(concurrency: str | None, rate: str | None, burstiness: float) -> list[Load]:
    """The loads of ``--concurrency 1,8`` or ``--rate 0.5,1``; 8 users without either.

    Raises:
        LoadTestError: one is not a number above 0, or comes twice.
    """
    if not burstiness > 0:
        raise LoadTestError("--burstiness must be more than 0")
    if rate is not None:
        rates = _numbers("--rate", rate)
        return [OpenLoop(each, burstiness) for each in rates]
    users = _numbers("--concurrency", concurrency or "8")
    if any(each != int(each) for each in users):
        raise LoadTestError(f"--concurrency is {concurrency}; users are whole numbers")
    return [ClosedLoop(int(each)) for each in users]


def endpoint(
    url: str,
    *,
    model: str | None,
    name: str,
    api: str,
    prompts: str,
    tokenizer: str | None,
    extra: str | None,
    key_env: str | None,
) -> Endpoint:
    """The second target.

    Raises:
        LoadTestError: an option makes no sense, or a library is missing.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadTestError(f"--endpoint is {url!r}; give an address like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise LoadTestError(
            "--endpoint is only an address, and is kept in the document; give a key by --endpoint-key-env"
        )
    if not model:
        raise LoadTestError("--endpoint needs --endpoint-model, the name that its requests give")
    if name == LONGSPAN:
        raise LoadTestError(f"--endpoint-name {LONGSPAN} is taken; give another")
    if api not in ("completions", "chat"):
        raise LoadTestError(f"--endpoint-api is {api!r}; choose completions or chat")
    if prompts not in ("ids", "text"):
        raise LoadTestError(f"--endpoint-prompts is {prompts!r}; choose ids or text")
    if not find_spec("httpx2"):
        raise LoadTestError("--endpoint needs httpx2; run: pip install 'longspan[load]'")
    fields = {"ignore_eos": True}
    if extra is not None:
        try:
            fields = json.loads(extra)
        except ValueError as error:
            raise LoadTestError(f"--endpoint-extra is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise LoadTestError("--endpoint-extra is a JSON object, like '{\"ignore_eos\": true}'")
    key = os.environ.get(key_env) if key_env is not None else ""
    if key is None:
        raise LoadTestError(f"--endpoint-key-env names {key_env}, which is not set; export it")
    return Endpoint(
        url.rstrip("/"),
        model,
        name,
        "chat" if api == "chat" else "completions",
        "text" if prompts == "text" else "ids",
        tokenizer,
        fields,
        key,
    )


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise LoadTestError(f"{option} is {text!r}; give a number, or several with commas between") from None
    if any(not (each > 0 and math.isfinite(each)) for each in found):
        raise LoadTestError(f"{option} must be more than 0")
    if len(set(found)) < len(found):
        raise LoadTestError(f"{option} {text} has a number twice; --repeats measures each load more often")
    return found
