"""`graftvit push`: publish a student on the Hugging Face hub, with its card and its license."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...models.errors import ConfigError
from ..flags import command_parser, parse_command
from ..say import say, say_aside

if TYPE_CHECKING:
    from ...checkpoints.publish.student_files import Upload
    from ...checkpoints.publish.upload import Pushed, Remote

EXAMPLES = (
    "graftvit push runs/distill me/vit-b-cifar --dry_run",
    "graftvit push runs/distill#best me/vit-b-cifar --private",
    "graftvit push runs/distill/student_ema me/vit-b-cifar --revision ema --message 'The moving average'",
    "graftvit push exported me/vit-b-imagenet --dataset_name 'ImageNet-1k'",
)
LOG_IN = "Log in first: `hf auth login`, or set HF_TOKEN."


def run(argv: list[str]) -> int:
    """Push a student's folder, or show what would go up."""
    parser = command_parser(
        "push",
        "Create a repository on the hub and upload a student's folder in one commit: its weights, its config.json "
        "and a model card, nothing else. The student carries the license of the weights that it was made from. "
        f"{LOG_IN}",
        EXAMPLES,
        usage="DIR ORG/NAME [--flag value ...]",
    )
    parser.add_argument(
        "source",
        metavar="DIR",
        help="run folder (#best or #ema behind it), or student folder: config.json and weights",
    )
    parser.add_argument(
        "repository", metavar="ORG/NAME", help="repository on the hub; created if it is not there"
    )
    parser.add_argument("--private", action="store_true", help="create it for you alone")
    parser.add_argument(
        "--public",
        action="store_true",
        help="make it public once all is there, whatever it is or would be by its owner's default",
    )
    parser.add_argument(
        "--license", "--licence", metavar="ID", help="hub identifier; the teacher's by default"
    )
    parser.add_argument(
        "--confirm_license",
        "--confirm_licence",
        action="store_true",
        help="the owners of the teacher allow the license that is named",
    )
    parser.add_argument(
        "--revision", metavar="BRANCH", help="branch; created if it is not there; main by default"
    )
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dataset_name", metavar="NAME", help="what the card calls the data of the results")
    parser.add_argument("--dry_run", action="store_true", help="show what would go up, send nothing")
    arguments, _ = parse_command(parser, argv, only=())
    for flag in ("license", "revision", "message", "dataset_name"):
        if getattr(arguments, flag) is not None and not getattr(arguments, flag).strip():
            raise ConfigError(f"--{flag} is empty: give it a value or leave it out")
    if arguments.private and arguments.public:
        raise ConfigError("--private and --public contradict each other: leave one out")
    from ...checkpoints.publish.student_files import plan_upload
    from ...checkpoints.publish.upload import push_student
    from ...transfer.methods.words import describe_transfer

    with _student_folder(arguments.source) as folder:
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
            say(_dry(upload, private=arguments.private, public=arguments.public))
            return 0
        _behind(upload)
        pushed = push_student(
            upload, private=arguments.private, public=arguments.public, message=arguments.message
        )
    say(_done(upload, pushed))
    return 0


@contextmanager
def _student_folder(source: str) -> Iterator[Path]:
    """The folder of a student as it is; of a run, with its part behind the path, what `graftvit save` writes of it."""
    run = Path(source.partition("#")[0]).expanduser()
    if (run / "config.json").is_file() or not ((run / "checkpoints").is_dir() or (run / "student").is_dir()):
        yield Path(source).expanduser()
        return
    from ...checkpoints.student import save_student

    with TemporaryDirectory(prefix="graftvit-push-") as temporary:
        yield save_student(source, Path(temporary) / "student")


def _behind(upload: Upload) -> None:
    """Say before the upload what it leaves out."""
    if upload.left_behind:
        say_aside(f"left behind: {', '.join(upload.left_behind)}\n")


def _done(upload: Upload, pushed: Pushed) -> str:
    from ...checkpoints.publish.sections import load_lines

    lines = [pushed.url]
    if not pushed.changed:
        lines.append("The hub had all of it already.")
    if pushed.kept_card:
        lines.append(
            "README.md on the hub was edited by a person and stayed; one in the folder would replace it."
        )
    if pushed.private:
        lines.append("It is private; --public makes it public.")
    lines.append(f"license: {_license(upload)}")
    return "\n".join([*lines, "", *load_lines(upload.config, upload.facts), ""])


def _dry(upload: Upload, *, private: bool, public: bool) -> str:
    facts = upload.facts
    width = max(len(file.name) for file in upload.files)
    branch = f" (branch {facts.revision})" if facts.revision else ""
    lines = [f"Would push to {facts.repository}{branch}:"]
    lines += [f"  {file.name:<{width}}  {file.size:>14,} bytes" for file in upload.files]
    lines += [f"Left behind: {', '.join(upload.left_behind)}"] if upload.left_behind else []
    lines += [*_on_the_hub(upload, private=private, public=public), f"License: {_license(upload)}"]
    kind = "your own README.md" if upload.own_card else "generated"
    return "\n".join([*lines, f"Card ({kind}):", "", upload.card.rstrip("\n"), ""])


def _license(upload: Upload) -> str:
    return upload.facts.license or "unknown; --license names one"


def _on_the_hub(upload: Upload, *, private: bool, public: bool) -> list[str]:
    """What the commit would meet there, if the hub can be asked."""
    from ...checkpoints.publish.upload import (
        UploadFailedError,
        ask_remote,
        check_visibility,
        keeps_remote_card,
        replaced_and_removed,
    )

    try:
        remote = ask_remote(upload)
    except UploadFailedError as error:
        return [f"On the hub: not known, as {error.reason}"]
    check_visibility(upload, remote, private=private)
    kept = keeps_remote_card(upload, remote)
    replaced, removed = replaced_and_removed(upload, remote)
    lines = [f"On the hub: {_state(remote)}"]
    if public and not (remote.exists and not remote.private):
        lines.append("Public: once all of it is there")
    elif not private and not remote.exists:
        lines.append("Private until all of it is there, then as new repositories of its owner are")
    if kept:
        replaced.remove("README.md")
        lines.append("Stays there: README.md, edited by a person")
    lines += [f"Replaced there: {', '.join(replaced)}"] if replaced else []
    lines += [f"Removed there: {', '.join(removed)}"] if removed else []
    return lines


def _state(remote: Remote) -> str:
    if not remote.exists:
        return "no such repository that you can see; it would be created"
    kind = "private" if remote.private else "public"
    return f"a {kind} repository" + ("" if remote.commit else " without that branch, which would be created")
