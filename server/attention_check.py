"""Names and options of attention, checked before there is a model or an engine.

Run as a program it prints what is wrong with its arguments: the server process, which is to do without torch,
asks so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

from server.engine.ipc.spawn import shielded
from server.settings import Settings

_REFUSED = 3
# What others call a rule that has another name here.
_WINDOW = "--attention sliding_window"
_KNOWN_AS = {
    "window": _WINDOW,
    "local": _WINDOW,
    "sliding-window": _WINDOW,
    "swa": _WINDOW,
    "streaming": f"{_WINDOW} --attention-option positions=cache",
    "streaming_llm": f"{_WINDOW} --attention-option positions=cache",
    "streamingllm": f"{_WINDOW} --attention-option positions=cache",
    "top-k": "--attention sparse --attention-option pattern=topk",
    "top_k": "--attention sparse --attention-option pattern=topk",
}


def ask(settings: Settings) -> str | None:
    """What is wrong with a server's attention, its options and its kernel, in a sentence, if anything is.

    The defaults are right and cost nothing; other choices take the second that a process needs to import
    torch. What only a model, a device or a page size can tell is left to the engine.
    """
    chosen = (settings.attention, settings.attention_option, settings.kernel)
    default = Settings.model_fields
    if chosen == (default["attention"].default, {}, default["kernel"].default):
        return None
    command = [sys.executable, "-P", "-m", __name__, json.dumps(chosen)]
    with shielded():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told, _ = process.communicate()
    # A process that fails otherwise says nothing of the choice; the engine meets the same and tells of it.
    return told.strip() if process.returncode == _REFUSED else None


def refusal(attention: str, options: Mapping[str, str], kernel: str) -> str | None:
    """As ``ask``, in this process."""
    from attention.backends import UnsupportedError, check_names

    try:
        check_names(attention, options, kernel)
    except UnsupportedError as error:
        near = hint(attention)
        return f"{str(error).partition('; did you mean')[0]}; did you mean {near}?" if near else str(error)
    return None


def hint(attention: str) -> str | None:
    """Flags for a name that is no backend's, but a pattern's or what others call a pattern."""
    from attention.backends import registries
    from attention.registry import Backend, imported

    backends, _ = registries()
    if attention in backends.names:
        return None
    for name in backends.names:
        entry = imported(backends.load(name)) if not backends.origin(name) else None
        if isinstance(entry, Backend) and entry.family and attention in imported(entry.family):
            return f"--attention {name} --attention-option pattern={attention}"
    return _KNOWN_AS.get(attention.lower())


def main() -> int:
    """Checks what the arguments name; the exit code tells whether it is refused."""
    sentence = refusal(*json.loads(sys.argv[1]))
    if sentence is None:
        return 0
    print(sentence)
    return _REFUSED


if __name__ == "__main__":
    sys.exit(main())
