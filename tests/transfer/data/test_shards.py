"""WebDataset shards, read with the real package from local files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import create_eval_loader, create_train_loader
from support.files.data_sets import encoded, write_shards, write_tar

pytest.importorskip("webdataset")

SPEC = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)


def config(root: Path, **keys: Any) -> DataConfig:
    common = {
        "dataset": "wds/shards",
        "data_path": str(root),
        "num_classes": 2,
        "batch_size": 2,
        "workers": 0,
    }
    return DataConfig(**common | keys)  # type: ignore[arg-type]


def labels(loader: Any) -> list[int]:
    return sorted(int(target) for _, targets, valid in loader for target in targets[valid])


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png"])
@pytest.mark.parametrize("workers", [0, 1])
def test_shards_are_trained_on_and_evaluated(tmp_path: Path, suffix: str, workers: int) -> None:
    settings = config(write_shards(tmp_path, suffix=suffix), workers=workers)
    train = create_train_loader(settings, SPEC, seed=0)
    assert (train.num_samples, train.batches_per_epoch) == (8, 4)
    assert len(list(train.epoch(0))) == 4
    assert labels(create_eval_loader(settings, SPEC)) == [0] * 4 + [1] * 4


def test_the_label_may_be_a_field_and_the_shards_a_pattern(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "_info.json").unlink()
    shards = "validation-{0000..0001}.tar|8"
    settings = config(tmp_path, val_split=shards, label_column="kind", image_column="jpg")
    assert labels(create_eval_loader(settings, SPEC)) == [0] * 4 + [1] * 4


def test_what_is_missing_is_one_sentence(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"colour.*kind"):
        labels(create_eval_loader(config(tmp_path, label_column="colour"), SPEC))
    (tmp_path / "_info.json").unlink()
    with pytest.raises(DataError, match=r"data\.train_split=") as caught:
        create_train_loader(config(tmp_path), SPEC, seed=0)
    assert "_info.json" in str(caught.value)


def test_samples_without_a_label_do_not_vanish(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0000.tar", {"0.jpg": encoded(0, "JPEG"), "1.jpg": encoded(1, "JPEG")})
    settings = config(tmp_path, val_split="a-{0000..0000}.tar|2")
    with pytest.raises(DataError, match=r"gave none of its 2 images"):
        labels(create_eval_loader(settings, SPEC))
