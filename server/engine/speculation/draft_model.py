"""The draft model of ``--speculate draft``: found, loaded like any other, and held against its model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from attention.cache import PagedCache
from server.engine.costs import ModelWeights
from server.engine.prepare import Prepared, Report, prepare
from server.errors import RefusedError
from server.models.encoder_decoders.recognize import holds_encoder_decoder
from server.models.encoders.recognize import holds_encoder
from server.models.executors.base import Executor
from server.models.executors.choose import choose_executor
from server.models.refusing import refusing
from server.models.resolve import ModelFiles, resolve_model
from server.models.tokenizing.files import find_tokenizer
from server.panics import without_panics
from server.settings import Settings

log = logging.getLogger("longspan.engine")

_INSTEAD = "choose a smaller model of the same family, or make one with longspan distill"


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A model that drafts for another.

    Attributes:
        prepared: the model.
        page_size: tokens per page, those of the other's cache.
        source: where it came from.
    """

    prepared: Prepared
    page_size: int
    source: str

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of its cache."""
        prepared = self.prepared
        return PagedCache.bytes_per_page(
            prepared.loaded.layers, self.page_size, prepared.kv_dtype, prepared.attention.pattern
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return ModelWeights.of(self.prepared.loaded.model).stored

    def executor(self, pages: int) -> Executor:
        """The model over a new cache of so many pages."""
        prepared = self.prepared
        cache = PagedCache(
            prepared.loaded.layers,
            pages,
            self.page_size,
            prepared.kv_dtype,
            prepared.device,
            pattern=prepared.attention.pattern,
        )
        return choose_executor(prepared.loaded, prepared.attention, cache)


def prepare_draft(
    settings: Settings, target: Prepared, folder: Path, page_size: int, report: Report
) -> DraftModel | None:
    """Finds and loads the draft model; ``None`` where the settings want none.

    Args:
        settings: of the server.
        target: the model that it is to draft for.
        folder: of that one.
        page_size: tokens per page.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the two don't go together; the sentence says why.
    """
    if settings.speculate != "draft":
        return None

    def told(stage: str, _: float | None) -> None:
        report(f"the draft model: {stage}", 0.94)

    loaded = target.loaded
    if target.attention.expired(loaded.context_length, page_size):
        raise RefusedError(
            f"--speculate draft: every layer of {loaded.architecture} sees a window only, and pages behind "
            "it are freed that the draft model reads; use --speculate ngram"
        )
    asked = f"--draft-model {settings.draft_model}"
    try:
        files = resolve_model(settings.draft_model, settings.cache_dir, told, pickles=settings.allow_pickle)
        if holds_encoder(files.folder) or holds_encoder_decoder(files.folder):
            raise RefusedError("it is an encoder or an encoder-decoder, and a draft is a decoder's")
        _check_vocabularies(files, find_tokenizer(folder, settings.cache_dir, told))
        prepared = prepare(_settings_of_draft(settings), files.folder, told)
        _check_sizes(prepared.loaded.vocabulary_size, loaded.vocabulary_size)
    except RefusedError as error:
        raise RefusedError(f"{asked}: {error}") from error
    draft = DraftModel(prepared, page_size, files.source)
    log.info(
        "drafts are made by %s: weights %s, %.2f GiB; keys and values of a page take %d bytes",
        files.source,
        prepared.weights,
        draft.weight_bytes / 2**30,
        draft.page_bytes,
    )
    if prepared.loaded.context_length < loaded.context_length:
        log.warning(
            "nothing is drafted beyond %d tokens, the context of the draft model",
            prepared.loaded.context_length,
        )
    return draft


def _settings_of_draft(settings: Settings) -> Settings:
    """The settings under which the draft model is loaded: those of its model that say nothing of its weights.

    Rounding changes no token that is output, so that its weights are packed unless they are to stay floats.
    """
    packed = settings.weights == "auto" and settings.dtype in ("auto", "float32")
    return settings.model_copy(
        update={
            "weights": "int8" if packed else settings.weights,
            "attention": "full",
            "attention_option": {},
            "max_context": None,
            "rope_scaling": None,
            "rope_option": {},
        }
    )


def _check_sizes(draft: int, target: int) -> None:
    if draft != target:
        raise RefusedError(
            f"it has a vocabulary of {draft} tokens, and the model that it drafts for one of {target}; "
            f"{_INSTEAD}"
        )


def _check_vocabularies(files: ModelFiles, target: Path | None) -> None:
    """Refuses vocabularies that differ, where both are known."""
    if files.tokenizer is None or target is None:
        return
    with refusing("it", "comparing its tokenizer"):
        own, other = _vocabulary(files.tokenizer), _vocabulary(target)
    if own != other:
        differ = len(own.items() ^ other.items())
        raise RefusedError(
            f"its tokens mean something else than those of the model that it drafts for ({differ} entries of "
            f"both vocabularies are not in the other); {_INSTEAD}"
        )


@without_panics
def _vocabulary(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
