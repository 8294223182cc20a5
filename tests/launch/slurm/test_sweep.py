from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from graftvit.launch.fields import leaves
from graftvit.launch.load_config import Setting, load_config, load_stages, parse_override
from graftvit.launch.slurm.sweep import (
    MAX_CELLS,
    Axis,
    as_text,
    cell_configs,
    check_sweep,
    load_sweep,
    parse_axes,
    parse_sweep,
)
from graftvit.models.errors import CheckpointError, ConfigError
from graftvit.transfer.config import RunConfig
from hypothesis import given
from hypothesis import strategies as st

OUT = Path("runs/sweep")


def names(*words: str) -> list[str]:
    return [cell.name for cell in parse_sweep(words, OUT).cells]


def test_a_sweep_is_the_product_in_the_given_order() -> None:
    sweep = parse_sweep(["transfer.layers=first:6,[0,3,5]", "seed=0..1"], OUT)
    assert [cell.name for cell in sweep.cells] == [
        "layers=first-6,seed=0", "layers=first-6,seed=1", "layers=0-3-5,seed=0", "layers=0-3-5,seed=1",
    ]  # fmt: skip
    assert sweep.cells[2].settings == {"transfer.layers": "0,3,5", "seed": "0"}
    assert sweep.cells[2].folder == OUT / "cells" / "layers=0-3-5,seed=0"


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=0..4", ("0", "1", "2", "3", "4")),
        ("seed=3..3", ("3",)),
        ("seed=0..2,7", ("0", "1", "2", "7")),
        ("label_seed=-1..1", ("-1", "0", "1")),
        ("blr=1e-3, 1e-4", ("1e-3", "1e-4")),
        ("transfer.layers=[0,3,5],all", ("0,3,5", "all")),
        ("transfer.layers=[2>0,5>1]", ("2>0,5>1",)),
        ("transfer.layers=[[2,0],[5,1]],all", ("[[2,0],[5,1]]", "all")),
        ("student.plan=linear(feature=relu, scale=2),[0,3: softmax; *: linear]",
         ("linear(feature=relu, scale=2)", "0,3: softmax; *: linear")),
        ("student.model_args={depth: 6, num_heads: 2},{depth: 12}",
         ("{depth: 6, num_heads: 2}", "{depth: 12}")),
        ("student.model_args.img_size=[16,16],[32,32]", ("[16,16]", "[32,32]")),
        ("trainable=[ab].*[cd],.*", ("[ab].*[cd]", ".*")),
        ("trackers=[],[tensorboard,wandb]", ("[]", "tensorboard,wandb")),
        ("data_path=../a,../b", ("../a", "../b")),
        ("aa=none,affine", ("none", "affine")),
    ],
)  # fmt: skip
def test_values(word: str, values: tuple[str, ...]) -> None:
    (axis,) = parse_axes([word])
    assert axis.values == values
    assert parse_axes([str(axis)]) == [axis]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--sweep needs a setting"),
        (["seed"], "'seed' has no values"),
        (["seed="], "seed='' has an empty value"),
        (["seed=0,,1"], "has an empty value"),
        (["seed=0,"], "has an empty value"),
        (["seed=4..0"], "'4..0' is empty; write 0..4"),
        (["seed=0...4"], "'0...4' is no range"),
        (["seed=0.."], "'0..' is no range"),
        (["blr=0.5..1"], "'0.5..1' is no range"),
        (["seed=0..1000"], "more than 1000 values"),
        (["seed=0..99999999999999999"], "more than 1000 values"),
        (["seed=0..999,1000"], "1,001 values"),
        (["seed=0..99", "label_seed=0..10"], "100 x 11 = 1,100 cells"),
        (["seed=0,1,0"], "the value '0' is given twice"),
        (["blr=1e-3,0.001"], "'0.001' is given twice"),
        (["seed=0,1", "seed=2"], "--sweep seed is given twice"),
        (["blr=1", "optim.blr=2"], "--sweep optim.blr is given twice"),
        (["student.model_args={depth: 6}", "student.model_args.depth=3"], "set the same thing"),
        (["output_dir=a,b"], "folder of its own"),
        (["transfer.layer=all"], "did you mean 'transfer.layers'?"),
        (["sed=0..4"], "did you mean 'seed'?"),
        (["img_size.x=1"], "unknown key"),
        (["layers=[0,3"], "'[' is not closed"),
        (["layers=0]"], "']' closes a bracket that was not opened"),
        (["layers=(0]"], "closes a bracket"),
    ],
)
def test_mistakes_get_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(words, OUT)
    assert sentence in str(caught.value)
    assert "--sweep" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_would_be_one_file_are_kept_apart() -> None:
    found = names("model=vit:a,vit-a,VIT-A,///," + "x" * 300)
    assert len({name.casefold() for name in found}) == 5
    assert all(len(name) < 60 for name in found)
    assert names("student.drop_path=0,0.1", "teacher.model=a", "student.model=a") == [
        "drop_path=0,teacher.model=a,student.model=a", "drop_path=0.1,teacher.model=a,student.model=a",
    ]  # fmt: skip


