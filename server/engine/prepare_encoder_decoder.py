"""From settings and a folder with an encoder-decoder to a model that is checked with its attention."""

from __future__ import annotations

from pathlib import Path

from server.engine.native import log_native, set_native_level
from server.engine.prepare import Prepared, Report, cache_dtype, choose_attention, chosen_device
from server.errors import RefusedError
from server.models.encoder_decoders.load import load_encoder_decoder
from server.models.encoder_decoders.packed import pack_linears
from server.models.encoder_decoders.prove import prove
from server.models.prove_kernel import prove_kernel
from server.models.quantize import check_form, is_packed
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
    device = chosen_device(settings)
    _refuse_settings(settings, device)
    check_form(settings.weights, device)
    page_size = Sizes.of(settings, device).page_size
    code = set_native_level(settings)
    if device == "cpu":
        log_native(code)
    to_pack = is_packed(settings.weights)
    found = load_encoder_decoder(
        folder, settings.dtype, device, settings.max_context, page_size, report, to_pack=to_pack
    )
    loaded = found.loaded
    assert loaded.halves is not None
    weights = str(loaded.dtype).removeprefix("torch.")
    kv_dtype = cache_dtype(settings, loaded, settings.weights)
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
        if to_pack:  # what was proven of floats then holds, as a packed layer computes each row by itself
            report("packing the weights", 0.92)
            weights = pack_linears(loaded.model, settings.weights)
    return Prepared(loaded, device, weights, kv_dtype, attention, found.info)


def _refuse_settings(settings: Settings, device: str) -> None:
    """Refuses settings that would have no effect.

    Raises:
        RefusedError: names the first.
    """
    for given, flag, instead in (
        (is_packed(settings.weights) and device != "cpu", "--weights", "its weights are packed on CPUs only"),
        (settings.rope_scaling is not None or settings.rope_option, "--rope-scaling", "it has no RoPE"),
        (settings.chat_template is not None, "--chat-template", "its prompt is a text to be transformed"),
        (settings.speculate != "off", "--speculate", "none of its tokens are drafted"),
    ):
        if given:
            raise RefusedError(f"{flag}: the model is an encoder-decoder, and {instead}; leave it out")
