"""`graftvit push`: publish a student on the Hugging Face hub, with its card and its license."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import command_parser, parse_command
from ..say import say, say_aside

if TYPE_CHECKING:
    from ...checkpoints.upload import Pushed, Remote, Upload

EXAMPLES = (
    "graftvit push runs/distill me/vit-b-cifar --dry_run",
    "graftvit push runs/distill#best me/vit-b-cifar --private",
    "graftvit push runs/distill/student_ema me/vit-b-cifar --revision ema --message 'The moving average'",
    "graftvit push exported me/vit-b-imagenet --dataset_name 'ImageNet-1k'",
)
LOG_IN = "Log in first: `hf auth login`, or set HF_TOKEN."


def run(argv: list[str]) -> int:
    """Push a student's folder, or show what would be pushed."""
    parser = command_parser(
        "push",
        "Create a repository on the hub and upload a student's folder in one commit: its weights, its config.json, "
        "a model card and, where timm does not have its architecture, the code that loads it. The student keeps the "
        f"license of the weights that it was made from. {LOG_IN}",
        EXAMPLES,
        usage="DIR ORG/NAME [--flag value ...]",
    )
    text = "run folder, with #best or #ema at its end if you like, or student folder: config.json and weights"
    parser.add_argument("folder", type=Path, metavar="DIR", help=text)
    parser.add_argument(
        "repository", metavar="ORG/NAME", help="repository on the hub; created if it does not exist"
    )
    parser.switch("--private", "create a private repository")
    parser.switch(
        "--public",
        "make the repository public after the upload, also if it is private or private by its owner's default",
    )
    parser.flag("--license", "hub identifier; the teacher's by default", metavar="ID")
    parser.switch(
        "--confirm_license", "confirm that the owners of the teacher allow the license in --license"
    )
    parser.flag("--revision", "branch; created if it does not exist (default: main)", metavar="BRANCH")
    parser.flag("--message", "message of the commit", metavar="TEXT")
    parser.flag("--dataset_name", "name of the evaluation data set in the card", metavar="NAME")
    parser.switch("--dry_run", "show what would be pushed, send nothing")
    arguments, _ = parse_command(parser, argv, only=())
    for flag in ("license", "revision", "message", "dataset_name"):
        if getattr(arguments, flag) is not None and not getattr(arguments, flag).strip():
            raise ConfigError(f"--{flag} is empty: give it a value or leave it out")
    if arguments.private and arguments.public:
        raise ConfigError("--private and --public contradict each other: leave one out")
    from ...checkpoints.upload import plan_upload, push_student, student_folder
    from ...transfer.methods.registry import describe_transfer

    with student_folder(str(arguments.folder)) as folder:
        upload = plan_upload(
            folder,
            arguments.repository,
            license=arguments.license,
            confirm_license=arguments.confirm_license,
            revision=arguments.revision,
            dataset_name=arguments.dataset_name,
            describe_transfer=describe_transfer,
        )
        if arguments.dry_run:
            say(_describe_upload(upload, private=arguments.private, public=arguments.public))
            return 0
        _report_left_out(upload)
        pushed = push_student(
            upload, private=arguments.private, public=arguments.public, message=arguments.message
        )
    say(_describe_pushed(upload, pushed))
    return 0


def _report_left_out(upload: Upload) -> None:
    """Print the files that the upload leaves out."""
    if upload.left_behind:
        say_aside(f"not pushed: {', '.join(upload.left_behind)}\n")
    if upload.needs_package:
        say_aside(f"it loads with graftvit alone: {upload.needs_package}\n")


def _describe_pushed(upload: Upload, pushed: Pushed) -> str:
    from ...checkpoints.card import load_lines

    lines = [pushed.url]
    if not pushed.changed:
        lines.append("The hub already had all files.")
    if pushed.kept_card:
        lines.append(
            "README.md on the hub was edited by a person and is kept; a README.md in the folder would replace it."
        )
    if pushed.private:
        lines.append("It is private; --public makes it public.")
    lines.append(f"license: {_describe_license(upload)}")
    loading = load_lines(upload.config, upload.facts, alone=upload.facts.alone)
    return "\n".join([*lines, "", *loading, ""])


def _describe_upload(upload: Upload, *, private: bool, public: bool) -> str:
    facts = upload.facts
    width = max(len(file.name) for file in upload.files)
    branch = f" (branch {facts.revision})" if facts.revision else ""
    lines = [f"Would push to {facts.repository}{branch}:"]
    lines += [f"  {file.name:<{width}}  {file.size:>14,} bytes" for file in upload.files]
    lines += [f"Not pushed: {', '.join(upload.left_behind)}"] if upload.left_behind else []
    lines += [f"It loads with graftvit alone: {upload.needs_package}"] if upload.needs_package else []
    lines += [*_describe_hub(upload, private=private, public=public), f"License: {_describe_license(upload)}"]
    kind = "your own README.md" if upload.own_card else "generated"
    return "\n".join([*lines, f"Card ({kind}):", "", upload.card.rstrip("\n"), ""])


def _describe_license(upload: Upload) -> str:
    return upload.facts.license or "unknown; give one with --license"


def _describe_hub(upload: Upload, *, private: bool, public: bool) -> list[str]:
    """Describe what the commit would change on the hub, if the hub can be reached."""
    from ...checkpoints.upload import (
        UploadFailedError,
        ask_remote,
        check_visibility,
        keeps_remote_card,
        replaced_and_removed,
    )

    try:
        remote = ask_remote(upload)
    except UploadFailedError as error:
        return [f"On the hub: unknown, because {error.reason}"]
    check_visibility(upload, remote, private=private)
    kept = keeps_remote_card(upload, remote)
    replaced, removed = replaced_and_removed(upload, remote)
    lines = [f"On the hub: {_describe_state(remote)}"]
    if public and not (remote.exists and not remote.private):
        lines.append("Visibility: public after the upload")
    elif not private and not remote.exists:
        lines.append("Visibility: private during the upload, then the owner's default for new repositories")
    if kept:
        replaced.remove("README.md")
        lines.append("Kept there: README.md, edited by a person")
    lines += [f"Replaced there: {', '.join(replaced)}"] if replaced else []
    lines += [f"Removed there: {', '.join(removed)}"] if removed else []
    return lines


def _describe_state(remote: Remote) -> str:
    if not remote.exists:
        return "no repository of this name is visible to you; it would be created"
    kind = "private" if remote.private else "public"
    return f"a {kind} repository" + ("" if remote.commit else " without that branch, which would be created")
