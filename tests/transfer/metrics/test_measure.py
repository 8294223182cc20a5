"""All metrics together: in one pass over the test images, and the same on any number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graftvit.checkpoints.preprocessing import Preprocessing
from graftvit.models.errors import DataError
from graftvit.transfer.config import DataConfig
from graftvit.transfer.data.loaders import create_eval_loader, create_reference_loader
from graftvit.transfer.metrics.distance import Reader, compared_layers
from graftvit.transfer.metrics.measure import FAMILIES, Against, check_same_classes, measure
from support.runs.engine_runs import tiny_vit

HERE = Path(__file__).resolve().parent
RANK = """
import gc; gc.disable()
import sys, json, torch, torch.distributed as dist
sys.path[:0] = sys.argv[4:]
from test_measure import measured
rank, world, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)
print(json.dumps(measured(rank, world)))
"""


def measured(rank: int = 0, world: int = 1) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    student, other, teacher = (tiny_vit().eval() for _ in range(3))
    config = DataConfig(dataset="digits", eval_batch_size=93, workers=0, train_samples=60)
    spec, ranks = Preprocessing((1, 8, 8), (0.5,), (0.5,)), {"rank": rank, "world_size": world}
    layers = compared_layers(teacher, student)
    readers = {
        "student": Reader(student, layers=layers.student),
        "other": Reader(other, layers=layers.student),
    }
    with torch.no_grad():
        return measure(
            readers,
            {"student": list(FAMILIES), "other": ["top1"]},
            create_eval_loader(config, spec, **ranks),
            reference=create_reference_loader(config, spec, **ranks),
            against=Against(Reader(teacher, layers=layers.teacher), dict.fromkeys(readers, layers)),
        )


def test_each_model_has_what_was_asked_for() -> None:
    found = measured()
    assert set(found) == {"student", "other", "ensemble"}
    assert set(found["other"]) == set(found["ensemble"]) == {"top1", "top5", "loss", "samples"}
    assert {"top1", "knn_top1", "knn_top5", "probe_top1", "cka", "cosine_layer01"} <= set(found["student"])
    assert {numbers["samples"] for numbers in found.values()} == {500}
    assert found["student"]["probe_top1"] > 30, "even random features of digits tell some apart"


def test_labels_of_two_splits_must_mean_the_same() -> None:
    config = DataConfig(dataset="digits", workers=0)
    spec = Preprocessing((1, 8, 8), (0.5,), (0.5,))
    reference, loader = create_reference_loader(config, spec), create_eval_loader(config, spec)
    check_same_classes(reference, loader)
    reference.class_names, loader.class_names = ("a", "c"), ("a", "b")
    with pytest.raises(DataError, match="the training images have no class 'b'"):
        check_same_classes(reference, loader)
    reference.class_names, reference.num_classes = None, 9
    with pytest.raises(DataError, match="these have 10 and 9 of them; set --num_classes"):
        check_same_classes(reference, loader)


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    def start(rank: int) -> subprocess.Popen[bytes]:
        words = [str(rank), "2", str(tmp_path / "group"), str(HERE), str(HERE.parents[1])]
        return subprocess.Popen([sys.executable, "-c", RANK, *words], stdout=subprocess.PIPE)

    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in [start(0), start(1)])
    alone = measured()
    assert first == second
    for name, numbers in alone.items():
        assert first[name] == pytest.approx(numbers, rel=1e-4)
        for key in ("knn_top1", "probe_top1", "top1", "samples"):
            assert first[name].get(key) == numbers.get(key)
