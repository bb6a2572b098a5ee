"""Models of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from server.errors import RefusedError
from server.models.cache import Report
from server.models.encoders.sentence import pooling_folders

# The files that serving reads, of the repository's top folder; Pooling's config lies in one of its own.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*"]


def fetch_from_hub(name: str, report: Report) -> Path:
    """The folder of a hub model in the hub's own cache, fetched or brought up to date first.

    Without a network the cached copy is used.

    Args:
        name: ``ORGANIZATION/MODEL``.
        report: told the progress.

    Raises:
        RefusedError: there is no such model, it may not be read, or it can't be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    stage = f"fetching {name}"
    report(stage, None)
    try:
        folder = Path(
            snapshot_download(
                name,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                tqdm_class=_progress(stage, report),
            )
        )
        if within := [f"{pooling}/config.json" for pooling in pooling_folders(folder)]:
            snapshot_download(name, revision=folder.name, allow_patterns=within)
    except RefusedError:
        raise
    except GatedRepoError as error:
        raise RefusedError(
            f"{name} is gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
        ) from error
    except RepositoryNotFoundError as error:
        raise RefusedError(
            f"the hub has no model {name} that you may read; check the name, or set HF_TOKEN if it is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise RefusedError(
            f"{name} is not in the local cache and the hub can't be reached; check the network, "
            "or name a folder on this machine: --model FOLDER"
        ) from error
    except Exception as error:  # the network and its libraries fail in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{name} can't be fetched from the hub: {reason}") from error
    return folder


def _progress(stage: str, report: Report) -> type[Any]:
    """A progress bar of tqdm's kind that is not drawn but reported."""
    from tqdm import tqdm

    class Progress(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # huggingface_hub's own addition
            self._nowhere = open(os.devnull, "w")  # noqa: SIM115 (closed with the bar)
            super().__init__(*args, **{**kwargs, "file": self._nowhere, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.unit == "B" and self.total:
                report(stage, min(1.0, self.n / self.total))
            return shown

        def close(self) -> None:
            super().close()
            self._nowhere.close()

    return Progress
