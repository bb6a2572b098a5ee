"""Of transformers the server process and the one that renders templates import what they use alone."""

import json
import subprocess
import sys

import pytest
import transformers

from tests.api.conftest import save_tokenizer


# Of another version's module it is pretended that it needs its package.
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "module", ["transformers.tokenization_utils_tokenizers", "transformers.utils.chat_template_utils"]
)
def test_the_packages_are_imported_where_they_must_and_can_be_later(module, whole, tmp_path):
    program = (
        "import json, sys; from server.text import light; folder, name, whole = sys.argv[1:];"
        "light._alone = light._alone if whole == 'False' else lambda name: 1 / 0;"
        "found = light.alone(name);"
        "told = [each in sys.modules for each in ('transformers', 'torch')];"
        "import transformers; told += [found is sys.modules[name], transformers.utils.hub.__name__];"
        "told += [transformers.PreTrainedTokenizerFast.from_pretrained(folder).encode('hello')];"
        "told += [transformers.__version__];"
        "print(json.dumps(told))"
    )
    command = [sys.executable, "-c", program, str(save_tokenizer(tmp_path)), module, str(whole)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    package, torch, *rest = json.loads(done.stdout)
    assert (package, torch) == (whole, False)
    assert rest == [True, "transformers.utils.hub", list(b"hello"), transformers.__version__]