def test_a_long_name_fits_a_file_system() -> None:
    words = [f"student.model_args.{'k' * 60}{i}={'v' * 30},w" for i in range(4)]
    found = names(*words)
    assert len(set(found)) == 16
    assert max(map(len, found)) == 180


KEYS = ["transfer.layers", "optim.blr", "seed", "student.plan", "teacher.model_args.a/b", "data.aa"]
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters=",()[]{}"), min_size=1).filter(
    lambda text: text.strip() == text and not re.fullmatch(r"[-+0-9.]*[0-9][-+0-9.]*", text)
)


@given(
    st.dictionaries(st.sampled_from(KEYS), st.lists(TEXTS, min_size=1, max_size=4), max_size=3, min_size=1)
)
def test_any_values_make_a_product_of_safe_names(axes: dict[str, list[str]]) -> None:
    words = [f"{key}={','.join(f'[{value}]' for value in values)}" for key, values in axes.items()]
    try:
        sweep = parse_sweep(words, OUT)
    except ConfigError as error:
        assert "twice" in str(error)  # noqa: PT017
        return
    assert len(sweep.cells) == math.prod(map(len, axes.values()))
    assert len({cell.name.casefold() for cell in sweep.cells}) == len(sweep.cells)
    assert len({tuple(cell.settings.values()) for cell in sweep.cells}) == len(sweep.cells)
    for cell in sweep.cells:
        assert re.fullmatch(r"[A-Za-z0-9_.+=,~-]+", cell.name)
        assert len(cell.name.encode()) <= 200
    assert parse_sweep([str(axis) for axis in sweep.axes], OUT) == sweep


@given(st.integers(-(10**9), 10**9), st.integers(0, MAX_CELLS - 1))
def test_ranges_hold_both_ends(first: int, more: int) -> None:
    (axis,) = parse_axes([f"label_seed={first}..{first + more}"])
    assert [int(value) for value in axis.values] == list(range(first, first + more + 1))


def test_a_sweep_is_read_back_also_where_it_was_moved(tmp_path: Path) -> None:
    sweep = parse_sweep(["transfer.layers=first:6,all", "seed=0..2"], tmp_path / "old")
    assert load_sweep(tmp_path / "old") is None
    sweep.save()
    assert load_sweep(tmp_path / "old") == sweep
    (tmp_path / "old").rename(tmp_path / "new")
    moved = load_sweep(tmp_path / "new")
    assert moved is not None
    assert moved.cells[0].folder == tmp_path / "new" / "cells" / "layers=first-6,seed=0"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"axes": [{}], "cells": []}', '{"axes": 3}', "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json cannot be read"):
        load_sweep(tmp_path)


def test_a_folder_takes_one_sweep(tmp_path: Path) -> None:
    sweep = parse_sweep(["transfer.layers=[0,3],all", "seed=0..1"], tmp_path)
    check_sweep(sweep)
    sweep.save()
    check_sweep(parse_sweep(["layers=[0,3],all", "seed=0,1"], tmp_path))
    with pytest.raises(
        ConfigError, match=re.escape("(--sweep 'transfer.layers=[0,3],all' --sweep 'seed=0,1')")
    ):
        check_sweep(parse_sweep(["seed=0..1"], tmp_path))


