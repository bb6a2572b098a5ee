"""A checkpoint with changed files is refused at start in a sentence, or its requests are answered.

Most starts are within this process (``tests.e2e.here``); some are those of the real command.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from server.settings import Settings
from tests.e2e.asked import asked_of
from tests.e2e.here import started_and_asked
from tests.e2e.server import Server
from tests.encoder_decoders.zoo import save_encoder_decoder
from tests.encoders.zoo import save_embedder, save_encoder
from tests.kernels import share_kernels
from tests.models.changes import CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG
from tests.models.mutations import mutate
from tests.models.variations import vary
from tests.models_zoo import save_tiny

FAMILIES: dict[str, Callable[[str, Path], Path]] = {
    **dict.fromkeys(("llama", "mistral", "qwen3", "gemma3", "gpt2", "opt", "mixtral", "gpt_neox"), save_tiny),
    **dict.fromkeys(("bert", "roberta", "modernbert", "mpnet", "longformer"), save_encoder),
    "bert that fills": lambda _, folder: save_encoder("bert", folder, "MaskedLM"),
    "bert that scores": lambda _, folder: save_encoder("bert", folder, "SequenceClassification"),
    "embedder": lambda _, folder: save_embedder("qwen3", folder, prompts={"query": "q: "}, default="query"),
    **dict.fromkeys(("bart", "t5", "led", "m2m_100"), save_encoder_decoder),
}
ENCODERS = {"bert", "roberta", "modernbert", "mpnet", "longformer", "embedder"}
FILES = (CONFIG, CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
OF_SENTENCES = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json")
MOST_SENTENCE = 1500
MOST_SECONDS = 120.0
MANY, REAL = 60, 24
"""Starts within this process for each family, and of the real command, some seconds each."""


class Change(NamedTuple):
    """What is changed in a checkpoint.

    Attributes:
        family: a key of ``FAMILIES``.
        name: the file.
        change: ``mutate`` or ``vary``.
        seed: of the change.
    """

    family: str
    name: str
    change: Callable[[Path, str, int], None]
    seed: int

    def __str__(self) -> str:
        return f"{self.change.__name__} {self.name} of {self.family} with seed {self.seed}"

    @classmethod
    def drawn(cls, rng: random.Random, family: str) -> Change:
        """One of a family's files, changed somehow."""
        files = FILES + OF_SENTENCES if family == "embedder" else FILES
        change = rng.choices((vary, mutate), (3, 1))[0]
        return cls(family, rng.choice(files), change, rng.randrange(1 << 32))

    def folder(self, good: Path, folder: Path) -> Path:
        """The checkpoint with the change."""
        shutil.copytree(good, folder, copy_function=os.link)
        if self.name == GENERATION and not (folder / GENERATION).exists():
            (folder / GENERATION).write_text("{}")
        self.change(folder, self.name, self.seed)
        return folder

    @property
    def is_encoder(self) -> bool:
        return self.family in ENCODERS or self.family.startswith("bert")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A family's folder, made once."""
    root = tmp_path_factory.mktemp("good")

    def of(family: str) -> Path:
        folder: Path = root / family
        return folder if folder.exists() else FAMILIES[family](family, folder)

    return of


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return share_kernels(tmp_path_factory.mktemp("cache"))


def try_here(change: Change, good: Path, tmp_path: Path, cache: Path) -> bool:
    """Starts a changed checkpoint in this process, and tells whether it was served."""
    folder = change.folder(good, tmp_path / "model")
    more = {} if change.is_encoder else {"kv_memory": "1MiB"}
    settings = Settings(
        **{"model": str(folder), "cache_dir": cache, "port": 0, "metrics": False, "threads": 1},
        **{"weights": "float", "check_integrity": True, "log_level": "error"},
        **more,
    )
    begun = time.monotonic()
    refusal, _, wrong = started_and_asked(settings)
    assert not wrong, f"{change}: {wrong}"
    assert "\n" not in refusal, f"{change}: {refusal}"
    assert len(refusal) < MOST_SENTENCE, f"{change}: {refusal}"
    assert time.monotonic() - begun < MOST_SECONDS, change
    shutil.rmtree(folder)
    return not refusal


def test_a_changed_model_is_refused_or_its_requests_are_answered(good, cache, tmp_path):
    rng = random.Random(5)
    served = [try_here(Change.drawn(rng, "llama"), good("llama"), tmp_path, cache) for _ in range(6)]
    assert 0 < sum(served) < 6


@pytest.mark.stress
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_are_many_of_each_family(family, good, cache, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    served = sum(try_here(Change.drawn(rng, family), good(family), tmp_path, cache) for _ in range(MANY))
    print(f"{served} of {MANY} served")
    assert MANY / 10 < served < MANY


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_the_command_ends_with_a_sentence_or_serves(good, cache, tmp_path):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    served = 0
    for number in range(REAL):
        change = Change.drawn(rng, rng.choice(list(FAMILIES)))
        folder = change.folder(good(change.family), tmp_path / f"{number}")
        server = Server("--model", folder, "--cache-dir", cache, "--threads", "1", wait=False)
        try:
            ready = server.is_ready(MOST_SECONDS)
            wrong = asked_of(server.address)[1] if ready else []
            told = server.log
        finally:
            code = server.stop()
        assert not wrong, f"{change}: {wrong}"
        assert "Traceback" not in told, f"{change}: {told}"
        assert code == (0 if ready else 1), f"{change}: {told}"
        if not ready:
            assert told.strip().splitlines()[-1].startswith("longspan: "), f"{change}: {told}"
        served += ready
    assert 0 < served < REAL
