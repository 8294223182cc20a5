"""The hub through the real client: its cache, revisions, refusals, and names of timm."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from graftvit.checkpoints.architecture import read_timm
from graftvit.checkpoints.hub import commit_of, download, explained, try_download
from graftvit.checkpoints.pretrained import load_pretrained
from graftvit.checkpoints.sources import TimmSource
from graftvit.models.errors import CheckpointError
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save, save_file
from support.hub.hub_client import move_client, use_hub
from support.hub.hub_server import COMMIT, TOKEN, Fault, Hub, closed_port
from support.models.tiny_students import same_weights, save_folder
from torch import Tensor

WEIGHTS = "model.safetensors"
OLD = "b" * 40
Refused = Callable[..., str]


@pytest.fixture
def gone(server: Hub, client: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Takes the hub off the network."""

    def go() -> str:
        address = closed_port()
        move_client(monkeypatch, address)
        return address

    return go


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLD), (OLD, OLD), (COMMIT, COMMIT)]
)
def test_a_branch_a_tag_or_a_commit(server: Hub, client: None, revision: str | None, commit: str) -> None:
    path = download("org/vit", WEIGHTS, revision)
    assert path.read_bytes() == server.files["org/vit", commit, WEIGHTS]
    assert commit_of(path) == commit


def test_a_pinned_commit_stays_while_its_branch_moves(server: Hub, client: None) -> None:
    pinned = download("org/vit", WEIGHTS, None)
    server.refs["org/vit"]["main"] = OLD
    asked = len(server.requests)
    assert download("org/vit", WEIGHTS, COMMIT) == pinned
    assert len(server.requests) == asked
    assert commit_of(download("org/vit", WEIGHTS, None)) == OLD
    assert commit_of(download("org/vit", "config.json", COMMIT)) == COMMIT


def test_the_client_finds_what_was_downloaded(server: Hub, client: None, offline: Callable[[], None]) -> None:
    path = download("org/vit", WEIGHTS, "v1")
    offline()
    assert hf_hub_download("org/vit", WEIGHTS, revision="v1") == str(path)


def test_downloads_of_the_client_are_found(server: Hub, client: None, offline: Callable[[], None]) -> None:
    path = hf_hub_download("org/vit", WEIGHTS)
    sent = server.sent
    assert str(download("org/vit", WEIGHTS, None)) == path
    offline()
    assert str(download("org/vit", WEIGHTS, None)) == path
    assert server.sent == sent


def test_no_network_but_a_cache(
    server: Hub, gone: Callable[[], str], caplog: pytest.LogCaptureFixture
) -> None:
    path = download("org/vit", WEIGHTS, None)
    address = gone()
    with caplog.at_level(logging.WARNING, "graftvit"):
        assert download("org/vit", WEIGHTS, None) == path
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("graftvit"))
    assert said.startswith(f"{address} cannot be asked for org/vit (")
    assert said.endswith(f"using commit {COMMIT} of the cache")


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_hub_that_refuses_later_leaves_the_cache(server: Hub, client: None, status: int) -> None:
    path = download("org/vit", WEIGHTS, None)
    server.faults.append(Fault(status=status, times=1000))
    assert download("org/vit", WEIGHTS, None) == path
    assert download("org/vit", WEIGHTS, COMMIT) == path


def test_no_network_and_no_cache(gone: Callable[[], str], refused: Refused) -> None:
    address = gone()
    assert refused() == (
        f"{WEIGHTS} of org/vit is not in the cache and {address} cannot be reached: check the network, "
        "or download its files elsewhere and give the folder as local-dir:path"
    )


def test_offline_with_a_cache_asks_nothing(
    server: Hub, client: None, offline: Callable[[], None], refused: Refused
) -> None:
    paths = [download("org/vit", WEIGHTS, revision) for revision in (None, "v1")]
    assert try_download("org/vit", "absent", None) is None
    offline()
    asked = len(server.requests)
    assert [download("org/vit", WEIGHTS, revision) for revision in (None, "v1")] == paths
    assert try_download("org/vit", "absent", None) is None
    assert len(server.requests) == asked
    assert refused("config.json").startswith(
        "config.json of org/vit is not in the cache and HF_HUB_OFFLINE is set"
    )


