"""What a cache keeps of targets is what its dense definition gives; a run with it is the live run on such targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graftvit.models.copying import teacher_view
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.train import train
from graftvit.transfer.target_shards import TargetForm
from support.runs.engine_runs import config, differences, make_teacher
from torch import Tensor

PATCHES = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [0.01, 1, 90]
).view(3, 1, 1, 1)


def dense_int8(values: Tensor) -> Tensor:
    """Each vector by itself, number by number."""
    rows = []
    for row in values.reshape(-1, values.shape[-1]):
        scale = row.abs().max() / 127
        rows.append(torch.stack([torch.round(each / scale) * scale for each in row]))
    return torch.stack(rows).reshape(values.shape)


def dense_top(logits: Tensor, count: int) -> Tensor:
    rows = []
    for row in logits:
        last = row.sort().values[-count - 1]
        rest = row.masked_fill(row > last, -torch.inf).logsumexp(0) - math.log(len(row) - count)
        rows.append(torch.where(row > last, row, rest))
    return torch.stack(rows)


def test_int8_is_wrong_by_at_most_half_of_its_scale() -> None:
    form = TargetForm("int8")
    packed = form.pack({"teacher.patches": PATCHES})
    kept, scale = packed["teacher.patches"], packed["teacher.patches.scale"]
    assert (kept.dtype, scale.shape) == (torch.int8, (3, 4, 6))
    found = form.unpack(packed)["teacher.patches"]
    torch.testing.assert_close(found, dense_int8(PATCHES))
    assert ((found - PATCHES).abs() <= scale[..., None] / 2 * (1 + 1e-5)).all()
    zeros = {"a.pooled": torch.zeros(2, 4)}
    assert torch.equal(form.unpack(form.pack(zeros))["a.pooled"], zeros["a.pooled"])


@pytest.mark.parametrize(("side", "grid"), [(2, (2, 3)), (4, (1, 2))])
def test_patches_are_averaged_over_squares(side: int, grid: tuple[int, int]) -> None:
    form = TargetForm(pool=side)
    found = form.unpack(form.pack({"teacher.patches": PATCHES}))["teacher.patches"]
    dense = F.adaptive_avg_pool2d(PATCHES.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, dense)
    with pytest.raises(ConfigError, match=r"cache_pool=.*does not say how its patches lie"):
        form.pack({"teacher.patches": PATCHES.flatten(1, 2)})


def test_the_largest_logits_are_kept_and_the_others_have_their_probability() -> None:
    logits = 4 * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    form = TargetForm(top=3, classes=12)
    packed = form.pack({"teacher.classes": logits})
    found = form.unpack(packed)["teacher.classes"]
    torch.testing.assert_close(found, dense_top(logits, 3))
    largest = logits.topk(3).indices
    torch.testing.assert_close(found.softmax(1).gather(1, largest), logits.softmax(1).gather(1, largest))
    assert sum(each[0].nbytes for each in packed.values()) == 4 * (3 + 1) + 2 * 3
    with pytest.raises(ConfigError, match="cache_top=12 is no part of the teacher's 12 classes"):
        TargetForm(top=12, classes=12)


BOTH = {"method": "feature", "tokens": "both"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[str, Tensor], Tensor]]] = {
    "exact": (BOTH, {}, lambda name, values: values),
    "int8": (BOTH, {"cache_type": "int8"}, lambda name, values: dense_int8(values)),
    "pooled": (
        {"method": "feature", "tokens": "patches"},
        {"cache_type": "bf16", "cache_pool": 2},
        lambda name, values: values.mean((1, 2), keepdim=True).bfloat16(),
    ),
    "top": (
        {"method": "logits", "temperature": 2.0},
        {"cache_top": 3},
        lambda name, values: dense_top(values, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cached_run_is_the_live_one_on_targets_of_its_form(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, form, dense = CASES[case]
    source = make_teacher(tmp_path / "teacher")

    def run(name: str, **kept: Any) -> RunConfig:
        data = {"mixup": 0.0, "views": 0, "crop_scale": (0.08, 1.0), "train_samples": 40}
        return config(
            tmp_path / name,
            source,
            transfer={**transfer, **kept},
            data=data,
            engine={"evaluate_teacher": False},
        )

    train(run("cached", cache=str(tmp_path / "cache"), **form))
    forward = teacher_view.WholeModel.forward

    def rounded(view: teacher_view.WholeModel, images: Tensor) -> None:
        forward(view, images)
        whole = view.tape.whole
        whole.update({name: dense(name, values) for name, values in whole.items()})

    with monkeypatch.context() as patch:
        patch.setattr(teacher_view.WholeModel, "forward", rounded)
        train(run("live"))
    assert differences(tmp_path / "live", tmp_path / "cached") == []
