"""Students side by side: each is the run that it would be alone, and the teacher runs once for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data.loading import TrainBatches
from graftvit.transfer.engine import build
from graftvit.transfer.engine.stages import check_students, train_students
from graftvit.transfer.engine.tasks import AlignTask, TransferTask
from graftvit.transfer.engine.train import train
from support.runs.engine_runs import config, differences, records
from support.runs.engine_students import alone, three
from support.runs.scenarios import RunScenario


class Calls:
    """Counts the calls of functions by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.count = monkeypatch, dict[str, int]()

    def watch(self, owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def counted(*values: Any, **named: Any) -> Any:
            self.count[name] = self.count.get(name, 0) + 1
            return real(*values, **named)

        self.monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(("kind", "passes"), [("distill", 2), ("align", 1), ("copy", 1)])
def test_students_are_the_runs_that_they_are_alone(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, kind: str, passes: int
) -> None:
    """The one of other layers needs another pass of the teacher."""
    calls, students = Calls(monkeypatch), three(kind, tmp_path / "several", teacher)
    with monkeypatch.context():
        for owner in (AlignTask, TransferTask):
            calls.watch(owner, "teach")
        calls.watch(TrainBatches, "__getitem__")
        calls.watch(build, "load_pretrained")
        done = train_students(students)
    assert calls.count == {"teach": 16 * passes, "__getitem__": 16, "load_pretrained": 1}
    assert [result.finished for result in done.results.values()] == [True] * 3
    assert not done.failures
    assert done.signal is None
    for name, run in three(kind, tmp_path / "alone", teacher).items():
        single = train(alone(run, name))
        assert differences(single.output_dir, done.results[name].output_dir) == []
        assert single.metrics == done.results[name].metrics
    assert len({str(records(result.output_dir)) for result in done.results.values()}) == 3


def test_a_teacher_that_shares_the_masks_of_a_student_runs_for_it_alone(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = {"method": "distill", "share_drop_path": True}
    calls = Calls(monkeypatch)
    calls.watch(TransferTask, "teach")

    def students(folder: str) -> dict[str, RunConfig]:
        return {
            "own": config(tmp_path / folder, teacher, transfer=shares),
            "plain": config(tmp_path / folder, teacher, transfer={"method": "distill"}),
        }

    done = train_students(students("several"))
    assert calls.count == {"teach": 16}
    for name, run in students("alone").items():
        assert differences(train(alone(run, name)).output_dir, done.results[name].output_dir) == []


def test_one_that_diverges_stops_alone(tmp_path: Path, teacher: Path) -> None:
    def students(folder: str) -> dict[str, RunConfig]:
        wild = {"blr": 1e25, "clip_grad": None, "warmup_epochs": 0.0}
        return {
            "wild": config(tmp_path / folder, teacher, transfer={"method": "distill"}, optim=wild),
            "tame": config(tmp_path / folder, teacher, transfer={"method": "distill"}),
        }

    done = train_students(students("several"))
    assert list(done.failures) == ["wild"]
    assert "not finite" in str(done.failures["wild"])
    assert list(done.results) == ["tame"]
    single = train(alone(students("alone")["tame"], "tame"))
    assert differences(single.output_dir, done.results["tame"].output_dir) == []
    again = train_students(students("several"))
    assert list(again.failures) == ["wild"]
    assert again.results["tame"].finished


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("distill", 1), ("align", 1), ("copy", 2), ("distill", 2)])
def test_students_that_are_killed_are_the_runs_that_they_are_alone(
    tmp_path: Path, run_scenario: RunScenario, kind: str, ranks: int
) -> None:
    """Killed between steps, while a student saves a state, and while one saves its best."""
    report = run_scenario("engine_students", tmp_path, kind, ranks)
    assert report["ends"] == [[0] * ranks] * 3
    assert report["kills"] == [[-9] * ranks] * len(report["kills"])
    assert report["last"] == [0] * ranks
    assert report["differences"] == {name: [] for name in three(kind, tmp_path, tmp_path)}


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"data": {"batch_size": 8}}, "data.batch_size"),
        ({"seed": 1}, "seed"),
        ({"optim": {"epochs": 3}}, "optim.epochs"),
        ({"optim": {"accum_iter": 2}}, "optim.accum_iter"),
        ({"engine": {"eval_every": 2}}, "engine.eval_every"),
        ({"teacher": {"source": "other"}}, "teacher.source"),
        ({"mode": "finetune"}, "mode"),
        ({"transfer": {"task_weight": 0.0}}, "transfer.task_weight"),
        ({"student": {"compile": True}}, "student.compile"),
        ({"student": {"img_size": 16}}, "student.img_size"),
    ],
)
def test_what_students_share_is_refused_by_name(
    tmp_path: Path, teacher: Path, sections: dict[str, Any], named: str
) -> None:
    first = config(tmp_path, teacher, transfer={"method": "distill"})
    other = config(tmp_path, teacher, **{"transfer": {"method": "distill"}, **sections})
    with pytest.raises(ConfigError, match=named):
        check_students({"first": first, "other": other})
    assert not list(tmp_path.iterdir())


def test_students_that_take_other_images_are_refused(tmp_path: Path, teacher: Path) -> None:
    larger = {"model_args": {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "num_heads": 2}}
    students = {
        "small": config(tmp_path, teacher, transfer={"method": "logits"}),
        "large": config(tmp_path, teacher, transfer={"method": "logits"}, student=larger),
    }
    with pytest.raises(ConfigError, match=r"^students.large takes images"):
        train_students(students)