def test_offline_without_a_cache(server: Hub, offline: Callable[[], None], refused: Refused) -> None:
    offline()
    assert refused() == (
        "model.safetensors of org/vit is not in the cache and HF_HUB_OFFLINE is set: unset it, "
        "or download its files elsewhere and give the folder as local-dir:path"
    )
    assert not server.requests


def test_a_server_that_hangs_is_not_waited_for(server: Hub, client: None) -> None:
    path = download("org/vit", WEIGHTS, None)
    server.faults.append(Fault(hang=30, times=1000))
    assert download("org/vit", WEIGHTS, None) == path


def test_a_file_that_the_repository_lacks_is_none(server: Hub, client: None) -> None:
    assert try_download("org/vit", "absent", None) is None
    assert try_download("org/vit", "config.json", "v1") is None


def test_a_failure_that_stays_is_given_up(server: Hub, refused: Refused) -> None:
    server.faults = [Fault(status=503, times=1000)]
    assert f"{server.url} fails with 503: try again later" in refused()
    server.faults = [Fault(status=429, times=1000)]
    assert refused().startswith(f"{server.url} limits the rate of requests (429): wait a while, or log in")
    server.faults = [Fault(cut=0, method="GET", where="/cdn/", times=1000)]
    assert refused().startswith(
        f"{WEIGHTS} of org/vit is not in the cache and {server.url} cannot be reached"
    )


# What the hub refuses: one sentence that says what to do and shows no token.


LOGIN = "log in with `hf auth login` or set HF_TOKEN"


