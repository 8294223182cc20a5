"""A user's script: `test_typing.py` holds that type checkers refuse each line marked `wrong`, and no other."""

from __future__ import annotations

from pathlib import Path

import graftvit
import torch
from graftvit.transfer import LossEntry
from torch import nn

images = torch.zeros(2, 3, 224, 224)
teacher = graftvit.load_pretrained("vit_small_patch16_224", img_size=(224, 224), position_embedding="mae")
student: nn.Module = graftvit.load("runs/scratch/student", num_classes=10, dtype=torch.float32)

dual = graftvit.DualViT(
    teacher, student, method="distill", layers="first:9", heads="mean", loss="kl", weight=3
)
dual = graftvit.DualViT({"a": teacher, "b": Path("b")}, "runs/c", "copy", layers=[0, 3], heads=[0, 1])
dual = graftvit.DualViT(teacher, student, "distill_q", layers=[(0, 1)], calibration=images, reduction="mean")
dual = graftvit.DualViT(
    teacher,
    student,
    losses=[{"method": "feature", "tokens": "both", "weight": 0.5, "teacher": "a"}, LossEntry(method="mine")],
    share_drop_path=True,
)
loss: torch.Tensor = dual(images).transfer_loss
divergences: dict[str, float] = dual.map_divergences(images)

converted: nn.Module = graftvit.convert(student, {0: "linear"}, weights="mlp", without=["bias"], seed=1)
alignment = graftvit.Alignment(teacher, converted, loss="output")
by_layer: dict[int, torch.Tensor] = graftvit.attention_maps(dual, images, layers="0,5,9-11")
accuracy: float = graftvit.evaluate(dual, "photographs").top1
both: float = graftvit.evaluate({"one": dual, "two": "runs/c"}, [(images, torch.zeros(2))])["one"].top1
folder: Path = graftvit.save(dual, "student", dtype=torch.bfloat16, overwrite=True)
graftvit.save("runs/c#ema", folder, img_size=384)
graftvit.export(folder, "student.onnx", format="onnx", dynamic=["batch", "resolution"], normalize=True)
graftvit.deploy(dual, "phone", folder, target="onnx-int8", drop=1.0).lines()
graftvit.push(folder, "me/student", visibility="private", license="mit", message="first")

graftvit.load("runs/c", imgsize=384)  # wrong
graftvit.load_pretrained("runs/c", position_embedding="linear")  # wrong
graftvit.DualViT(teacher, student, "distil")  # wrong
graftvit.DualViT(teacher, student, "distill", layer="all")  # wrong
graftvit.DualViT(teacher, student, "distill", loss="mse")  # wrong
graftvit.DualViT(teacher, student, "distill", reduction="avg")  # wrong
graftvit.DualViT(teacher, student, "distill", weight="big")  # wrong
graftvit.DualViT(teacher, student, losses=[{"methd": "feature"}])  # wrong
graftvit.DualViT(teacher, student, losses=[{"method": "feature", "tokens": "all"}])  # wrong
graftvit.convert(student, "*: linear", weights="al")  # wrong
graftvit.Alignment(teacher, converted, match="output")  # wrong
graftvit.Alignment(teacher, converted, loss="outptu")  # wrong
graftvit.attention_maps(dual, images, layer=3)  # wrong
graftvit.evaluate(dual, 3)  # wrong
graftvit.save(dual, "student", imgsize=384)  # wrong
graftvit.export(dual, "student.onnx", format="onx")  # wrong
graftvit.push(dual, "me/student", visibility="hidden")  # wrong
