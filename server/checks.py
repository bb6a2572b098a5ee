"""Checks of settings before a model is fetched or an engine started.

Checks that need a model, a device or a page size are left to the engine. The server process does without
torch, and so do these checks. Only a backend that an installed package brings may need it; then this module
runs as a program, which prints what is wrong with its arguments.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping

from attention.kernels.cpu import levels
from attention.names import check_names, registries
from attention.registry import Backend, UnsupportedError, imported
from server.engine.ipc.spawn import shielded
from server.settings import DRAFT_ATTENTION, Settings

_REFUSED = 3
# Names that others give to patterns that have another name here.
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


def refusal(settings: Settings) -> str | None:
    """Why a server's native level, attention or drafting is refused, in a sentence; ``None`` if not."""
    return native_level_refusal(settings) or _attention_refusal(settings) or _drafting_refusal(settings)


def native_level_refusal(settings: Settings) -> str | None:
    """Why this processor cannot execute the settings' level, in a sentence; ``None`` if it can."""
    try:
        levels.find(settings.native_level)
    except levels.LevelError as error:
        return f"--native-level: {error}"
    return None


def names_refusal(attention: str, options: Mapping[str, str], kernel: str) -> str | None:
    """Why names and options of attention are refused, in a sentence; ``None`` if they are not."""
    try:
        if _is_foreign(attention):
            from attention.backends import make_pattern

            make_pattern(attention, options)
        check_names(attention, options, kernel)
    except UnsupportedError as error:
        near = hint(attention)
        return f"{str(error).partition('; did you mean')[0]}; did you mean {near}?" if near else str(error)
    return None


def hint(attention: str) -> str | None:
    """Flags for a name that is no backend's, but a pattern's or another program's name of a pattern."""
    backends, _ = registries()
    if attention in backends.names:
        return None
    for name in backends.names:
        entry = imported(backends.load(name)) if not backends.origin(name) else None
        if isinstance(entry, Backend) and entry.family and attention in imported(entry.family):
            return f"--attention {name} --attention-option pattern={attention}"
    return _KNOWN_AS.get(attention.lower())


def main() -> int:
    """Checks the names and options in its arguments; the exit code tells whether they are refused."""
    sentence = names_refusal(*json.loads(sys.argv[1]))
    if sentence is None:
        return 0
    print(sentence)
    return _REFUSED


def _attention_refusal(settings: Settings) -> str | None:
    chosen = (settings.attention, settings.attention_option, settings.kernel)
    default = Settings.model_fields
    if chosen == (default["attention"].default, {}, default["kernel"].default):
        return None  # installed packages need not be looked up
    if not _is_foreign(settings.attention):
        return names_refusal(*chosen)
    command = [sys.executable, "-P", "-m", __name__, json.dumps(chosen)]
    with shielded():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    told, _ = process.communicate()
    # Another exit code says nothing of the options; the engine meets the same failure and reports it.
    return told.strip() if process.returncode == _REFUSED else None


def _drafting_refusal(settings: Settings) -> str | None:
    if settings.draft_tokens is not None and settings.speculate == "off":
        return f"--draft-tokens {settings.draft_tokens}: nothing is drafted without --speculate; set it too"
    if settings.draft_model is not None and settings.speculate != "draft":
        return "--draft-model: a model drafts with --speculate draft only; set that, or leave this out"
    if settings.draft_model is None and settings.speculate == "draft":
        return "--speculate draft: --draft-model must name the model that drafts; longspan distill makes one"
    attention, options = settings.draft_attention, settings.draft_attention_option
    if settings.speculate != "self":
        given = {"--draft-attention": attention, "--draft-attention-option": options}
        flag = next((flag for flag, value in given.items() if value), None)
        return flag and f"{flag}: attention drafts with --speculate self only; set that, or leave this out"
    sentence = names_refusal(attention or DRAFT_ATTENTION, options, settings.kernel)
    return sentence and f"--draft-attention: {sentence}"


def _is_foreign(attention: str) -> bool:
    return registries()[0].origin(attention) != ""


if __name__ == "__main__":
    sys.exit(main())
