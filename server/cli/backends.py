"""``longspan backends``: the backends and kernels that work here with a model, and why others do not."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli.shared import UNBROKEN, fail, require_server
from server.cli.signals import INTERRUPTED, interrupts_raise
from server.cli.verdicts import Judged, judge_encoder, judge_encoder_decoder

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from attention.survey import Verdict
    from attention.types import LayerSpec
    from server.engine.native import NativeCode
    from server.models.loaded import LoadedModel
    from server.settings import Settings

_OF_SERVE = "Without it: the setting of `longspan serve`."


def backends(
    model: Annotated[
        str | None, typer.Option(help=f"Local folder, hub name, or GGUF file. {_OF_SERVE}")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(metavar="NAME", help="Show this backend only. Without it: all.")
    ] = None,
    attention_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Judge every backend with this detail; may be repeated."),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help=_OF_SERVE)] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16|float16", help=_OF_SERVE)
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16|float16|float8_e4m3", help=_OF_SERVE)
    ] = None,
    page_size: Annotated[str | None, typer.Option(metavar="INTEGER", help=_OF_SERVE)] = None,
    native_level: Annotated[str | None, typer.Option(metavar="LEVEL", help=_OF_SERVE)] = None,
    cache_dir: Annotated[str | None, typer.Option(metavar="PATH", help=_OF_SERVE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which attention backends and kernels work here.

    With the model, its tasks, and the reasons against the others.
    """
    require_server()
    from server.checks import native_level_refusal
    from server.cli.options import SettingsRefusedError, load

    given = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "page_size": page_size,
        "native_level": native_level,
        "cache_dir": cache_dir,
    }
    try:
        settings = load({name: value for name, value in given.items() if value is not None})
        # Those of a file or the environment are meant for one backend, those given here for each.
        options = load({"attention_option": attention_option or []}).attention_option
    except SettingsRefusedError as error:
        fail(str(error), code=2)
    if sentence := native_level_refusal(settings):
        fail(sentence, code=2)
    os.environ["LONGSPAN_CACHE_DIR"] = str(settings.cache_dir)  # attention, which knows no settings, reads it
    interrupts_raise()  # so that the progress line is closed
    try:
        found = _survey(settings, attention, options)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if isinstance(found, Judged):
        typer.echo(json.dumps(found.document, indent=2) if as_json else found.words)
        return
    name, loaded, code, place, cached, verdicts = found
    if as_json:
        typer.echo(json.dumps(_document(name, loaded, code, place, cached, settings, verdicts), indent=2))
        return
    from rich.console import Console

    from server.engine.speculation.choose import possible_speculation
    from server.sizes import Sizes

    console = Console(width=None if sys.stdout.isatty() else UNBROKEN, highlight=False)
    tokens = Sizes.of(settings, place).page_size
    where = f"on {place}, {_name(loaded.dtype)}, KV cache {cached}, page size {tokens}"
    console.print(f"{name}: {_structure(loaded.layers)}; {where}", markup=False)
    drafting = possible_speculation(settings, place)
    speculation = f"--speculate {', '.join(drafting)}" if drafting else "none"
    console.print(f"Its task: generate. Speculation: {speculation}", markup=False)
    console.print(f"{code}\n", markup=False)
    console.print(_works(verdicts))
    for kernel, products in {
        each: made for verdict in verdicts for each, made in verdict.products.items()
    }.items():
        console.print(f"\nWith packed weights {kernel} computes prompts in products of {products}.")
    if any(verdict.refusal or any(verdict.kernels.values()) for verdict in verdicts):
        console.print()
        console.print(_refused(verdicts))


def _survey(
    settings: Settings, attention: str | None, options: dict[str, str]
) -> tuple[str, LoadedModel, NativeCode, str, str, list[Verdict]] | Judged:
    """Name, model as the server would load it, native code, device, dtype of the KV cache, and verdicts.

    Of an encoder or an encoder-decoder what it can do.
    """
    from server.errors import RefusedError
    from server.models.resolve import resolve_model
    from server.observe.progress import StartProgress

    progress = StartProgress(lambda _: None)
    try:
        report, pickles = progress.report, settings.allow_pickle
        files = resolve_model(settings.model, settings.cache_dir, report, pickles=pickles)
        name = settings.model_name or files.name
        progress.report("importing torch", None)
        from server.models.encoder_decoders.recognize import holds_encoder_decoder
        from server.models.encoders.recognize import holds_encoder

        if holds_encoder(files.folder):
            return judge_encoder(name, files.folder, settings, attention, options, progress.report)
        if holds_encoder_decoder(files.folder):
            return judge_encoder_decoder(name, files.folder, settings, attention, options, progress.report)
        from attention.registry import UnsupportedError
        from attention.survey import survey
        from server.engine.native import set_native_level
        from server.engine.prepare import cache_dtype, load_as_set
        from server.models.lay_out import lay_out
        from server.sizes import Sizes

        code = set_native_level(settings)
        loaded, place = load_as_set(settings, files.folder, progress.report)
        # The cache's default dtype depends on whether weights can be packed.
        weights = ""
        if settings.kv_dtype == "auto":
            loaded, weights, _ = lay_out(loaded, settings.weights, lambda _: None)
        kv_dtype = cache_dtype(settings, loaded, weights)
        try:
            verdicts = survey(
                loaded.layers,
                place,
                kv_dtype,
                Sizes.of(settings, place).page_size,
                backend=attention,
                options=options,
            )
        except UnsupportedError as error:
            raise RefusedError(str(error)) from error
    except RefusedError as error:
        progress.close()
        fail(str(error))
    finally:
        progress.close()
    return name, loaded, code, place, _name(kv_dtype), verdicts


