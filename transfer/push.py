"""Publish a model on the Hugging Face hub, from memory or from any source."""

from __future__ import annotations

from typing import Literal

from ..checkpoints.provenance import Pretrained
from ..checkpoints.upload import Pushed, plan_upload, push_student, student_folder
from ..models.errors import check_types
from ..models.given import Model
from .methods.registry import describe_transfer


@check_types()
def push(
    model: Model | Pretrained,
    repository: str,
    *,
    visibility: Literal["private", "public"] | None = None,
    license: str | None = None,
    confirm_license: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dataset_name: str | None = None,
) -> Pushed:
    """Write a model as `graftvit.save` does, and send it to the hub in one commit, with its card and its license.

    If timm does not have its architecture, its code goes with it (`save` with `standalone`), where that can be written.

    Log in first: `hf auth login`, or set HF_TOKEN. `graftvit push --dry_run` shows what would be sent.

    Args:
        model: as of `graftvit.save`; a student folder goes up as it is, with a README.md of yours.
        repository: `org/name`; it is created where it does not exist.
        visibility: "private" refuses a repository that is public, "public" opens one that is not; by default a new one
            is as its owner has them.
        license: hub identifier, by default that of the weights that the model was made from.
        confirm_license: you have made sure that another license than theirs may be named.
        revision: branch, created where it does not exist; main by default.
        message: of the commit.
        dataset_name: what to call the data of the results in the card.

    Returns:
        The address of the commit, and what became of the card.

    Raises:
        CheckpointError: the model cannot be saved, the license is refused, or the hub refuses the push.
        UploadFailedError: with exit code 1, the hub failed or cannot be reached.
        UnsupportedModelError: `model` is no model.
    """
    with student_folder(model) as folder:
        upload = plan_upload(
            folder,
            repository,
            license=license,
            confirm_license=confirm_license,
            revision=revision,
            dataset_name=dataset_name,
            describe_transfer=describe_transfer,
        )
        return push_student(
            upload, private=visibility == "private", public=visibility == "public", message=message
        )
