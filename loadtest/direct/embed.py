"""How many texts a second a server embeds: ``python -m loadtest.direct.embed``.

The texts are parts of the manual that comes with Python, of lengths as in practice: log-normal, 37 words in
the median. With ``--peer`` the same texts are embedded by the sentence-transformers library in this process,
in turn with the server.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
import statistics
import time
from collections.abc import Callable

from longspan import DEFAULT_HOST, DEFAULT_PORT, Client

_TEXTS, _MOST_WORDS = 256, 180
_MEDIAN, _SPREAD = 3.6, 0.8  # of the logarithm of the number of words


def texts(count: int = _TEXTS) -> list[str]:
    """Texts of 3 to 180 words, the same ones each time."""
    words = " ".join(pydoc_data.topics.topics.values()).split()
    rng = random.Random(0)
    found, begin = [], 0
    for _ in range(count):
        length = min(_MOST_WORDS, max(3, int(rng.lognormvariate(_MEDIAN, _SPREAD))))
        begin = begin if begin + length <= len(words) else 0
        found.append(" ".join(words[begin : begin + length]))
        begin += length
    return found


def main() -> None:
    """Measures, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default=DEFAULT_HOST)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peer", metavar="FOLDER", help="sentence-transformers with the model in this folder"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the peer")
    arguments = parser.parse_args()
    several = texts()
    with Client(arguments.host, arguments.port) as client:
        tokens = client.embed(several, truncate=True).usage.prompt_tokens
        ways: dict[str, Callable[[], object]] = {"served": lambda: client.embed(several, truncate=True)}
        if arguments.peer:
            ways["sentence-transformers"] = _peer(arguments.peer, arguments.threads, several)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, work in ways.items():
                begin = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begin)
    for name, took in seconds.items():
        best, middle = min(took), statistics.median(took)
        print(
            f"{name}: {len(several) / middle:.1f} texts/s, {tokens / middle:.0f} tokens/s "
            f"(best {len(several) / best:.1f})"
        )
    if arguments.peer:
        pairs = zip(seconds["sentence-transformers"], seconds["served"], strict=True)
        ratios = sorted(peer / served for peer, served in pairs)
        print(f"ratio: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def _peer(folder: str, threads: int, several: list[str]) -> Callable[[], object]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu")
    model.encode(several)
    return lambda: model.encode(several, batch_size=32)


if __name__ == "__main__":
    main()