def test_a_run_is_no_sweep(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run that is no sweep"):
        check_sweep(parse_sweep(["seed=0..1"], tmp_path))


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def read_back(folder: Path, text: str) -> RunConfig:
    return load_config(write_recipe(folder, text))


def test_each_cell_has_its_whole_configuration(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "seed: 3\noptim: {epochs: 7}\n")
    sweep = parse_sweep(["transfer.layers=first:6,[0,3]", "seed=0..1"], tmp_path / "out")
    configs = cell_configs(sweep, path, [parse_override("optim.blr=0.5")])
    assert list(configs) == [cell.name for cell in sweep.cells]
    config = read_back(tmp_path, configs["layers=0-3,seed=1"])
    assert (config.transfer.layers, config.seed, config.optim.epochs, config.optim.blr) == ("0,3", 1, 7, 0.5)
    assert config.output_dir == tmp_path / "out" / "cells" / "layers=0-3,seed=1"


def test_a_setting_of_one_loss_is_swept(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, "transfer: {losses: [{method: distill}, {method: feature}]}\n")
    sweep = parse_sweep(["losses[1].weight=1,0.5", "transfer.losses[0].layers=all,[0,3]"], tmp_path / "out")
    configs = cell_configs(sweep, path)
    assert list(configs)[3] == "weight=0.5,layers=0-3"
    first, second = read_back(tmp_path, configs["weight=0.5,layers=0-3"]).transfer.losses
    assert (first.layers, second.weight) == ([0, 3], 0.5)
    with pytest.raises(ConfigError, match="set the same thing"):
        parse_sweep(["losses[1].weight=1,2", "losses=[],[{method: copy}]"], tmp_path)
    with pytest.raises(ConfigError, match=r"there is no entry 2 in losses, which has 2"):
        cell_configs(parse_sweep(["losses[2].weight=1,2"], tmp_path), path)


def test_every_cell_is_checked(tmp_path: Path) -> None:
    sweep = parse_sweep(["seed=0..1", "blr=1e-3,fast"], tmp_path)
    with pytest.raises(ConfigError, match=r"--sweep optim\.blr is 'fast', but must be a number"):
        cell_configs(sweep, None)


@pytest.mark.parametrize("override", ["seed=3", "student.model_args.depth=2"])
def test_what_is_swept_is_not_set_beside(override: str, tmp_path: Path) -> None:
    sweep = parse_sweep(["seed=0..1", "model_args={depth: 3},{depth: 4}"], tmp_path)
    with pytest.raises(ConfigError, match="leave one of the two out"):
        cell_configs(sweep, None, [parse_override(override)])


def test_stages_stay_stages(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        "seed: 3\nstages:\n- {name: align, mode: align}\n- {name: task, mode: finetune, optim: {blr: 0.1}}\n",
    )
    sweep = parse_sweep(["seed=0..1"], tmp_path / "out")
    text = cell_configs(sweep, path)["seed=1"]
    stages = load_stages(write_recipe(tmp_path, text))
    assert [(s.name, s.config.mode, s.config.seed) for s in stages] == [
        ("align", "align", 1),
        ("task", "finetune", 1),
    ]
    assert stages[1].config.optim.blr == 0.1
    assert {s.config.output_dir for s in stages} == {tmp_path / "out" / "cells" / "seed=1"}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("data.crop_scale", [0.1, 1.0], "[0.1, 1.0]"),
        ("data.aa", None, "none"),
        ("engine.fsdp", True, "true"),
        ("student.model_args", {"depth": 6}, '{"depth": 6}'),
        ("student.model_args.name", "1", '"1"'),
        ("transfer.layers", "0,3", "0,3"),
        ("transfer.layers", [[0, 3], [1, 4]], "[[0, 3], [1, 4]]"),
    ],
)
def test_settings_as_words(key: str, value: object, text: str) -> None:
    assert as_text(Setting(key, value, key)) == text
    assert parse_override(f"{key}={text}").value == value


@given(st.data())
def test_any_valid_value_survives_as_text(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(leaves().keys() - {"output_dir"})))
    inner = data.draw(st.text(st.characters(min_codepoint=32, max_codepoint=126)))
    mapping = leaves()[key].is_mapping
    setting = Setting(f"{key}.a", inner, key) if mapping else Setting(key, leaves()[key].field.default, key)
    again = parse_override(f"{setting.key}={as_text(setting)}").value
    default = setting.value
    assert again == (list(default) if isinstance(default, tuple) else default)


def test_sweeps_are_read_without_torch() -> None:
    code = "import sys, graftvit.launch.slurm.sweep; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_axis_reads_as_it_was_written() -> None:
    assert str(Axis("transfer.layers", ("0,3", "all", "0..4"))) == "transfer.layers=[0,3],all,[0..4]"


def test_a_sweep_of_somebody_else_has_no_cell_elsewhere(tmp_path: Path) -> None:
    text = '{"axes": [], "cells": [{"name": "../../victim", "settings": {}}]}'
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json: '\.\./\.\./victim' is no name of a file"):
        load_sweep(tmp_path)
