"""Files from the Hugging Face hub, with one sentence for what goes wrong on the way."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..models.errors import CheckpointError

Result = TypeVar("Result")


def download(repository: str, filename: str, revision: str | None) -> Path:
    """The local copy of a file of a hub repository, downloaded where the cache lacks it.

    Raises CheckpointError as `explained`.
    """
    return Path(
        explained(lambda: hf_hub_download(repository, filename, revision=revision), repository, revision)
    )


def try_download(repository: str, filename: str, revision: str | None) -> Path | None:
    """As `download`, but None where the repository has no such file."""

    def attempt() -> Path | None:
        try:
            return Path(hf_hub_download(repository, filename, revision=revision))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    return explained(attempt, repository, revision)


def commit_of(path: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to: …/snapshots/<commit>/file."""
    found = re.search(r"/snapshots/([0-9a-f]{7,64})/", path.as_posix())
    return found[1] if found else None


def explained(action: Callable[[], Result], repository: str, revision: str | None = None) -> Result:
    """Runs `action`, which downloads from `repository`.

    Raises CheckpointError: no such repository, revision or file, a gated one, or no connection; says
    what to do.
    """
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        return action()
    except GatedRepoError as error:
        reason = f"is gated: accept its terms on {page} and log in with `hf auth login`"
        raise CheckpointError(f"{repository} {reason}") from error
    except RepositoryNotFoundError as error:
        reason = (
            f"is not on {constants.ENDPOINT}: check the name, or log in with `hf auth login` if it is private"
        )
        raise CheckpointError(f"{repository} {reason}") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision!r}: {page}/commits lists them"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError, URLError) as error:
        raise CheckpointError(_unreachable(repository)) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{repository} lacks a file that a timm model needs, see {page}: {_line(error)}"
        ) from error
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{repository} cannot be downloaded: {_line(error)}") from error
    except Exception as error:
        # The client's own transport (requests or httpx, by its version) lets some network errors through.
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise CheckpointError(_unreachable(repository)) from error
        raise


def _unreachable(repository: str) -> str:
    return (
        f"{repository} is not in the cache and {constants.ENDPOINT} cannot be reached: check the network, "
        "or download its files elsewhere and give the folder as local-dir:path"
    )


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
