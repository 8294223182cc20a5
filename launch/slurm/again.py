"""What a submission into a folder that holds a run goes on with, and what it changes; torch is not loaded for it."""

from __future__ import annotations

from pathlib import Path

import yaml

from ...models.errors import ConfigError, GraftError
from ...transfer.config import RunConfig
from ...transfer.engine.resume import changes, describe_changes, differences, settings
from ..config import load_config
from .files import JobFolder, newest_state
from .progress import current_stage, read_progress
from .requests import SubmissionPlan
from .settings import ClusterConfig

OF_ONE_JOB = ("dependency", "profile", "shared_folders", "sbatch.kill_on_invalid_dep")
"""Resources whose change changes nothing in the run."""


def describe_again(plan: SubmissionPlan, config: ClusterConfig) -> str:
    """One line; empty where all is new, or each job begins anew anyway."""
    if not plan.configs or plan.comparison:
        return ""
    if plan.sweep is not None:
        return _describe_cells(plan)
    run = plan.configs[0]
    stage = current_stage(plan.folder)
    if not (stage / "config.yaml").is_file():
        return ""
    changed = _changed_settings(stage, plan) | _changed_resources(plan.folder, config)
    return f"{_place(stage, run)}; {describe_changes(changed) or 'nothing changed'}"


def refuse_finished(plan: SubmissionPlan) -> None:
    """Raises ConfigError where a single run has nothing left to train, for a job that would find nothing to do."""
    single = len(plan.configs) == 1 and not plan.comparison and plan.sweep is None
    if single and JobFolder(plan.folder).finished and _has_finished(plan.folder, plan.configs[0]):
        raise ConfigError(
            f"{plan.folder} has finished: there is nothing left to train; give more --epochs or another --output_dir, "
            "or --unchecked, which submits it all the same"
        )


def _has_finished(folder: Path, run: RunConfig) -> bool:
    done, limit = read_progress(folder), run.optim.max_steps
    return run.output_dir == folder and (done.step >= limit if limit else done.epoch >= run.optim.epochs)


def _describe_cells(plan: SubmissionPlan) -> str:
    begun = sum(1 for request in plan.requests if newest_state(request.output_dir))
    verb = "goes on with what it has" if begun == 1 else "go on with what they have"
    return f"{begun} of {len(plan.requests)} cells {verb} saved" if begun else ""


def _place(stage: Path, run: RunConfig) -> str:
    """Where the run goes on."""
    if not newest_state(stage):
        return "begins anew, as nothing was saved"
    done, limit = read_progress(stage), run.optim.max_steps
    if stage != run.output_dir:
        return f"resumes in stage {stage.name} at epoch {done.epoch + 1}"
    if _has_finished(stage, run):
        return "has finished: nothing is left to train"
    return f"resumes at epoch {done.epoch + 1} of {f'a run of {limit} steps' if limit else run.optim.epochs}"


def _changed_settings(stage: Path, plan: SubmissionPlan) -> dict[str, tuple[object, object]]:
    """As the run had them; of stages, which have their student from the one before, as they were submitted."""
    run = plan.configs[0]
    if stage != run.output_dir:
        path, text = next(iter(plan.frozen.items()))
        try:
            return differences(_by_stage(path.read_text(encoding="utf-8")), _by_stage(text))
        except (OSError, yaml.YAMLError, KeyError, TypeError):  # it was removed, or had no stages
            return {}
    try:
        before = load_config(stage)
    except GraftError:  # of another version
        return {}
    origins = {"teacher": {"revision": before.teacher.revision}}
    return changes({"config": settings(before), "origins": origins}, run)


def _by_stage(frozen: str) -> dict[str, object]:
    """Name -> settings."""
    return {stage["name"]: stage for stage in yaml.safe_load(frozen)["stages"]}


def _changed_resources(folder: Path, config: ClusterConfig) -> dict[str, tuple[object, object]]:
    submission = JobFolder(folder).submission()
    if submission is None:
        return {}
    now = {
        name: value for name, value in config.model_dump(mode="json").items() if name in submission.resources
    }
    found = differences(submission.resources, now)
    return {key: values for key, values in found.items() if key not in OF_ONE_JOB}
