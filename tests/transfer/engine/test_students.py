"""The student of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.checkpoints.pretrained import Teacher, load_teacher
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig, StudentConfig
from graftvit.transfer.engine.build import build, find_start, settle
from graftvit.transfer.engine.modes import mode_of
from graftvit.transfer.engine.students import input_size, plan_student, resolve_preprocessing
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS, config, make_teacher
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg


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


def settings(**sections: dict[str, object]) -> RunConfig:
    student = {"model": ARCHITECTURE, "model_args": ARGUMENTS} | sections.pop("student", {})
    return RunConfig.model_validate({"student": student, **sections})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """Three models of one channel whose images are made in three ways."""
    loaded = {}
    for name, mean in {"teacher": 0.3, "init": 0.4, "whole": 0.5}.items():
        folder = make_teacher(tmp_path_factory.mktemp("sources") / name, mean=(mean,), crop_pct=mean)
        loaded[name] = load_teacher(f"local-dir:{folder}")
    return loaded


def images_of(config: RunConfig, teacher: Teacher | None = None) -> Preprocessing:
    start = find_start(mode_of(config))
    return resolve_preprocessing(settle(config, start), start or teacher)


def test_images_are_those_of_the_weights_that_a_student_starts_from(sources: dict[str, Teacher]) -> None:
    teacher, init, whole = (sources[name] for name in ("teacher", "init", "whole"))
    from_init = settings(student={"init": init.source})
    assert images_of(from_init, teacher) == images_of(from_init) == init.preprocessing
    from_teacher = settings(student={"init": "teacher"}, teacher={"source": teacher.source})
    assert images_of(from_teacher) == images_of(settings(), teacher) == teacher.preprocessing
    assert resolve_preprocessing(settings(), teacher, whole) == whole.preprocessing
    assert {each.preprocessing.crop_pct for each in (teacher, init, whole)} == {0.3, 0.4, 0.5}


def test_images_of_fresh_weights_are_those_of_the_architecture() -> None:
    found = resolve_preprocessing(settings(), None)
    published = get_pretrained_cfg(ARCHITECTURE)
    assert (found.input_size, found.mean, found.std) == ((1, 8, 8), published.mean[:1], published.std[:1])
    assert found.crop_pct == published.crop_pct


def test_weights_known_by_name_are_not_downloaded() -> None:
    recipe = settings(
        student={"model": "vit_base_patch16_224", "model_args": {}, "init": "vit_base_patch16_224.mae"}
    )
    found = images_of(recipe)
    assert (found.mean, found.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_settings_stand_above_the_weights(sources: dict[str, Teacher]) -> None:
    found = resolve_preprocessing(settings(data={"crop_pct": 0.8, "crop_mode": "border"}), sources["teacher"])
    assert found == replace(sources["teacher"].preprocessing, crop_pct=0.8, crop_mode="border")


def test_what_timm_refuses_is_said_in_one_sentence() -> None:
    config = settings(student={"model_args": {**ARGUMENTS, "num_heads": 3}})
    plan = plan_student(config.student, 7, None, resolve_preprocessing(config, None))
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
