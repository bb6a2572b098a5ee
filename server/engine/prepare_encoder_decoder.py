"""From settings and a folder with an encoder-decoder to a model that is checked with its attention."""

from __future__ import annotations

from pathlib import Path

from server.engine.native import log_native, set_native_level
from server.engine.prepare import Prepared, Report, cache_dtype, choose_attention, chosen_device
from server.errors import RefusedError
from server.models.encoder_decoders.load import load_encoder_decoder
from server.models.encoder_decoders.prove import prove
from server.models.prove_kernel import prove_kernel
from server.models.refusing import refusing
from server.settings import Settings
from server.sizes import Sizes


def prepare_encoder_decoder(settings: Settings, folder: Path, report: Report) -> Prepared:
    """Loads the model, chooses its attention and checks the two together.

    Args:
        settings: of the server.
        folder: the model, a Hugging Face folder.
        report: told what is going on, with the share done.

    Raises:
        RefusedError: the model, the settings and the machine don't go together; the sentence says why.
    """
    _refuse_settings(settings)
    device = chosen_device(settings)
    page_size = Sizes.of(settings, device).page_size
    code = set_native_level(settings)
    if device == "cpu":
        log_native(code)
    found = load_encoder_decoder(folder, settings.dtype, device, settings.max_context, page_size, report)
    loaded = found.loaded
    assert loaded.halves is not None
    kv_dtype = cache_dtype(settings, loaded)
    attention = choose_attention(settings, page_size, loaded, device, kv_dtype)
    if not attention.pattern.dense:
        raise RefusedError(
            f"--attention {settings.attention}: the decoder of an encoder-decoder sees all of its own tokens "
            "and all of its source; choose --attention full"
        )
    report("checking", 0.9)
    with refusing(loaded.architecture, "the start-up check"):
        prove(loaded, found.own, attention, page_size, kv_dtype)
        prove_kernel(attention, device, loaded.dtype, kv_dtype, page_size)
    return Prepared(loaded, device, str(loaded.dtype).removeprefix("torch."), kv_dtype, attention, found.info)


def _refuse_settings(settings: Settings) -> None:
    """Refuses settings that would have no effect.

    Raises:
        RefusedError: names the first.
    """
    for given, flag, instead in (
        (settings.weights not in ("auto", "float"), "--weights", "they stay floats"),
        (settings.rope_scaling is not None or settings.rope_option, "--rope-scaling", "it has no RoPE"),
        (settings.chat_template is not None, "--chat-template", "its prompt is a text to be transformed"),
        (settings.speculate != "off", "--speculate", "none of its tokens are drafted"),
    ):
        if given:
            raise RefusedError(f"{flag}: the model is an encoder-decoder, and {instead}; leave it out")
