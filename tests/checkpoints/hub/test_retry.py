"""Failures of the hub that pass: waited for as long as it asks, given up after a bounded number of attempts."""

from __future__ import annotations

from collections.abc import Callable

import huggingface_hub
import pytest
from graftvit.checkpoints.hub.download import download
from graftvit.checkpoints.hub.retry import ATTEMPTS
from hub_server import COMMIT, Fault, Hub

WEIGHTS = "model.safetensors"
NEW_CLIENT = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 1,
    reason="this client waits on 429 by itself, as it likes",
)


def fault(status: int, times: int, **headers: str) -> Fault:
    return Fault(
        status=status,
        method="HEAD",
        times=times,
        headers={key.replace("_", "-"): value for key, value in headers.items()},
    )


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(server: Hub, waits: list[float], status: int) -> None:
    server.faults.append(fault(status, 2))
    assert download("org/vit", WEIGHTS, None).read_bytes() == server.files["org/vit", COMMIT, WEIGHTS]
    assert waits[:2] == [1.0, 2.0]


@NEW_CLIENT  # an older one also tries by itself
@pytest.mark.parametrize("status", [500, 503])
def test_what_does_not_pass_is_given_up(
    server: Hub, waits: list[float], refused: Callable[..., str], status: int
) -> None:
    server.faults.append(fault(status, 1000))
    assert f"{server.url} fails with {status} in {ATTEMPTS} attempts: try again later" in refused()
    assert len(server.asked("HEAD")) == ATTEMPTS
    assert waits == [1.0, 2.0, 4.0, 8.0]


@NEW_CLIENT
@pytest.mark.parametrize("headers", [{"Retry_After": "7"}, {"RateLimit": '"resolvers";r=0;t=7'}])
def test_the_wait_is_the_one_that_the_hub_asks_for(
    server: Hub, waits: list[float], headers: dict[str, str]
) -> None:
    server.faults.append(fault(429, 1, **headers))
    download("org/vit", WEIGHTS, None)
    assert waits == [7.0]


@NEW_CLIENT
def test_a_limit_that_stays_names_the_wait(
    server: Hub, waits: list[float], refused: Callable[..., str]
) -> None:
    server.faults.append(fault(429, 1000, Retry_After="7"))
    assert refused() == (
        f"{server.url} limits the rate of requests (429 in {ATTEMPTS} attempts): "
        "wait 7 s, or log in with `hf auth login` for a higher limit"
    )
    assert waits == [7.0] * (ATTEMPTS - 1)


@NEW_CLIENT
def test_nobody_waits_an_hour(server: Hub, waits: list[float], refused: Callable[..., str]) -> None:
    server.faults.append(fault(429, 1000, Retry_After="3600"))
    assert "wait 3600 s, or log in" in refused()
    assert not waits


@pytest.mark.parametrize("status", [503, 429])
def test_a_failure_in_the_middle_of_a_download_keeps_what_came(
    server: Hub, waits: list[float], status: int
) -> None:
    server.faults += [
        Fault(cut=5000, method="GET", where="/cdn/"),
        Fault(status=status, method="GET", where="/cdn/", times=2),
    ]
    assert download("org/vit", WEIGHTS, None).read_bytes() == server.files["org/vit", COMMIT, WEIGHTS]
    assert server.sent == len(server.files["org/vit", COMMIT, WEIGHTS])


def test_a_line_that_always_breaks_is_given_up(
    server: Hub, waits: list[float], refused: Callable[..., str]
) -> None:
    server.faults.append(Fault(cut=0, method="GET", where="/cdn/", times=10_000))
    assert f"cannot be reached in {ATTEMPTS} attempts" in refused()
    assert len(server.asked("GET", "/cdn/")) <= 6 * ATTEMPTS
