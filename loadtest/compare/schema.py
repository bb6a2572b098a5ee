"""The JSON Schema of comparisons, made from their types and these types' docstrings.

``python -m loadtest.compare.schema`` writes ``schema.json`` beside this file anew.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import msgspec

from loadtest.compare.types import Comparison, Evidence, Judgment, Plan, Verdict
from loadtest.evaluation.types import Answer
from loadtest.measuring.types import Measurement, Weather

SCHEMA = "longspan-compare/2"
FILE = Path(__file__).with_name("schema.json")

# Numbers that are NaN where nothing was measured, though they have no such default.
_MAY_BE_NULL = {Evidence: ("full", "own"), Weather: ("stolen", "foreign", "throttled")}

# Added since the first documents of this version, which lack them.
_ADDED = {
    Comparison: ("busy",),
    Plan: ("tasks_version", "beyond"),
    Answer: ("seconds",),
    Measurement: ("set_aside",),
    Evidence: ("turns",),
    Verdict: ("effective_least", "effective_most"),
}

# Entries of the fields that are plain objects.
_OBJECTS = {
    "machine": {
        "cpu": ("string", "Name of the processor."),
        "cores": ("integer", "That the run may use."),
        "memory_bytes": ("integer", "Of the machine."),
        "system": ("string", "Operating system and its version."),
    },
    "model": {
        "name": ("string", "As it is served."),
        "architecture": ("string", "Class of the model."),
        "parameters": ("integer", "Their number."),
        "dtype": ("string", "Of the weights' computations."),
        "kv_dtype": ("string", "Of the KV cache."),
        "device": ("string", "cpu, or the accelerator's name."),
        "context_length": ("integer", "Longest context, tokens."),
        "vocabulary_size": ("integer", "Tokens; tells perplexity from that of a guess."),
    },
}
_RUNNING = {
    "kernel": ("string", "The kernel that computes attention."),
    "reason": ("string", "Why this kernel."),
    "options": ("object", "The backend's options in force, texts by name."),
}


def schema() -> dict[str, Any]:
    """The schema of a document, JSON Schema draft 2020-12. Every field is described and always written;
    those that documents of earlier releases lack are not required."""
    _, parts = msgspec.json.schema_components([Comparison, Judgment], ref_template="#/$defs/{name}")
    for kind in _kinds(Comparison, Judgment):
        parts[kind.__name__] = _object(kind, parts[kind.__name__])
    parts["Measurement"]["properties"]["figures"]["additionalProperties"] = {"type": ["number", "null"]}
    whole = parts.pop("Comparison")
    for name, known in _OBJECTS.items():
        whole["properties"][name] |= _known(known)
    whole["properties"]["running"]["additionalProperties"] = {"type": "object", **_known(_RUNNING)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A comparison of attention variants by longspan compare ({SCHEMA})",
        "description": "Times in seconds, sizes in bytes, probabilities as natural logarithms. Null is NaN: "
        "there is no such figure.",
        "type": "object",
        "properties": {
            "schema": {"const": SCHEMA, "description": "Name and version of this form."},
            **whole["properties"],
            "judgment": {
                "$ref": "#/$defs/Judgment",
                "description": "What follows from the rows; made anew when the document is read.",
            },
        },
        "required": ["schema", *whole["required"], "judgment"],
        "additionalProperties": False,
        "$defs": parts,
    }


def _known(entries: dict[str, tuple[str, str]]) -> dict[str, Any]:
    properties = {name: {"type": kind, "description": words} for name, (kind, words) in entries.items()}
    return {"properties": properties}


def _kinds(*roots: type) -> list[type]:
    """All dataclasses that these consist of."""
    found: dict[str, type] = {}
    names = msgspec.json.schema_components(roots)[1]
    modules = [inspect.getmodule(root) for root in (*roots, Weather)]
    for name in names:
        kind = next((kind for module in modules if (kind := getattr(module, name, None))), None)
        if is_dataclass(kind) and isinstance(kind, type):
            found[name] = kind
    return list(found.values())


def _object(kind: type, part: dict[str, Any]) -> dict[str, Any]:
    """An object of exactly the fields of ``kind``, each with what its docstring says."""
    words = _attributes(inspect.getdoc(kind) or "")
    properties = {}
    for field in fields(kind):
        found = dict(part["properties"][field.name])
        found.pop("default", None)
        if _nullable(kind, field):
            found["type"] = ["number", "null"]
        properties[field.name] = {"description": words[field.name], **found}
    summary = (inspect.getdoc(kind) or "").partition("\n")[0]
    return {
        "description": summary,
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in _ADDED.get(kind, ())],
        "additionalProperties": False,
    }


def _nullable(kind: type, field: Field[Any]) -> bool:
    default = field.default is not MISSING and isinstance(field.default, float) and math.isnan(field.default)
    return default or field.name in _MAY_BE_NULL.get(kind, ())


def _attributes(doc: str) -> dict[str, str]:
    """The entries of a docstring's section ``Attributes``."""
    section = doc.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(text.replace("``", "").split())
        for name, text in zip(entries[::2], entries[1::2], strict=True)
    }


def main() -> None:
    """Writes the file."""
    FILE.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
