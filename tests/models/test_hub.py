"""Against a hub of our own on this machine, since the real one may be out of reach."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.models_zoo import save_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a hub with one model, ``org/Tiny``; ``org/gated`` is gated, others are not there."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("hub") / "tiny")
    (folder / "README.md").write_text("not wanted")
    pooling = [{"type": "x.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(pooling))
    for name in ("onnx", "1_Pooling"):
        (folder / name).mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "more.json").write_text("not wanted")
    (folder / "onnx" / "model.safetensors").write_text("not wanted")
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = urlsplit(self.path).path
            if path.startswith("/api/models/org/Tiny/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": "org/Tiny", "sha": COMMIT, "siblings": siblings}).encode())
            elif path.startswith("/api/models/org/Tiny/tree/"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.answer(200, json.dumps(tree).encode())
            elif path.startswith("/org/Tiny/resolve/"):
                data = files[path.split("/", 5)[5]]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self.answer(200, data, ETag=etag, X_Repo_Commit=COMMIT)
            elif "/org/gated" in path:
                self.answer(403, X_Error_Code="GatedRepo")
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def pull(name, home, endpoint):
    """The answer of ``resolve_model`` in a fresh process, whose hub is at ``endpoint``."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from server.errors import RefusedError; from server.models.resolve import *\n"
        "told = []\n"
        "try:\n"
        "    found = resolve_model(sys.argv[1], Path(sys.argv[2]), lambda *args: told.append(args))\n"
        "    listed = list_cached(Path(sys.argv[2]))\n"
        "    print(json.dumps([found, told, listed], default=str))\n"
        "except RefusedError as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint}
    env = {
        key: value for key, value in env.items() if key not in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN")
    }
    result = subprocess.run(
        [sys.executable, "-c", code, name, str(home / "longspan")],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_model_is_fetched_listed_and_found_again_without_a_network(hub, tmp_path):
    (folder, name, source, tokenizer, sampling), told, listed = pull("org/Tiny", tmp_path, hub)
    assert (name, source, tokenizer, sampling) == ("tiny", "org/Tiny", folder, "{}")
    files = sorted(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert not {"README.md", "onnx"} & set(files)
    assert os.listdir(Path(folder) / "1_Pooling") == ["config.json"], "an embedder's pooling"
    assert told[0] == ["fetching org/Tiny", None]
    assert max(fraction for _, fraction in told[1:]) == 1
    assert [model[:2] for model in listed] == [["org/Tiny", "hub"]]
    assert listed[0][2] > 100_000
    assert pull("org/Tiny", tmp_path, "http://127.0.0.1:9")[0] == [folder, name, source, folder, sampling]


@pytest.mark.parametrize(
    ("name", "sentence"), [("org/gated", "is gated: accept its terms"), ("org/none", "has no model org/none")]
)
def test_what_the_hub_refuses_is_explained(name, sentence, hub, tmp_path):
    assert sentence in pull(name, tmp_path, hub)


def test_a_hub_out_of_reach_is_explained(tmp_path):
    assert "the hub can't be reached" in pull("org/Tiny", tmp_path, "http://127.0.0.1:9")