def _structure(layers: list[LayerSpec]) -> str:
    """The properties of a layer that matter to kernels, in words."""
    from attention.kernels.base import layer_ranges

    shapes: dict[str, list[LayerSpec]] = {}
    for layer in layers:
        shape = f"{layer.query_heads} query heads over {layer.kv_heads} KV heads of size {layer.head_size}"
        shape += f", window {layer.window}" if layer.window is not None else ""
        shape += f", soft-cap {layer.softcap:g}" if layer.softcap is not None else ""
        shape += ", learned sinks" if layer.sinks else ""
        shapes.setdefault(shape, []).append(layer)
    return "; ".join(f"{layer_ranges(alike)}: {shape}" for shape, alike in shapes.items())


def _works(verdicts: list[Verdict]) -> Table:
    """A row for each backend or pattern: its options, and the kernels that can."""
    from rich.text import Text

    table = _table("Backend", "Options", "auto takes", "also work")
    for verdict in verdicts:
        name = f"{verdict.backend} ({verdict.origin})" if verdict.origin else verdict.backend
        options = " ".join(f"{key}={value}" for key, value in verdict.options.items() if value)
        taken = Text(verdict.auto, style="green") if verdict.auto else Text("nothing", style="red")
        others = [name for name, reasons in verdict.kernels.items() if not reasons and name != verdict.auto]
        table.add_row(Text(name), Text(options), taken, Text(", ".join(others)))
    return table


def _refused(verdicts: list[Verdict]) -> Table:
    """A row for each kernel and reason, with the backends or patterns that it concerns."""
    from rich.text import Text

    table = _table("Refused", "for", "because")
    concerned: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        label = verdict.options.get("pattern", verdict.backend)
        if verdict.refusal:
            concerned[f"backend {verdict.backend}", verdict.refusal] = [label]
        for kernel, reasons in verdict.kernels.items():
            for reason in reasons:
                concerned.setdefault((f"kernel {kernel}", reason), []).append(label)
    everything = [verdict.options.get("pattern", verdict.backend) for verdict in verdicts]
    for (what, reason), labels in sorted(concerned.items(), key=lambda item: item[0][0]):
        table.add_row(Text(what), Text(_among(everything, labels)), Text(reason))
    return table


def _among(everything: list[str], some: list[str]) -> str:
    """``some``, in the fewest words."""
    others = [each for each in everything if each not in some]
    if len(everything) == 1 or len(others) >= len(some):
        return ", ".join(some)
    return f"all but {', '.join(others)}" if others else "all"


def _table(*columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))


def _document(
    name: str,
    loaded: LoadedModel,
    code: NativeCode,
    place: str,
    cached: str,
    settings: Settings,
    verdicts: list[Verdict],
) -> dict[str, Any]:
    from server.engine.speculation.choose import possible_speculation
    from server.sizes import Sizes

    return {
        "model": name,
        "tasks": ["generate"],
        "speculate": possible_speculation(settings, place),
        "device": place,
        "dtype": _name(loaded.dtype),
        "kv_dtype": cached,
        "page_size": Sizes.of(settings, place).page_size,
        "native": dataclasses.asdict(code),
        "backends": [
            {
                "backend": verdict.backend,
                "origin": verdict.origin,
                "options": verdict.options,
                "auto": verdict.auto,
                "refusal": verdict.refusal,
                "kernels": [
                    {
                        "kernel": kernel,
                        "works": not reasons,
                        "reasons": reasons,
                        "products": verdict.products.get(kernel),
                    }
                    for kernel, reasons in verdict.kernels.items()
                ],
            }
            for verdict in verdicts
        ],
    }


def _name(dtype: torch.dtype) -> str:
    from attention.dtypes import dtype_name

    return dtype_name(dtype)
