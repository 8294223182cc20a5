"""No path of this machine gets out; what only looks like one stays."""

from __future__ import annotations

import pytest
from graftvit.checkpoints.licenses import public, public_text


@pytest.mark.parametrize(
    ("key", "text", "shown"),
    [
        ("source", "/home/me/mae.pth", "mae.pth"),
        ("source", "runs/mine/student", "student"),
        ("source", "local-dir:/home/me/runs/a#ema", "local-dir:a#ema"),
        ("source", "local-dir:runs/mine/", "local-dir:mine"),
        ("init", "~/weights/my own.safetensors", "my own.safetensors"),
        ("init", "~me/weights/a.pth#student", "a.pth#student"),
        ("data_path", "C:\\Users\\me\\imagenet", "imagenet"),
        ("data_path", "\\\\server\\share\\imagenet", "imagenet"),
        ("data_path", "data/imagenet", "imagenet"),
        ("data_path", "https://host/a/train.tar?token=abc", "train.tar"),
        ("output_dir", "../runs/x", "x"),
        ("anything", "/home/my name/x.json", "x.json"),
        ("anything", "file:///home/me/x.json", "x.json"),
        ("anything", "read --from=/home/me/x.json now", "read --from=x.json now"),
        ("anything", "see D:\\me\\x.json, please", "see x.json, please"),
        ("source", "hf-hub:me/vit@main", "hf-hub:me/vit@main"),
        ("source", "vit_large_patch16_224.mae", "vit_large_patch16_224.mae"),
        ("dataset", "torch/cifar10", "torch/cifar10"),
        ("dataset", "hfds/uoft-cs/cifar100", "hfds/uoft-cs/cifar100"),
        ("trainable", r"blocks\.(0|1)\..*|head|\.x", r"blocks\.(0|1)\..*|head|\.x"),
        ("plan", "*: linear; 9-11: softmax", "*: linear; 9-11: softmax"),
        ("origin_url", "https://host.org/a/b", "https://host.org/a/b"),
        ("aa", "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1"),
        ("note", "1 / 2 and/or 3", "1 / 2 and/or 3"),
        ("source", "", ""),
    ],
)
def test_a_path_is_its_last_component(key: str, text: str, shown: str) -> None:
    assert public_text(text, key) == shown


def test_a_config_is_gone_through_to_the_end() -> None:
    config = {
        "recipe": {
            "data": {"data_path": "/secret/a", "n": 3, "scale": [0.1, None]},
            "list": ["/secret/b", ["~/secret/c"]],
        },
        "graftvit": {"teacher": {"source": "local-dir:/secret/d"}, "init": None},
    }
    shown = public(config)
    assert "secret" not in repr(shown)
    assert shown["recipe"]["data"] == {"data_path": "a", "n": 3, "scale": [0.1, None]}
    assert shown["recipe"]["list"] == ["b", ["c"]]
    assert shown["graftvit"] == {"teacher": {"source": "local-dir:d"}, "init": None}
    assert config["recipe"]["data"]["data_path"] == "/secret/a"  # type: ignore[index, call-overload]
