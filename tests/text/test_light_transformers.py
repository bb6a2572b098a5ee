"""transformers entered without its list of models, in processes of their own: this one has imported it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COUNT = """
import json, sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
def models():
    return sum("/transformers/models/" in path and path.endswith(".py") for path in opened)
"""


def told(program: str) -> Any:
    """What a program prints last, in JSON."""
    command = [sys.executable, "-c", COUNT + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_tokenizer_and_the_templates_read_no_models_and_the_rest_is_there_once_it_is_asked_for():
    before, after, same, known, listed = told("""
from server.text import light_transformers, template_program
from server.text.tokenizer import PreTrainedTokenizerFast
template_program._templates()
before = models()
import transformers
entered = transformers
import transformers.utils.logging
assert models() == before
from transformers import PreTrainedTokenizerFast as own
import transformers
same = own is PreTrainedTokenizerFast
same = same and transformers.utils.logging is sys.modules["transformers.utils.logging"]
known = entered.LlamaConfig is transformers.LlamaConfig and not hasattr(entered, "Nothing")
listed = "LlamaConfig" in dir(entered) and sys.modules["transformers"] is not entered
assert light_transformers.module("utils.logging") is transformers.utils.logging
print(json.dumps([before, models(), same, known, listed]))
""")
    assert before == 0
    assert after > 1000, "what ``import transformers`` reads"
    assert same
    assert known
    assert listed


def test_packages_that_are_too_old_are_told_as_by_transformers():
    error, left, again = told("""
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "tokenizers" else real(name)
from server.text import light_transformers
try:
    light_transformers.module("utils.chat_template_utils")
except ImportError as found:
    error = str(found)
left = "transformers" in sys.modules
importlib.metadata.version = real
print(json.dumps([error, left, light_transformers.module("utils.chat_template_utils").__name__]))
""")
    assert "tokenizers" in error
    assert "0.0.1" in error
    assert not left
    assert again == "transformers.utils.chat_template_utils"
