"""A rank imports what its first step needs, and nothing that only a report, a picture or a search needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.transfer.config import RunConfig
from graftvit.transfer.data import image_folder
from graftvit.transfer.engine.train import train
from support.files.image_folders import class_folder
from support.runs.engine_runs import ARCHITECTURE, ARGUMENTS

NOT_BEFORE_A_STEP = {
    "IPython", "datasets", "matplotlib", "onnx", "onnxruntime", "pandas", "pyarrow", "rich",
    "scipy", "sklearn", "tensorboard", "transformers", "wandb", "webdataset",
}  # fmt: skip
RUN = """
import json, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook

seen = []
register_optimizer_step_pre_hook(lambda *_: seen or seen.extend(sys.modules))
from graftvit.launch.__main__ import main

code = main()
print(json.dumps(seen))
sys.exit(code)
"""
LIBRARY = """
import json, sys
import timm
from graftvit import DualViT, convert, load, save

convert(timm.create_model("vit_tiny_patch16_224", depth=1), "0: linear")
print(json.dumps(list(sys.modules)))
"""
PLAIN = """
import json, sys, timm, torch

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
print(json.dumps(list(sys.modules)))
"""


def modules(script: str, *words: str) -> set[str]:
    """Return the modules that a script prints as its last line."""
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def packages(names: set[str]) -> set[str]:
    return names | {name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def before_the_step(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder: Path = tmp_path_factory.mktemp("run")
    return modules(
        RUN, "train", "digits_teacher", "--output_dir", str(folder), "optim.max_steps=1", "optim.warmup_epochs=0",
        "data.train_samples=64", "data.val_split=none", "engine.trackers=[]",
    )  # fmt: skip


def test_a_rank_imports_nothing_that_no_step_needs(before_the_step: set[str]) -> None:
    assert packages(before_the_step) & NOT_BEFORE_A_STEP == set()


def test_a_rank_imports_little_beyond_timm_and_torch(before_the_step: set[str]) -> None:
    """timm imports torchvision whole, and torch's optimizers import dynamo and sympy: no run is without them."""
    ours = {name for name in before_the_step - modules(PLAIN) if name.split(".")[0] != "graftvit"}
    assert packages(ours) & {"torchvision", "torch._dynamo", "torch._inductor", "sympy", "triton"} == set()
    assert len(ours) < 300, sorted(ours)


def test_the_library_imports_neither_a_trainer_nor_what_draws() -> None:
    assert packages(modules(LIBRARY)) & {*NOT_BEFORE_A_STEP, "accelerate", "submitit"} == set()


def test_a_run_lists_its_images_once_and_a_resumed_run_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[str] = []
    real = image_folder._walk
    monkeypatch.setattr(image_folder, "SETTLING", -(10**15))  # or the folders would have to be older
    monkeypatch.setattr(
        image_folder,
        "_walk",
        lambda found, folder, *rest: (walked.append(folder), real(found, folder, *rest)),
    )
    data = class_folder(tmp_path / "images", train=8, validation=4)
    for steps, folders in ((1, ["train", "validation"]), (2, []), (3, ["train"])):
        train(
            RunConfig(
                mode="scratch",
                output_dir=tmp_path / "run",
                student={"model": ARCHITECTURE, "model_args": ARGUMENTS},
                data={"data_path": str(data), "batch_size": 4, "workers": 0},
                optim={"max_steps": steps, "warmup_epochs": 0},
                engine={"trackers": [], "progress": False, "device": "cpu"},
            )
        )
        assert [Path(folder).name for folder in walked] == folders
        walked.clear()
        if steps == 2:  # an image by another name
            (data / "train" / "dark" / "000.png").rename(data / "train" / "dark" / "new.png")
