"""A server with OpenAI's HTTP interface, in a process of its own, on good days and bad ones.

Its tokens are bytes, as with the tests' tokenizer. The model that a request names decides its behavior.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

MODELS = (
    *("plain", "nasty", "short", "no-usage", "pairs", "cached", "reasoning", "keyed", "strict"),
    *("malformed", "array", "no-choices", "midway", "disconnect", "cut"),
    *("no-stream", "silent", "held", "open", "closing"),
)
KEY = "s3cret"
CONTEXT = 300
HELD_SECONDS = 30.0
"""How long a stream stays as it is where ``release`` does not come."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: ClassVar[list[dict[str, Any]]] = []
    released: ClassVar[threading.Semaphore] = threading.Semaphore(0)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            more = {"plain": {"max_model_len": CONTEXT}, "pairs": {"meta": {"n_ctx": 77, "n_vocab": 255}}}
            models = [{"id": name, "object": "model", **more.get(name, {})} for name in MODELS]
            self._json(200, {"object": "list", "data": models})
        elif self.path == "/received":
            self._json(200, self.received)
        elif self.path == "/release":
            self.released.release()
            self._json(200, {})
        else:
            self._json(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append(body)
        model = body["model"]
        if model not in MODELS:
            return self._json(404, {"error": {"message": f"The model `{model}` does not exist."}})
        if model == "keyed" and self.headers.get("Authorization") != f"Bearer {KEY}":
            return self._json(401, {"error": {"message": "Incorrect API key provided."}})
        if model == "strict" and "ignore_eos" in body:
            return self._json(400, {"detail": "Unrecognized field: ignore_eos"})
        if model == "no-stream":
            return self._json(200, {"choices": [{"text": "all at once"}]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(model, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send(self, data: bytes) -> None:
        """One chunk of the transfer coding, on its way at once."""
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _stream(self, model: str, body: dict[str, Any]) -> None:
        chat = self.path == "/v1/chat/completions"
        count = body["max_tokens"] - (2 if model == "short" else 0)
        length = sum(len(m["content"]) for m in body["messages"]) if chat else len(body["prompt"])

        def event(text: str, finish: str | None = None) -> bytes:
            content = {"reasoning_content": text} if model == "reasoning" else {"content": text}
            choice = {"index": 0, "delta": content} if chat else {"index": 0, "text": text}
            return json.dumps({"choices": [{**choice, "finish_reason": finish}]}, ensure_ascii=False).encode()

        def data(payload: bytes) -> bytes:
            return b"data: " + payload + b"\n\n"

        if chat:
            self._send(data(b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}'))
        texts = ["x"] * count
        if model == "pairs":
            texts = ["xy"] * (count // 2) + ["x"] * (count % 2)
        if model == "nasty":
            texts = ["\N{GRINNING FACE}"] * (count // 4) + ["x"] * (count % 4)
            self._send(b"\xef\xbb\xbf: ping\r\n\r\nevent: message\r\nid: 7\r\nretry: 10\r\n")
        if model == "silent":
            texts = []
        for index, text in enumerate(texts):
            if index == 2 and model in BAD_DAYS:
                BAD_DAYS[model](self)
                return
            time.sleep(0.002)
            if index == 1 and model == "held":
                self.released.acquire(timeout=HELD_SECONDS)
            if model == "nasty":
                self._nasty(event(text))
            else:
                self._send(data(event(text)))
        usage: dict[str, Any] = {"prompt_tokens": length, "completion_tokens": count}
        if model == "cached":
            usage["prompt_tokens_details"] = {"cached_tokens": length - 1}
        self._send(data(event("", "stop" if model == "short" else "length")))
        if model != "no-usage" and body.get("stream_options", {}).get("include_usage"):
            self._send(data(json.dumps({"choices": [], "usage": usage}).encode()))
        self._send(b"data: [DONE]\r\n\r\n" if model == "nasty" else data(b"[DONE]"))
        if model == "open":
            self.released.acquire(timeout=HELD_SECONDS)
        self.wfile.write(b"0\r\n\r\n")
        if model == "closing":  # without having said so
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _nasty(self, payload: bytes) -> None:
        """One event over several data lines, cut within characters and line ends."""
        head, tail = payload.split(b", ", 1)
        whole = b": ping\r\ndata:" + head + b",\r\ndata: " + tail + b"\r\n\r\n"
        for cut in range(0, len(whole), 3):
            self._send(whole[cut : cut + 3])

    def _end(self, last: bytes) -> None:
        self._send(last)
        self.wfile.write(b"0\r\n\r\n")

    def _break(self) -> None:
        self.connection.close()
        self.close_connection = True


BAD_DAYS = {
    "malformed": lambda handler: handler._end(b'data: {"choices": [\n\n'),
    "array": lambda handler: handler._end(b"data: [1]\n\n"),
    "no-choices": lambda handler: handler._end(b'data: {"id": "x"}\n\n'),
    "midway": lambda handler: handler._end(b'data: {"error": {"message": "out of memory"}}\n\n'),
    "disconnect": lambda handler: handler._break(),
    "cut": lambda handler: handler._end(b": bye\n\n"),
}


@contextmanager
def running() -> Iterator[str]:
    """The address of one, up to ``/v1``, while the block runs."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def received(address: str) -> list[dict[str, Any]]:
    """The bodies of all requests so far."""
    return list(_get(address, "/received"))


def release(address: str) -> None:
    """Lets one stream of ``held`` go on after its first token, or one of ``open`` end."""
    _get(address, "/release")


def _get(address: str, page: str) -> Any:
    with urllib.request.urlopen(address.removesuffix("/v1") + page) as answer:
        return json.load(answer)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()
