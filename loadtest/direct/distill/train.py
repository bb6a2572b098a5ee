"""Training by transformers' ``Trainer``, with a loss of distillation and cross-entropy."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from loadtest.direct.distill.types import Listener, Point, Recipe

_HELD_OUT_BLOCKS = 4  # whose loss is followed during training
_LOOKS = 5  # at it, and checkpoints
_POINTS = 100  # of the training's loss


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, temperature: float, weight: float
) -> torch.Tensor:
    """``weight`` x T² x KL(teacher || student) at temperature T, and the rest x cross-entropy of the text.

    Hinton et al. 2015, section 2; T² keeps the gradients' size whatever T is. In nats per token.

    Args:
        student: logits ``[batch, tokens, vocabulary]``.
        teacher: logits of the same shape.
        ids: the text ``[batch, tokens]``.
        temperature: above 0.
        weight: 0 to 1.
    """
    ours, theirs = ((logits / temperature).flatten(0, 1).log_softmax(-1) for logits in (student, teacher))
    soft = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
    hard = functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return weight * soft + (1 - weight) * hard


def bfloat16_pays() -> bool:
    """Whether the matrix products of training are in bfloat16, by autocast: where the processor has them.

    Then they take a quarter of float32's time on a CPU with AVX-512; without instructions for them, longer.
    The weights and the loss stay in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in has)


class _Blocks(Dataset):
    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class _Distiller(Trainer):  # type: ignore[misc]  # transformers has no types
    def __init__(self, teacher: nn.Module, recipe: Recipe, **options: Any) -> None:
        super().__init__(**options)
        self._teacher, self._recipe = teacher, recipe

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: object
    ) -> Any:
        ids = inputs["input_ids"]
        with torch.no_grad():
            theirs = self._teacher(input_ids=ids).logits.float()
        outputs = model(input_ids=ids)
        recipe = self._recipe
        loss = distillation_loss(outputs.logits.float(), theirs, ids, recipe.temperature, recipe.weight)
        return (loss, outputs) if return_outputs else loss


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, listener: Listener) -> None:
        self._listener, self._loss = listener, ""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
        self._listener(f"training{self._loss}", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: object) -> None:
        if "loss" in (logs or {}):
            self._loss = f", loss {float(logs['loss']):.3g}"


def train(
    teacher: nn.Module,
    student: nn.Module,
    recipe: Recipe,
    text: torch.Tensor,
    held_out: torch.Tensor,
    checkpoints: Path,
    listener: Listener,
) -> Sequence[Point]:
    """Trains the student in place, from the last checkpoint if there is one.

    Args:
        teacher: is not changed.
        student: is.
        recipe: how.
        text: token ids ``[blocks, context]``.
        held_out: token ids of the same form, whose loss is followed.
        checkpoints: folder.
        listener: told of progress.
    """
    often = max(1, recipe.steps // _LOOKS)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=recipe.batch,
        optim="adamw_torch",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        seed=recipe.seed,
        logging_steps=max(1, recipe.steps // _POINTS),
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=often,
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=often,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=bfloat16_pays(),
    )
    trainer = _Distiller(
        teacher,
        recipe,
        model=student,
        args=arguments,
        train_dataset=_Blocks(text),
        eval_dataset=_Blocks(held_out[:_HELD_OUT_BLOCKS]),
    )
    trainer.remove_callback(PrinterCallback)  # it writes to standard output
    trainer.add_callback(_Progress(listener))
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / TRAINER_STATE_NAME).exists():  # it is written last: the disk was full, or a kill
            shutil.rmtree(folder)
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    return [
        Point(row["step"], row.get("loss", row.get("eval_loss", 0.0)), "eval_loss" in row)
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
