"""A student's own `modeling_graftvit.py`: it gives the same logits in a process that has no graftvit."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import graftvit
import graftvit.models.lit
import pytest
import timm
import torch
import transformers
from graftvit.checkpoints.one_file import for_transformers
from graftvit.checkpoints.upload import plan_upload
from graftvit.launch.cli import main
from graftvit.models import layer_plan
from graftvit.models.attention.base import AttentionOperator, Geometry, Heads, Traits
from graftvit.models.errors import CheckpointError
from graftvit.models.families import family_of, image_size
from safetensors.torch import save_file
from support.models.copied_models import pair, whole
from support.models.dense import tiny as tiny_vit
from support.models.pyramids import tiny as tiny_pyramid
from support.models.tiny_students import ARGUMENTS, NAME
from torch import Tensor, nn

FILE = "modeling_graftvit.py"
ALONE = """
import importlib.util, json, sys
from pathlib import Path
sys.modules["graftvit"] = None
try:
    import graftvit
    sys.exit("there is a graftvit")
except ImportError:
    pass
import torch
from safetensors.torch import load_file
torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(f"of_{folder.name}", folder / "modeling_graftvit.py")
    own = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    told = load_file(folder.with_suffix(".safetensors"))
    models = {folder.name: own.load(folder)}
    if (folder / "auto").exists():
        import transformers
        models[f"auto {folder.name}"] = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    for name, model in models.items():
        out = model(told["images"])
        found[name] = (getattr(out, "logits", out) - told["logits"]).abs().max().item()
    first = next(each for each in models[folder.name].parameters() if each.requires_grad)
    models[folder.name](told["images"]).sum().backward()
    found[f"gradient {folder.name}"] = (first.grad - told["gradient"]).abs().max().item()
