"""The student of a run."""

from __future__ import annotations

import pytest
import torch
from engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher
from graftvit.checkpoints.teacher import load_teacher
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import StudentConfig
from graftvit.transfer.engine.build import build
from graftvit.transfer.engine.students import input_size, plan_student


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"model": "vit_base_patch16_224"}, (3, 224, 224)),
        ({"model": "vit_base_patch14_dinov2.lvd142m"}, (3, 518, 518)),
        ({"model": ARCHITECTURE, "img_size": 64}, (3, 64, 64)),
        ({"model": ARCHITECTURE, "img_size": (32, 64), "model_args": {"in_chans": 1}}, (1, 32, 64)),
        ({"model": ARCHITECTURE, "model_args": ARGUMENTS}, (1, 8, 8)),
    ],
)
def test_input_size_is_known_without_building(
    settings: dict[str, object], size: tuple[int, int, int]
) -> None:
    assert input_size(StudentConfig.model_validate(settings)) == size


def test_images_are_normalised_as_the_teachers(tmp_path_factory: pytest.TempPathFactory) -> None:
    source = make_teacher(tmp_path_factory.mktemp("teacher") / "vit")
    teacher = load_teacher(f"local-dir:{source}")
    settings = StudentConfig(model=ARCHITECTURE, model_args=ARGUMENTS)
    plan = plan_student(settings, 7, teacher)
    assert (plan.mean, plan.std) == (teacher.mean, teacher.std)
    alone = plan_student(settings, 7, None)
    assert len(alone.mean) == len(alone.std) == 1
    assert plan.create().get_parameter("head.weight").shape == (7, 16)


def test_what_timm_refuses_is_said_in_one_sentence() -> None:
    plan = plan_student(StudentConfig(model=ARCHITECTURE, model_args={**ARGUMENTS, "num_heads": 3}), 7, None)
    with pytest.raises(
        ConfigError, match=r"student.model='vit_tiny_patch16_224' cannot be built with"
    ) as caught:
        plan.create()
    assert "\n" not in str(caught.value)


def test_position_embeddings_start_as_wide_as_asked(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    widths = {}
    for std in (0.2, None):
        parts = build(
            config(folder, student={"pos_embed_std": std, "model_args": {**ARGUMENTS, "embed_dim": 192}})
        )
        widths[std] = float(parts.task.trainable.get_parameter("pos_embed").detach().std())
    assert widths[0.2] == pytest.approx(0.2, rel=0.1)
    assert widths[None] < 0.03


def test_fresh_weights_depend_on_the_seed_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")

    def weights(seed: int, rank: int) -> torch.Tensor:
        torch.rand(rank + 3)
        parts = build(config(folder, seed=seed), rank=rank, world_size=2)
        return parts.task.trainable.get_parameter("blocks.0.attn.qkv.weight")

    assert torch.equal(weights(0, 0), weights(0, 1))
    assert not torch.equal(weights(0, 0), weights(1, 0))
