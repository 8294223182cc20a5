"""What of the hub's failures passes by itself, and trying again until it has."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.error import URLError

from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ATTEMPTS = 5
"""So many failures in a row, without a byte of progress, are final."""
FIRST_DELAY = 1.0
"""Seconds before the second attempt; they double with each further one."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask us to wait; the hub counts requests in windows of this length."""
PASSING = (408, 429, 500, 502, 503, 504)
# The client's own transport: requests, or from its version 1 httpx.
TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class ExhaustedError(Exception):
    """A failure that may pass and did not in `attempts` attempts; its cause is the last one."""

    def __init__(self, attempts: int) -> None:
        super().__init__(f"failed in {attempts} attempts")
        self.attempts = attempts


def retried(action: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
    """What `action` returns, tried again while it fails in a way that may pass.

    `progress` counts what is kept of a failed attempt; while it grows, the attempts are not used up.

    Raises the error of `action`: as it is where it does not pass, else as the cause of ExhaustedError.
    """
    attempts, failures, reached = 0, 0, progress()
    while True:
        try:
            return action()
        except Exception as error:
            now, attempts = progress(), attempts + 1
            failures, reached = (1 if now > reached else failures + 1), max(now, reached)
            pause = _pause(error, failures)
            if pause is None and not passes(error):
                raise
            if pause is None:
                raise ExhaustedError(attempts) from error
            logger.debug("trying again in %.1f s after: %s", pause, type(error).__name__)
        time.sleep(pause)


def _pause(error: BaseException, failures: int) -> float | None:
    """Seconds to wait before the next attempt, None where there is no point in one."""
    if not passes(error) or failures >= ATTEMPTS:
        return None
    asked = asked_wait(error)
    if asked is None:
        return FIRST_DELAY * 2.0 ** (failures - 1)
    if asked > LONGEST_WAIT:
        return None
    if asked > 5:
        logger.warning("the hub asks to wait %.0f s before the next request", asked)
    return asked


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    error = origin(error)
    status = status_of(error)
    return is_network(error) if status is None else status in PASSING


def is_network(error: BaseException) -> bool:
    """Whether no answer came, or not all of it."""
    if isinstance(error, OfflineModeIsEnabled) or status_of(error) is not None:
        return False
    known = isinstance(error, (ConnectionError, TimeoutError, URLError))
    return known or type(error).__module__.partition(".")[0] in TRANSPORTS


def origin(error: BaseException) -> BaseException:
    """The error behind "tried so often" and behind the client's "not found in the cache either"."""
    while isinstance(error, (ExhaustedError, LocalEntryNotFoundError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the response that an error is about."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def asked_wait(error: BaseException) -> float | None:
    """The seconds that the server asks to wait, in Retry-After or in the hub's RateLimit header."""
    headers: Any = getattr(getattr(origin(error), "response", None), "headers", {})
    text = str(headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    window = re.search(r"\br=0\b.*\bt=(\d+)", str(headers.get("RateLimit") or ""))
    if window:
        return float(window[1])
    try:
        left = parsedate_to_datetime(text) - datetime.now(timezone.utc)
    except (TypeError, ValueError):  # neither a number nor a date with its zone
        return None
    return max(0.0, left.total_seconds())