print(json.dumps(found))
"""


def vit(depth: int = 2, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(NAME, **{**ARGUMENTS, "img_size": 32, "depth": depth, "patch_size": 4} | changes)


def pyramid(kind: str, plan: str, **how: Any) -> nn.Module:
    model = tiny_pyramid(kind, (32, 32))
    without = ["bias"] if family_of(model).gives_up else []
    return graftvit.convert(model, plan, without=without, **how)


def all_operators() -> nn.Module:
    """A layer of every operator, those of programs and the hashed one too; its last layer stays as it is."""
    names = sorted(layer_plan.BUILT_IN)
    plan = dict(enumerate(names))
    return graftvit.convert(vit(len(names) + 1), plan, calibration=torch.randn(4, 3, 32, 32))


LIT = {"img_size": 32, "embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4)}
STUDENTS: dict[str, Any] = {
    "operators": all_operators,
    "hybrid": lambda: graftvit.convert(
        vit(3), "0: linear(gate=true); 1: linformer(num_keys=6, sharing=layerwise, stochastic=true)"
    ),
    "copying": lambda: whole(*pair("larger images", "copy", torch.float32)),
    "copying_queries": lambda: whole(*pair("rotary", "copy_q", torch.float32)),
    "beit": lambda: graftvit.convert(tiny_vit(dtype=torch.float32, family="beit"), "0: softmax(gate=true)"),
    "pvt": lambda: pyramid(
        "pvt", "stage1: hash(mode=reference, bits=4, anchors=5)", calibration=torch.randn(4, 3, 32, 32)
    ),
    "swin": lambda: pyramid("swin", "stage1: linear; stage2: keep"),
    "ours": lambda: tiny_pyramid("cswin", (32, 32)),
    "lit": lambda: timm.create_model("lit_ti", **LIT),
    "plain": vit,
}
"""Students of each kind; "ours" and "plain" are not converted, and "lit" is made of another architecture of ours."""
BY_TRANSFORMERS = ("operators", "copying", "swin")


@pytest.mark.slow
def test_every_kind_of_student_gives_its_logits_without_graftvit(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in STUDENTS]
    for folder in folders:
        model = STUDENTS[folder.name]().eval()
        graftvit.save(model, folder, standalone=True)
        images = torch.randn(2, 3, *(image_size(model) or (32, 32)))
        logits = model(images)
        first = next(each for each in model.parameters() if each.requires_grad)
        (gradient,) = torch.autograd.grad(logits.sum(), first)
        told = {"images": images, "logits": logits.detach(), "gradient": gradient}
        save_file(told, folder.with_suffix(".safetensors"))
        if folder.name in BY_TRANSFORMERS:
            (folder / "auto").touch()
    command = [sys.executable, "-c", ALONE, *map(str, folders)]
    home = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(STUDENTS) + len(BY_TRANSFORMERS)
    assert max(found.values()) <= 1e-6, found


def test_a_copying_student_runs_in_the_type_that_transformers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    images = torch.randn(1, 3, 32, 48, dtype=torch.bfloat16)
    graftvit.save(STUDENTS["copying"](), tmp_path / "student", standalone=True)
    how = {"trust_remote_code": True, "dtype": torch.bfloat16}
    model = transformers.AutoModel.from_pretrained(tmp_path / "student", **how)
    expected = graftvit.load(tmp_path / "student").to(torch.bfloat16)(images)
    torch.testing.assert_close(model(pixel_values=images).logits, expected, rtol=0.1, atol=0.02)


def test_the_file_refuses_the_folder_of_another_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, plan in (("one", "0: linear"), ("other", "0: window")):
        graftvit.save(graftvit.convert(vit(), plan), tmp_path / name, standalone=True)
    spec: Any = importlib.util.spec_from_file_location("of_one", tmp_path / "one" / FILE)
    own = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "of_one", own)
    spec.loader.exec_module(own)
    with pytest.raises(ValueError, match=r"of another model: it builds .*linear.*, not .*window"):
        own.load(tmp_path / "other")
    own.load(tmp_path / "one")


def test_the_folder_stays_what_timm_and_graftvit_load(tmp_path: Path) -> None:
    model, images = vit().eval(), torch.randn(1, 3, 32, 32)
    graftvit.save(model, tmp_path / "model")
    assert main(["checkpoint", "save", str(tmp_path / "model"), str(tmp_path / "alone"), "--standalone"]) == 0
    assert not (tmp_path / "model" / FILE).exists()
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'alone'}", pretrained=True).eval()
    for loaded in (by_timm, graftvit.load(tmp_path / "alone")):
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    graftvit.save(model, tmp_path / "alone", overwrite=True)
    assert not (tmp_path / "alone" / FILE).exists()


def test_a_push_brings_the_file_where_timm_lacks_the_architecture(tmp_path: Path) -> None:
    graftvit.save(graftvit.convert(vit(), "0: linear"), tmp_path / "converted")
    graftvit.save(vit(), tmp_path / "plain")
    upload, plain = (plan_upload(tmp_path / name, "me/vit") for name in ("converted", "plain"))
    content = {file.name: file.content for file in upload.files if isinstance(file.content, bytes)}
    assert FILE in content
    config = json.loads(content["config.json"])
    assert config["auto_map"]["AutoModel"] == "modeling_graftvit.GraftViTModel"
    assert "AutoModel.from_pretrained" in upload.card
    assert FILE not in {file.name for file in plain.files}


class Mean(AttentionOperator):
    """The mean of the values, or of what `change` makes of them."""

    needs = ("v",)

    def __init__(self, shape: Any, change: str = "") -> None:
        super().__init__(shape)

    @property
    def traits(self) -> Traits:
        return Traits()

    def attend(self, heads: Heads) -> Tensor:
        return _mean(heads.values())

    def macs(self, geometry: Geometry) -> int:
        return 0


def _mean(v_BHND: Tensor) -> Tensor:
    return v_BHND.mean(2, keepdim=True).expand_as(v_BHND)


def inside() -> Any:
    class Hidden(Mean):
        pass

    return Hidden


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    operators = dict(layer_plan.OPERATORS)
    monkeypatch.setattr(layer_plan, "OPERATORS", operators)
    return operators


@pytest.mark.parametrize("create", [inside(), lambda shape: Mean(shape), partial(inside())])
def test_an_operator_that_no_module_defines_is_refused_by_name(
    create: Any, registered: dict[str, Any], tmp_path: Path
) -> None:
    registered["mean"] = create
    model = graftvit.convert(vit(), "0: mean")
    with pytest.raises(CheckpointError, match=r"'mean' is .*, which no module defines"):
        graftvit.save(model, tmp_path / "student", standalone=True)
    assert not (tmp_path / "student").exists()
    graftvit.save(model, tmp_path / "student")
    config = tmp_path / "student" / "config.json"
    earlier = for_transformers(json.loads(config.read_text()))  # it could be, when it was saved
    config.write_text(json.dumps(earlier))
    upload = plan_upload(tmp_path / "student", "me/vit")
    assert "'mean'" in upload.needs_package
    assert not {"auto_map", "model_type"} & {*upload.config}
    assert FILE not in {file.name for file in upload.files}
    assert "modeling_graftvit" not in upload.card


def test_an_operator_of_a_notebook_is_refused(
    registered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mean, "__module__", "__main__")
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    registered["mean"] = Mean
    with pytest.raises(CheckpointError, match="the source of __main__: put it into a file"):
        graftvit.save(graftvit.convert(vit(), "0: mean"), tmp_path / "student", standalone=True)


OWN = '''
import math as m
from collections.abc import Callable as Anything

from graftvit.models import AttentionOperator, register_operator
from graftvit.models.attention.base import Traits as _rows
import helpers_of_mine as helpers
from helpers_of_mine import half as factor

_sizes: dict[str, float] = {}
_sizes["one"] = m.sqrt(1.0)


class Mean(AttentionOperator):
    """Its names are those of other modules, of a builtin, of an import."""

    needs = ("v",)
    resize = 1.0

    @property
    def traits(self):
        return _rows(nonnegative=True)

    @property
    def share_of(self):
        return self._share

    @share_of.setter
    def share_of(self, value):
        self._share = value

    def attend(self, heads):
        forget = [factor(_sizes["one"]) for resize in range(1)]
        if f"sum {sum([resize()], m.pi):.{len(_sizes)}f} {{sum}}" != "sum 3.1 {sum}":
            raise ValueError("a name in braces is another's")
        return helpers.forget(sum(forget, resize())) * heads.values().mean(2, keepdim=True).expand_as(heads.values())

    def macs(self, geometry):
        return 0


def resize():
    return 0.0


def sum(values: Anything, start):
    for each in values:
        start = start + each
    return start


for name in ["mean"]:
    register_operator(name, Mean)
'''

HELPERS = """
def half(x):
    return 0.5 * x


def forget(x):
    return x
"""


def test_names_of_several_modules_stay_apart(
    registered: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "operator_of_mine.py").write_text(OWN)
    (tmp_path / "helpers_of_mine.py").write_text(HELPERS)
    monkeypatch.syspath_prepend(tmp_path)
    __import__("operator_of_mine")
    model, images = graftvit.convert(vit(), "0: mean").eval(), torch.randn(1, 3, 32, 32)
    graftvit.save(model, tmp_path / "student", standalone=True)
    monkeypatch.syspath_prepend(tmp_path / "student")
    for name in ("operator_of_mine", "helpers_of_mine"):
        monkeypatch.setitem(sys.modules, name, None)
    own = __import__("modeling_graftvit")
    assert own.AttentionOperator is not AttentionOperator
    torch.testing.assert_close(own.load(tmp_path / "student")(images), model(images), rtol=0, atol=0)
