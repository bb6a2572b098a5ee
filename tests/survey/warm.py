"""Imported once by the process from which every case forks: what trying a first model loads and remembers."""

import os
import tempfile
from pathlib import Path

from tests.survey.architectures import Case
from tests.survey.rows import attempt  # noqa: F401
from tests.survey.try_one import try_case

_here, _silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
os.dup2(_silence, 2)
try:
    with tempfile.TemporaryDirectory(prefix="longspan-survey-") as _folder:
        try_case(Case("llama"), Path(_folder))
finally:
    os.dup2(_here, 2)
    os.close(_here)
    os.close(_silence)