@pytest.fixture
def token(client: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_an_unknown_token(
    server: Hub, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    assert refused() == f"{server.url} refuses your token (401): correct or unset HF_TOKEN"
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_another_one\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert refused() == f"{server.url} refuses your token (401): log in again with `hf auth login`"


def test_gated_without_a_token(server: Hub, refused: Refused) -> None:
    server.gated.add("org/vit")
    page = f"{server.url}/org/vit"
    assert refused() == f"org/vit is gated: accept its terms on {page} and {LOGIN}"


@pytest.mark.usefixtures("token")
def test_gated_with_a_token_that_has_no_access(server: Hub, refused: Refused) -> None:
    server.gated.add("org/vit")
    page = f"{server.url}/org/vit"
    assert refused().startswith(
        f"org/vit is gated and your account has no access: accept its terms on {page}"
    )


@pytest.mark.parametrize("kind", ["gated", "private"])
@pytest.mark.usefixtures("token")
def test_what_the_account_may_read_comes(server: Hub, kind: str) -> None:
    getattr(server, kind).add("org/vit")
    server.readable.add("org/vit")
    assert download("org/vit", "config.json", None).is_file()


def test_a_private_repository_without_a_token(server: Hub, refused: Refused) -> None:
    server.private.add("org/vit")
    assert refused() == f"org/vit is not on {server.url}: check the name, or {LOGIN} if it is private"


@pytest.mark.usefixtures("token")
def test_a_private_repository_of_others(server: Hub, refused: Refused) -> None:
    server.private.add("org/vit")
    assert refused().endswith("check the name, or use a token that may read it if it is private")


@pytest.mark.parametrize(("name", "near"), [
    ("org/vitt", "org/vit"), ("org/VIT", "org/vit"), ("org/bar", "org/bare"), ("orgg/vit", "org/vit"),
    ("org/zzz", None),
])  # fmt: skip
def test_a_misspelt_repository(server: Hub, refused: Refused, name: str, near: str | None) -> None:
    hint = f" (did you mean {near!r}?)" if near else ""
    assert refused(repository=name).startswith(f"{name} is not on {server.url}{hint}: check the name")


def test_a_file_that_is_not_there(server: Hub, refused: Refused) -> None:
    assert (
        refused("modell.safetensors")
        == "org/vit has no 'modell.safetensors'; did you mean 'model.safetensors'?"
    )
    assert refused("x.npz") == "org/vit has no 'x.npz'; it has config.json, model.safetensors"
    server.files |= {("org/vit", COMMIT, f"{number}.txt"): b"" for number in range(9)}
    assert refused("x.npz").endswith(", 7.txt and 3 more")


def test_a_revision_that_is_not_there(server: Hub, refused: Refused) -> None:
    assert refused(revision="mian") == "org/vit has no revision 'mian': did you mean 'main'? it has main, v1"
    assert refused(revision="c" * 40).endswith("it has main, v1")


def test_a_hint_that_fails_hides_nothing(server: Hub, refused: Refused) -> None:
    server.faults.append(Fault(status=500, where="/api/", times=1000))
    page = f"{server.url}/org/vit"
    assert refused("x.npz") == f"org/vit has no 'x.npz'; {page}/tree/main lists what it has"
    assert refused(revision="v2") == f"org/vit has no revision 'v2': {page}/commits lists what it has"
    assert "org/absent is not on" in refused(repository="org/absent")


def test_a_server_that_is_no_hub(server: Hub, refused: Refused) -> None:
    server.faults.append(Fault(status=200, content=b"<html>log in to the hotel</html>", times=1000))
    assert "model.safetensors" in refused() or server.url in refused()


def test_a_name_that_the_hub_cannot_have(refused: Refused) -> None:
    assert refused(repository="org/a b").startswith("org/a b cannot be downloaded: ")


def test_a_cache_that_cannot_be_written(server: Hub, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    assert refused().endswith("set HF_HOME to a folder that can")


@pytest.mark.usefixtures("token")
def test_nothing_shows_the_token(server: Hub, refused: Refused, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = [refused("absent.json"), refused(revision="v9"), refused(repository="org/absent")]
    for status in (400, 401, 403, 404, 429, 500):
        echo = Fault(status=status, headers={"X-Error-Message": f"no access for {TOKEN}"}, times=1000)
        server.faults = [echo]
        said.append(refused())
        server.faults = [
            Fault(cut=1000, method="GET", where="/cdn/"),
            Fault(status=status, where="/cdn/", times=1000),
        ]
        said.append(refused())
    server.faults = []
    download("org/vit", "model.safetensors", None)
    assert not any(TOKEN in text or "secret-of-a-signed-address" in text for text in said)
    # The transport below logs all headers of an answer when it is asked to, this one's echo of the token too.
    logged = [record for record in caplog.records if not record.name.startswith("httpcore")]
    assert not any(TOKEN in record.getMessage() for record in logged)
    assert {one.token for one in server.asked(where="/resolve/")} == {f"Bearer {TOKEN}"}
    assert {one.token for one in server.asked(where="/cdn/")} == {None}


def test_an_error_of_our_own_is_kept_as_it_is() -> None:
    for error in (KeyError("not the hub's"), CheckpointError("as it is")):
        with pytest.raises(type(error)) as caught, explained("org/vit"):
            raise error
        assert caught.value is error


# The hub, through the real client, against a server on this machine.


NAME = "vit_tiny_patch16_224"
PUBLISHED = f"timm/{NAME}.augreg_in21k_ft_in1k"
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def refusal(source: str, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(source, model_args=arguments)
    return str(caught.value)


def test_downloads_and_refusals(
    server: Hub, client: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {**SMALL, "img_size": 16, "patch_size": 4, "num_classes": 3}
    models = [timm.create_model(NAME, **arguments) for _ in range(2)]
    for commit, model in zip((COMMIT, OLD), models, strict=True):
        save_folder(model, tmp_path / commit, NAME, arguments, {"mean": (0.1,) * 3, "std": (0.2,) * 3})
        for path in (tmp_path / commit).iterdir():
            server.files["org/vit", commit, path.name] = path.read_bytes()
        server.files["org/vit", commit, "README.md"] = b"---\nlicense: apache-2.0\n---\n"
    server.files["org/empty", COMMIT, "config.json"] = server.files["org/vit", COMMIT, "config.json"]
    models.append(timm.create_model(NAME, **SMALL, num_classes=1000))
    server.files[PUBLISHED, COMMIT, WEIGHTS] = save(models[2].state_dict())
    teachers = [load_pretrained("hf-hub:org/vit"), load_pretrained("hf-hub:org/vit@v1")]
    teachers.append(load_pretrained(PUBLISHED.removeprefix("timm/"), model_args=SMALL))
    assert all(same_weights(each.model, model) for each, model in zip(teachers, models, strict=True))
    assert [each.revision for each in teachers] == [COMMIT, OLD, COMMIT]
    assert [each.license for each in teachers] == ["apache-2.0"] * 3
    assert [each.mean for each in teachers] == [(0.1,) * 3, (0.1,) * 3, (0.5,) * 3]
    assert all(each.has_head for each in teachers)
    assert f"org/absent is not on {server.url}: check the name" in refusal("hf-hub:org/absent")
    assert "org/vit has no revision 'v9'" in refusal("hf-hub:org/vit@v9")
    assert refusal("hf-hub:org/bare") == "org/bare has no 'config.json'; it has README.md"
    assert "hf-hub:org/empty has a config.json but no weights" in refusal("hf-hub:org/empty")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(load_pretrained("hf-hub:org/vit@v1").model, models[1])


def test_offline_mode_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, closed_port(), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for said in (refusal("hf-hub:org/vit"), refusal(PUBLISHED.removeprefix("timm/"), **SMALL)):
        assert "is not in the cache and HF_HUB_OFFLINE is set: unset it, or download" in said


@pytest.fixture
def published_file(tmp_path: Path) -> tuple[Path, Callable[..., dict[str, Any]]]:
    path = tmp_path / "published.safetensors"
    return path, lambda **more: {
        **SMALL,
        "pretrained_cfg_overlay": {"file": str(path), "num_classes": 3},
        **more,
    }


def test_a_timm_name_with_a_head_and_another_size(
    published_file: tuple[Path, Callable[..., dict[str, Any]]],
) -> None:
    path, arguments = published_file
    model = timm.create_model(NAME, **SMALL, num_classes=3)
    save_file(model.state_dict(), path)
    teacher = load_pretrained(NAME, model_args=arguments())
    assert teacher.architecture == NAME
    assert teacher.has_head
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(teacher.model(images), model.eval()(images))
    small = load_pretrained(NAME, model_args=arguments(), img_size=(64, 96), position_embedding="mae")
    assert small.report.resampled == {"pos_embed": "from grid 14x14 to 4x6 (mae's bicubic)"}
    assert small.model(torch.randn(1, 3, 64, 96)).shape == (1, 3)


def test_published_weights_that_do_not_load(
    published_file: tuple[Path, Callable[..., dict[str, Any]]],
) -> None:
    path, arguments = published_file
    tensors = timm.create_model(NAME, **SMALL, num_classes=3).state_dict()
    save_file({key: value for key, value in tensors.items() if key != "norm.bias"}, path)
    for damage in (lambda: None, lambda: path.write_bytes(path.read_bytes()[:90]), lambda: path.unlink()):
        damage()
        with pytest.raises(CheckpointError, match=r"vit_tiny_patch16_224"):
            load_pretrained(NAME, model_args=arguments())


def test_a_name_without_weights_names_others() -> None:
    with pytest.raises(CheckpointError, match=r"timm publishes no weights for 'vit_base_patch16_xp_224'"):
        read_timm(TimmSource("vit_base_patch16_xp_224"), {})
    with pytest.raises(CheckpointError, match=r"no tag 'may'.*valid: .*vit_large_patch16_224\.mae"):
        load_pretrained("vit_large_patch16_224.may")


# Names of timm: their weights come from the hub like any others, at the commit that is asked for.


TIMM_NAME = "vit_large_patch16_224.mae"
REPOSITORY = f"timm/{TIMM_NAME}"


def tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = timm.create_model(TIMM_NAME, num_classes=0, global_pool="token", **SMALL)
    return {key: torch.randn_like(value) for key, value in model.state_dict().items()}


@pytest.fixture
def published(server: Hub, client: None) -> dict[str, dict[str, Tensor]]:
    """What timm's repository of the name has at its two commits."""
    by_commit = {COMMIT: tensors(0), OLD: tensors(1)}
    for commit, state in by_commit.items():
        server.files[REPOSITORY, commit, WEIGHTS] = save(state)
    server.refs[REPOSITORY] = {"main": COMMIT, "v1": OLD}
    return by_commit


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, COMMIT), ("main", COMMIT), ("v1", OLD), (OLD, OLD), (COMMIT, COMMIT)]
)
def test_a_revision_loads_exactly_that_commit(
    published: dict[str, dict[str, Tensor]], revision: str | None, commit: str
) -> None:
    teacher = load_pretrained(TIMM_NAME, model_args=SMALL, revision=revision)
    assert same_weights(teacher.model, published[commit])
    assert teacher.revision == teacher.report.revision == commit
    assert teacher.license == "cc-by-nc-4.0"


def refused(revision: str | None = None, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(TIMM_NAME, model_args={**SMALL, **arguments}, revision=revision)
    return str(caught.value)


@pytest.mark.usefixtures("published")
def test_refusals_are_those_of_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("v2") == f"{REPOSITORY} has no revision 'v2': it has main, v1"
    server.faults.append(Fault(content=b"other", method="GET", where="/cdn/", times=1000))
    assert refused().startswith(f"{REPOSITORY} cannot be downloaded: ")
    server.faults.clear()
    server.gated.add(REPOSITORY)
    assert refused().startswith(f"{REPOSITORY} is gated: accept its terms on {server.url}/{REPOSITORY}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in refused()


def test_weights_that_are_damaged_on_the_hub(server: Hub, published: dict[str, dict[str, Tensor]]) -> None:
    server.files[REPOSITORY, COMMIT, WEIGHTS] = b"\x08" * 100
    assert refused().startswith(f"timm cannot load the weights of {TIMM_NAME!r}: ")
    del published[OLD]["norm.weight"], published[OLD]["cls_token"]
    server.files[REPOSITORY, OLD, WEIGHTS] = save(published[OLD])
    assert "norm.weight" in refused("v1")


def test_a_pickle_is_taken_where_there_is_no_safetensors_file(
    server: Hub, published: dict[str, dict[str, Tensor]]
) -> None:
    del server.files[REPOSITORY, OLD, WEIGHTS]
    stream = io.BytesIO()
    torch.save(published[OLD], stream)
    server.files[REPOSITORY, OLD, "pytorch_model.bin"] = stream.getvalue()
    assert same_weights(load_pretrained(TIMM_NAME, model_args=SMALL, revision=OLD).model, published[OLD])


def test_a_repository_without_weights_says_what_it_has(
    server: Hub, published: dict[str, dict[str, Tensor]]
) -> None:
    del server.files[REPOSITORY, OLD, WEIGHTS]
    server.files[REPOSITORY, OLD, "README.md"] = b""
    assert refused(OLD).startswith(f"{REPOSITORY} has no 'pytorch_model.bin'")


@pytest.mark.usefixtures("client")
def test_a_revision_of_weights_at_an_address_is_refused(server: Hub) -> None:
    name = "vit_huge_patch14_gap_224.in1k_ijepa"
    with pytest.raises(CheckpointError) as caught:
        read_timm(TimmSource(name, "main"), {})
    address = timm.get_pretrained_cfg(name).url
    assert str(caught.value) == (
        f"revision='main' is of the hub, and timm takes {name!r} from {address}: leave it out"
    )
    assert not server.requests


@pytest.mark.usefixtures("published")
def test_a_file_of_the_callers_own_has_no_revision(server: Hub) -> None:
    said = refused("main", pretrained_cfg_overlay={"file": "own.safetensors"})
    assert said.endswith("timm takes 'vit_large_patch16_224.mae' from own.safetensors: leave it out")
    assert not server.requests


def test_a_commit_in_timms_own_description_is_kept(published: dict[str, dict[str, Tensor]]) -> None:
    pinned = {"pretrained_cfg_overlay": {"hf_hub_id": f"{REPOSITORY}@{OLD}"}}
    assert same_weights(load_pretrained(TIMM_NAME, model_args={**SMALL, **pinned}).model, published[OLD])


@pytest.mark.usefixtures("published")
def test_the_weights_are_not_kept_under_a_place_on_this_disk() -> None:
    weights = read_timm(TimmSource(TIMM_NAME), SMALL)
    assert weights.revision == COMMIT
    assert not {"file", "state_dict"} & weights.pretrained_cfg.keys()
    assert weights.pretrained_cfg["hf_hub_id"] == REPOSITORY
