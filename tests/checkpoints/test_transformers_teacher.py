"""Models of transformers that timm does not have, from a folder and from a hub, as teachers on the command line."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.checkpoints.model_folders import open_source
from graftvit.checkpoints.transformers_models import load_transformers
from graftvit.launch.plan_text import describe_plan
from graftvit.models.errors import CheckpointError, ConfigError, GraftError
from graftvit.transfer.config import RunConfig
from graftvit.transfer.engine.dry_run import dry_run
from graftvit.transfer.engine.train import train
from support.hub.hub_client import use_hub
from support.hub.hub_server import COMMIT, serve
from support.runs.engine_runs import config, make_teacher, records

transformers: Any = pytest.importorskip("transformers")
CONVNEXT = {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 32, "num_channels": 1}
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4,
    "num_channels": 1,
}  # fmt: skip
RESNET = {
    "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1,
}  # fmt: skip
CASES = {
    "convnext": ("ConvNext", CONVNEXT, (1, 1)),
    "swin": ("Swin", SWIN, (8, 8)),
    "resnet": ("ResNet", RESNET, (4, 4)),
}
PROCESSOR = {"image_mean": [0.4], "image_std": [0.25], "size": {"shortest_edge": 32}}


def make(folder: Path, name: str, *, head: bool = True, **changes: Any) -> Any:
    kind, settings, _ = CASES[name]
    torch.manual_seed(0)
    labels = {"id2label": {number: str(number) for number in range(10)}} if head else {}
    built = getattr(transformers, f"{kind}Config")(**{**settings, **labels, **changes})
    model = getattr(transformers, f"{kind}{'ForImageClassification' if head else 'Model'}")(built).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_transformers(name: str, head: bool, tmp_path: Path) -> None:
    model = make(tmp_path / name, name, head=head)
    found = load_transformers(open_source(str(tmp_path / name)))
    assert found is not None
    assert (found.mean, found.std, found.preprocessing.input_size) == ((0.4,), (0.25,), (1, 32, 32))
    assert found.has_head is head
    assert found.label_names == (tuple("0123456789") if head else None)
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        results = found.model.forward_features(x)
        base = model.base_model(x)
        assert torch.equal(results["pooled"], base.pooler_output.flatten(1))
        if head:
            assert torch.equal(found.model(x), model(x).logits)
        hidden = base.last_hidden_state
        if name == "swin":
            hidden = model.base_model(x, output_hidden_states=True).reshaped_hidden_states[-1]
            hidden = model.base_model.layernorm(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert results["patches"].shape[2:] == CASES[name][2]
    torch.testing.assert_close(results["patches"], hidden)


@pytest.mark.slow
def test_a_run_learns_from_it_and_is_resumed(tmp_path: Path) -> None:
    make(tmp_path / "convnext", "convnext")
    sections: dict[str, Any] = {
        "teachers": {"c": {"source": str(tmp_path / "convnext")}},
        "transfer": {
            "losses": [
                {"method": "distill"},
                {"method": "feature", "teacher": "c", "tokens": "both", "standardize": "phi_s"},
                {"method": "logits", "teacher": "c"},
            ]
        },
        "engine": {"save_every": 2},
    }
    run = config(tmp_path / "run", make_teacher(tmp_path / "vit"), optim={"max_steps": 3}, **sections)
    assert dry_run(run, 1, here=True).footprint.teacher > 0
    assert train(run).finished
    assert "train_logits@c" in records(tmp_path / "run")[-1]
    make(tmp_path / "convnext", "convnext", drop_path_rate=0.1, hidden_sizes=[8, 8, 8, 12])
    with pytest.raises(GraftError, match=r"teachers.c.source=.* holds other weights"):
        train(run)


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def run_of(folder: Path, name: str, steps: int = 2, **sections: Any) -> RunConfig:
    transfer = {"method": "logits", "cache": str(folder / "cache")}
    data = {"mixup": 0.0, "views": 0, "crop_scale": (0.08, 1.0)}
    optim = {"max_steps": steps}
    return config(folder / name, folder / "swin", optim=optim, transfer=transfer, data=data, **sections)


def test_another_configuration_is_another_teacher(tmp_path: Path) -> None:
    make(tmp_path / "swin", "swin")
    train(run_of(tmp_path, "run"))
    change(tmp_path / "swin", hidden_act="relu")
    train(run_of(tmp_path, "other"))
    assert len(list((tmp_path / "cache").iterdir())) == 2, "the targets of another teacher"
    sentence = r"^teacher\.config\.hidden_act='relu', but the run in .* was started with 'gelu'"
    for call in (train, describe_plan):
        with pytest.raises(ConfigError, match=sentence):
            call(run_of(tmp_path, "run", steps=3))


def test_what_changes_no_number_is_the_same_teacher(tmp_path: Path) -> None:
    make(tmp_path / "swin", "swin")
    train(run_of(tmp_path, "run"))
    change(tmp_path / "swin", transformers_version="4.0.0", dtype="float16", _attn_implementation="eager")
    assert train(run_of(tmp_path, "run", steps=3)).steps == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_another_version_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "swin", "swin")
    train(run_of(tmp_path, "run"))
    monkeypatch.setattr("graftvit.checkpoints.provenance.version", lambda name: "99.0")
    with caplog.at_level("WARNING"):
        assert train(run_of(tmp_path, "run", steps=3)).steps == 3
    assert "is now computed by transformers 99.0, graftvit 99.0, and was by" in caplog.text
    assert f"was by transformers {transformers.__version__}, graftvit " in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_without_labels_the_distance_of_features_picks_the_best_state(tmp_path: Path) -> None:
    make(tmp_path / "resnet", "resnet", head=False)
    run = config(
        tmp_path / "run",
        tmp_path / "resnet",
        optim={"max_steps": 2},
        transfer={"method": "feature", "task_weight": 0},
    )
    assert "test_relative_error" in train(run).metrics


def test_it_is_downloaded_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(tmp_path / "resnet", "resnet")
    files = {("org/resnet", COMMIT, path.name): path.read_bytes() for path in (tmp_path / "resnet").iterdir()}
    with serve(files, refs={"org/resnet": {"main": COMMIT}}) as hub:
        use_hub(monkeypatch, hub, tmp_path, token=None)
        found = load_transformers(open_source("hf-hub:org/resnet"))
    assert found is not None
    assert found.revision == COMMIT
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(found.model(x), model(x).logits)


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def say(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(changes)) and None


REFUSED = {
    "a pickle": (to_pickle, "safetensors alone"),
    "text": (edit(model_type="bert", architectures=["BertModel"]), "no model of images alone"),
    "code": (
        edit(model_type="mine", auto_map={"AutoModel": "evil.Mine"}),
        "code beside weights is never run",
    ),
    "quantized": (edit(quantization_config={"bits": 4}), "quantized"),
    "other sizes": (edit(hidden_sizes=[8, 24]), "do not fit its config.json|not whole"),
    "other layers": (edit(depths=[1, 2]), "is not whole: .* of its model are not in its weights"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50) and None, "damaged"),
    "flipped": (say(do_flip_channel_order=True), "flips channels"),
    "scaled": (say(rescale_factor=1.0), "rescale_factor=1.0"),
    "no size": (say(size={"shortest_edge": "x"}), "no size in pixels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_teach_is_named(case: str, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    make(tmp_path / "resnet", "resnet")
    change(tmp_path / "resnet")
    with pytest.raises(CheckpointError, match=message):
        load_transformers(open_source(str(tmp_path / "resnet")))


@pytest.mark.parametrize(("teacher", "message"), [
    ({"model": "resnet18"}, "model='resnet18' is of a model of timm"),
    ({"model_args": {"depth": 3}}, "model_args={'depth': 3} is of a model of timm"),
    ({"revision": "main"}, "revision='main' is of the hub, and .* is on this disk"),
])  # fmt: skip
def test_settings_of_other_sources_are_refused(teacher: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "resnet", "resnet")
    source = {"source": str(tmp_path / "resnet"), **teacher}
    run = config(tmp_path / "run", mode="transfer", teacher=source, transfer={"method": "feature"})
    with pytest.raises(CheckpointError, match=message):
        dry_run(run, 1, here=True)


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    make(tmp_path / "resnet", "resnet")
    (tmp_path / "resnet" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "resnet" / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    edit(
        auto_map={"AutoModelForImageClassification": "evil.Mine", "AutoConfig": "evil.Mine"},
        _attn_implementation="org/kernels",
    )(tmp_path / "resnet")
    assert load_transformers(open_source(str(tmp_path / "resnet"))) is not None
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "resnet", "resnet")
    imported = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CheckpointError, match="transformers is not installed: pip install 'transformers>="):
        load_transformers(open_source(str(tmp_path / "resnet")))


def test_a_vision_transformer_is_left_to_timm(tmp_path: Path) -> None:
    built = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTModel(built).save_pretrained(tmp_path / "vit")
    assert load_transformers(open_source(str(tmp_path / "vit"))) is None
    assert load_transformers(open_source("vit_tiny_patch16_224")) is None


@pytest.mark.parametrize(("sections", "message"), [
    ({"transfer": {"method": "distill"}}, "another library than timm gives features and classes alone"),
    ({"transfer": {"method": "feature"}, "teacher": {"compile": True}}, "teacher.compile=true does not go with"),
    ({"transfer": {"method": "feature"}, "student": {"compile": True}}, "student.compile=true does not go with"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path / "resnet", "resnet")
    source = {"source": str(tmp_path / "resnet"), **sections.pop("teacher", {})}
    with pytest.raises(GraftError, match=message):
        dry_run(config(tmp_path / "run", mode="transfer", teacher=source, **sections), 1, here=True)
