"""Of transformers the server process imports the module for tokenizers alone."""

import json
import subprocess
import sys

import pytest
import transformers

from server.text import light
from tests.api.conftest import save_tokenizer


@pytest.mark.parametrize(("module", "whole"), [(light._MODULE, False), ("transformers.elsewhere", True)])
def test_the_rest_can_be_imported_later_and_is_where_it_must(module, whole, tmp_path):
    program = (
        "import json, pathlib, sys; from server.text import light; light._MODULE = sys.argv[2];"
        "from server.text.tokenizer import Tokenizer; own = Tokenizer(pathlib.Path(sys.argv[1]));"
        "told = [[name in sys.modules for name in ('transformers', 'torch')], own.encode('hello')];"
        "import transformers; kind = transformers.PreTrainedTokenizerFast; folder = sys.argv[1];"
        "told += [type(own._pretrained) is kind, kind.from_pretrained(folder).encode('hello')];"
        "told += [transformers.utils.hub.__name__, transformers.__version__];"
        "print(json.dumps(told))"
    )
    command = [sys.executable, "-c", program, str(save_tokenizer(tmp_path)), module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded, ids, *rest = json.loads(done.stdout)
    assert (loaded, ids) == ([whole, False], list(b"hello"))
    assert rest == [True, ids, "transformers.utils.hub", transformers.__version__]
