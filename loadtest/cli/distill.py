"""``longspan distill``: trains a small draft model of the operator's own model and text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from server.cli.progress import progress
from server.cli.shared import fail, require_server
from server.cli.signals import INTERRUPTED, signals_raise


def distill(
    text: Annotated[
        list[Path],
        typer.Option("--text", help="UTF-8 file of your own text; may be repeated. Much is better."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the student; the same command continues there.")
    ],
    teacher: Annotated[
        str, typer.Option(help="The model, as for longspan serve --model. Without it: the default model.")
    ] = "",
    layers: Annotated[
        int,
        typer.Option(min=0, help="Layers of the student, taken from the teacher's. 0: an eighth of them."),
    ] = 0,
    context: Annotated[int, typer.Option(min=16, help="Tokens of a block of text.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Blocks of a step.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 400,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Its peak.")] = 5e-4,
    schedule: Annotated[
        str,
        typer.Option(metavar="cosine|inverse_sqrt", help="How the learning rate falls after the warm-up."),
    ] = "cosine",
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps over which the learning rate rises. Without it: a twentieth of --steps."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.01, help="Divides both models' logits in the distillation loss.")
    ] = 2.0,
    weight: Annotated[
        float, typer.Option(min=0, max=1, help="Of the distillation loss; the rest is cross-entropy's.")
    ] = 0.9,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Probability.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    measure: Annotated[
        bool,
        typer.Option(help="Serve the pair at the end, and measure acceptance and speed with and without it."),
    ] = True,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where converted models are kept. Without it: the setting of `longspan serve`."),
    ] = None,
) -> None:
    """Train a small draft model on your own text.

    Writes a Hugging Face folder with the teacher's vocabulary, distillation.json and loss.svg, tells how
    often the teacher would accept its tokens, and whether the pair is faster where it is served. Of the
    default model, 400 steps take about a quarter of an hour on 2 cores with bfloat16 instructions, and longer
    without; fewer --steps take less. Ctrl-C keeps the last checkpoint.
    """
    require_server()
    if schedule not in ("cosine", "inverse_sqrt"):
        fail(f"--schedule {schedule}: choose cosine or inverse_sqrt", code=2)
    if warmup is None:
        warmup = steps // 20
    elif warmup >= steps:
        fail(f"--warmup {warmup} leaves none of {steps} --steps; give fewer", code=2)
    signals_raise()
    from loadtest.direct.distill.report import sentences, served_sentences
    from loadtest.direct.distill.run import distill as run
    from loadtest.direct.distill.run import measure_served
    from loadtest.direct.distill.types import Recipe

    recipe = Recipe(
        teacher=teacher,
        text=tuple(map(str, text)),
        layers=layers,
        context=context,
        batch=batch,
        steps=steps,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        temperature=temperature,
        weight=weight,
        dropout=dropout,
        weight_decay=weight_decay,
        seed=seed,
    )
    try:
        with progress() as listener:
            found = run(recipe, out, cache_dir, listener)
    except KeyboardInterrupt:
        typer.echo(f"longspan: interrupted; the same command continues in {out}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if error.filename is None:  # a disk that is full, mostly
            fail(f"{error}; make room in {out} and repeat the command, which continues there")
        fail(f"{error.filename} can't be read or written: {error.strerror}")
    except ValueError as error:
        fail(str(error))
    for sentence in sentences(found):
        print(sentence)
    if measure:
        try:
            with progress() as listener:
                found = measure_served(found, out, cache_dir, listener)
        except KeyboardInterrupt:
            fail(f"interrupted; the student in {out} is complete, only not measured", INTERRUPTED)
        except (OSError, ValueError) as error:
            fail(f"the student in {out} is complete, but could not be measured: {error}")
        for sentence in served_sentences(found):
            print(sentence)
    print(f"the student is in {out}; serve it with its teacher:")
    model = ["--model", teacher] if teacher else []
    print(f"  {shlex.join(['longspan', 'serve', *model, '--speculate', 'draft', '--draft-model', str(out)])}")
