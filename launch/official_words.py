"""Words of the command lines of MAE and of the attention transfer code that have another name or no counterpart here.

`docs/from-attention-transfer.md` has the same table for readers. Names that mean the same here are in `fields.ALIASES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from .load_config import Setting

FLAGS = {
    "end_layer": "give --layers: --layers :-6 leaves the last 6 layers out (the other code reads --end_layer and never "
    "uses it)",
    "beta2": "give both betas: --betas 0.9,0.95",
    "cls_token": "give --student.global_pool token",
    "train_qkv": "give --trainable 'qkv|fc_norm'; the head always learns",
    "use_teacher_ema": "name the average in the source: --teacher FILE#ema",
    "dataset_name": "give --dataset, such as folder or torch/cifar10, and --data_path",
    "eval": "`graftvit evaluate SOURCE --data_path DIR` evaluates a model",
    "dist_eval": "leave it out: all processes share every evaluation, and each image counts once",
    "log_dir": "leave it out: curves are written to output_dir",
    "job_dir": "give --output_dir",
    "start_epoch": "leave it out: a run resumes where it stopped",
    "pin_mem": "leave it out: memory is pinned for a GPU",
    "no_pin_mem": "leave it out: memory is pinned for a GPU",
    "world_size": "leave it out: torchrun, srun or `graftvit submit --nodes N` set the number of processes",
    "local_rank": "leave it out: torchrun, srun or `graftvit submit` set it",
    "dist_on_itp": "leave it out: torchrun, srun or `graftvit submit` start the processes",
    "dist_url": "leave it out: torchrun, srun or `graftvit submit` set the address",
    "ngpus": "give `graftvit submit ... --tasks_per_node N`",
    "remode": "leave it out: erased pixels are noise, which is its value 'pixel'",
    "recount": "leave it out: one region is erased, which is its value 1",
    "resplit": "leave it out",
    "cutmix_minmax": "give --cutmix, the alpha of the ratio",
    "mixup_prob": "leave it out: every batch is mixed, which is its value 1.0",
    "mixup_switch_prob": "leave it out: half of the batches use CutMix where both are on, which is its value 0.5",
    "mixup_mode": "leave it out: a batch is mixed as a whole, which is its value 'batch'",
    "norm_pix_loss": "leave it out: it is on by default; --no-norm_pixels turns it off",
}
"""By flag: what to write instead."""
METHODS = ("copy", "copy_q", "copy_k", "copy_v", "distill", "distill_q", "distill_k", "distill_v")


def check_value(key: str, value: str, origin: str) -> None:
    """Raise ConfigError for a value of the other code, in its words; None of ours is refused."""
    instead = ""
    if key == "mode" and value in METHODS:
        instead = f"give --mode transfer --method {value}"
    if key == "student.model" and value.startswith("dual_vit_"):
        size = value.removeprefix("dual_vit_").partition("_")[0]
        instead = f"give --teacher SOURCE and --model vit_{size}_patch16_224"
    if key == "engine.resume" and value == "allow":
        instead = "give --resume auto, the default"
    if instead:
        raise ConfigError(f"{origin} is {value!r}, a value of the attention-transfer code: {instead}")


def check_finetune(settings: Iterable[Setting], aliases: Mapping[str, str], mode: str) -> None:
    """Raise ConfigError for `--finetune` in a mode with a teacher: it named the teacher there, and the student's
    initial weights here. `aliases` are the short names of settings."""
    starts = [name for name, key in aliases.items() if key == "student.init"]
    named = [setting for setting in settings if setting.origin.lstrip("-") in starts]
    if named and mode in TAUGHT:
        raise ConfigError(
            f"{named[-1].origin} names the teacher in the attention-transfer code, and the student's initial weights "
            f"here: give --teacher {named[-1].value} for the teacher, or --init {named[-1].value} for the student"
        )


TAUGHT = ("transfer", "align")
"""Modes with a teacher in every step."""
