from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from graftvit.launch.load_config import dump_config, load_config
from graftvit.models.errors import ConfigError
from graftvit.transfer.config import OptimConfig, RunConfig, StudentConfig
from graftvit.transfer.loss_config import TransferConfig
from graftvit.transfer.setting import value_of
from hypothesis import given
from hypothesis import strategies as st


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def message(source: Any = None, overrides: Any = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_those_of_the_sections() -> None:
    assert load_config() == RunConfig()


def test_overrides_beat_the_file_which_beats_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", "optim: {blr: 2e-4, epochs: 7}\nseed: 3\n")
    config = load_config(path, ["blr=5e-4", "optim.warmup_epochs=1"])
    assert config.optim.blr == 5e-4
    assert config.optim.epochs == 7
    assert config.optim.warmup_epochs == 1
    assert config.seed == 3
    assert config.optim.layer_decay == OptimConfig().layer_decay


def test_the_last_override_wins() -> None:
    assert load_config(None, ["blr=1", "optim.blr=2", "blr=3"]).optim.blr == 3


def test_python_takes_the_same_keys_with_values() -> None:
    arguments = {"depth": 4}
    overrides = {
        "optim.betas": (0.9, 0.95),
        "student.model_args": arguments,
        "student.model_args.num_heads": 2,
    }
    config = load_config(None, overrides)
    assert config.optim.betas == (0.9, 0.95)
    assert config.student.model_args == {"depth": 4, "num_heads": 2}
    assert arguments == {"depth": 4}, "the caller's own mapping was written into"


def test_a_base_is_read_first_and_lies_beside_its_file(tmp_path: Path) -> None:
    write(tmp_path, "parent.yaml", "base: attention_copy_vit_large\noptim: {epochs: 9, blr: 1}\n")
    child = write(tmp_path, "child.yaml", "base: parent.yaml\noptim: {epochs: 2}\n")
    config = load_config(child)
    assert (config.optim.epochs, config.optim.blr, config.optim.min_lr) == (2, 1, 2e-3)
    assert config.transfer.method == "copy"


def test_a_circle_of_bases_is_named(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert "circle" in message(a)
    there = write(tmp_path, "there.yaml", f"base: ../{tmp_path.name}/back.yaml\n")
    write(tmp_path, "back.yaml", f"base: ../{tmp_path.name}/there.yaml\n")
    assert "circle" in message(there)


def test_a_run_folder_is_its_config(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", dump_config(load_config(None, ["seed=11"])))
    assert load_config(tmp_path).seed == 11
    assert load_config(str(tmp_path)).seed == 11


def test_none_in_yaml_is_none_where_none_is_valid(tmp_path: Path) -> None:
    path = write(tmp_path, "m.yaml", "data: {aa: none}\noptim: {opt: none}\n")
    assert load_config(path).data.aa is None
    assert load_config(path).optim.opt == "none"


def test_an_empty_section_is_empty(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "m.yaml", "optim:\n")) == RunConfig()
    assert load_config(write(tmp_path, "n.yaml", "")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optim: {blrr: 1}", ["m.yaml", "optim.blrr", "optim.blr"]),
        ("optimm: {blr: 1}", ["m.yaml", "optimm", "optim"]),
        ("blr: 1", ["m.yaml", "blr", "optim.blr"]),
        ("optim: 5", ["m.yaml", "optim", "section"]),
        ("- 1", ["m.yaml", "keys"]),
        ("optim: {blr: x}", ["m.yaml: optim.blr", "'x'", "a number above 0"]),
        ("optim: {betas: [0.9]}", ["optim.betas", "[0.9]", "2 numbers"]),
        ("transfer: {method: distil}", ["transfer.method", "'distil'", "distill_q"]),
        ("student: {model_args: {depth:2}}", ["student.model_args", "'depth:2'", "a space after the colon"]),
        ("student: {model_args: 3}", ["student.model_args", "3", "mapping"]),
        ("mode: train", ["mode", "'train'", "pretrain"]),
        ("seed: -1", ["seed", "-1", "at least 0"]),
        ("output_dir: 3", ["output_dir", "3", "path"]),
        ("seed: 1\nseed: 2", ["m.yaml", "given twice"]),
        ("a: [", ["m.yaml", "not valid YAML"]),
        ("\0", ["m.yaml", "not valid YAML"]),
        ("base: nowhere", ["nowhere", "attention_copy_vit_base"]),
    ],
)
def test_a_bad_file_ends_in_one_sentence(tmp_path: Path, text: str, parts: list[str]) -> None:
    found = message(write(tmp_path, "m.yaml", text))
    for part in parts:
        assert part in found


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "nope.yaml" in message(tmp_path / "nope.yaml")
    assert "No such file" in message("sub/nope")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in message(tmp_path / "binary.yaml")
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("blr", ["'blr'", "section.key=value"]),
        ("blrr=1", ["'blrr'", "'optim.blr'"]),
        ("optim=1", ["'optim'"]),
        ("optim.blr=abc", ["optim.blr", "'abc'", "a number"]),
        ("optim.blr=", ["optim.blr"]),
        ("optim.blr.x=1", ["optim.blr.x"]),
        ("data.max_bad_images=1.5", ["max_bad_images", "1.5", "share below 1, or a whole number"]),
        ("transfer.rows=0", ["transfer.rows", "0", "above 0"]),
        ("optim.ema=1", ["optim.ema", "below 1"]),
    ],
)
def test_a_bad_override_ends_in_one_sentence(override: str, parts: list[str]) -> None:
    found = message(None, [override])
    for part in parts:
        assert part in found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("optim: {epochs: true}", "epochs"), ("optim: {lr: true}", "lr"), ("optim: {betas: [true, 0.9]}", "betas"),
        ("transfer: {layers: [true]}", "layers"), ("optim: {scales: {head: true}}", "scales"),
        ("teacher: {img_size: true}", "img_size"), ("engine: {fsdp: 1}", "fsdp"), ("engine: {fsdp: 0}", "fsdp"),
        ("transfer: {losses: [{weight: true}]}", "weight"), ("teachers: {one: {compile: 1}}", "compile"),
    ],
)  # fmt: skip
def test_a_switch_is_no_number_and_a_number_no_switch(tmp_path: Path, text: str, name: str) -> None:
    assert f"{name} is " in message(write(tmp_path, "m.yaml", text))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optim.epochs=1e3", 1000),
        ("optim.lr=1", 1.0),
        ("engine.fsdp=false", False),
        ("optim.betas=0,1", (0, 1)),
    ],
)
def test_a_whole_number_is_a_number_however_it_is_written(word: str, value: object) -> None:
    assert value_of(load_config(None, [word]), word.partition("=")[0]) == value


def test_every_wrong_value_is_told_at_once() -> None:
    found = message(None, ["blr=x", "epochs=0", "seed=1"])
    assert "blr" in found
    assert "epochs" in found
    assert "seed" not in found


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NAME = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)
WHOLE = st.integers(-(2**62), 2**62)
configurations = st.builds(
    RunConfig,
    output_dir=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1).map(Path),
    transfer=st.builds(
        TransferConfig,
        layers=st.sampled_from(["all", "2:5", ":-6", "first:6", "0,3"])
        | st.lists(WHOLE, min_size=1)
        | st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1),
        heads=st.sampled_from(["all", "match", "1,2"]) | st.lists(st.integers(0, 9)),
    ),
    student=st.builds(
        StudentConfig,
        model=TEXT,
        img_size=st.none() | st.integers(1, 999) | st.tuples(st.integers(1, 99), st.integers(1, 99)),
        model_args=st.dictionaries(NAME, WHOLE | st.booleans() | TEXT | st.none()),
    ),
    optim=st.builds(OptimConfig, blr=st.floats(1e-9, 1), clip_grad=st.none() | st.floats(1e-9, 1e9)),
)


@given(configurations)
def test_a_resolved_configuration_round_trips(config: RunConfig) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "config.yaml", dump_config(config))
        assert load_config(path) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.img_size", 0), ("teacher.img_size", -32), ("student.img_size", [32, 0]),
        ("data.crop_scale", [2.0, 3.0]), ("data.crop_scale", [1.0, 0.5]), ("data.crop_scale", [0.0, 1.0]),
    ],
)  # fmt: skip
def test_sizes_and_ranges_that_cannot_be_meant_are_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*above 0"):
        load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["student.img_size", "teacher.img_size"])
def test_a_size_in_words_is_answered_with_a_list(key: str) -> None:
    with pytest.raises(ConfigError, match=r"write height and width as \[72, 104\]"):
        load_config(None, [f"{key}=72x104"])
    assert load_config(None, ["student.img_size=[72, 104]"]).student.img_size == (72, 104)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("losses=[{method: distil}]", "losses[0].method is 'distil', did you mean 'distill'? It should be"),
        ("losses=[{method: [distil]}]", "losses[0].method is ['distil'], but should be "),
        (
            "losses=[{method: distill}, {wieght: 2}]",
            "losses[1] has an unknown key 'wieght'; did you mean 'weig",
        ),
        ("losses=[{method: distill, rows: 2}]", "losses[0].rows is 2, but should be less than or equal to 1"),
        ("teachers={cnx: {sorce: x}}", "teachers.cnx has an unknown key 'sorce'; did you mean 'source'?"),
        (
            "teachers={cnx: {dtype: fp8}}",
            "teachers.cnx.dtype is 'fp8', but should be 'fp32', 'bf16' or 'fp16'",
        ),
        (
            "losses=[{method: distill, layers: [0, a]}]",
            "losses[0].layers is not text or a list of whole numb",
        ),
        ("losses=3", "losses is [3], but must be a list of mappings with any of the keys method, layers, "),
        (
            "teachers=3",
            "teachers is 3, but must be a mapping of names to mappings with any of the keys source, ",
        ),
    ],
)
def test_a_mistake_within_a_list_of_sections_is_named(word: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [word])
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("mode=scrach", ", did you mean 'scratch'? It must be one of transfer, "),
        ("mode=x", ", but must be one of transfer, "),
    ],
)
def test_a_misspelled_choice_is_told_the_nearest(word: str, hint: str) -> None:
    assert hint in message(None, [word])


TWO = "losses=[{method: distill, layers: 1}, {method: feature, weight: 5}]"


def test_a_setting_of_a_single_loss_over_a_list_is_refused_even_with_its_default(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("transfer: {losses: [{method: distill}, {method: feature}]}\n")
    for word in ("method=distill", "transfer.weight=3.0"):
        with pytest.raises(ConfigError, match=r"single loss and cannot be used with transfer\.losses: write"):
            load_config(tmp_path / "two.yaml", [word])
    assert load_config(tmp_path / "two.yaml", ["losses=[]", "method=distill"]).transfer.losses == []
    written = tmp_path / "config.yaml"
    written.write_text(dump_config(load_config(tmp_path / "two.yaml")))
    assert len(load_config(written).transfer.losses) == 2


@pytest.mark.parametrize("word", ["transfer.losses[1].weight=2", "losses[1].weight=2"])
def test_a_setting_of_one_entry_of_a_list(word: str) -> None:
    first, second = load_config(None, [TWO, word]).transfer.losses
    assert (first.weight, first.layers, second.weight, second.method) == (3.0, "1", 2.0, "feature")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([TWO, "losses[1].wieght=2"], "unknown key 'losses[1].wieght'; did you mean 'weight'? valid: "),
        ([TWO, "losses[2].weight=2"], "losses[2].weight: there is no entry 2 in losses, which has 2"),
        (["losses[0].weight=2"], "losses[0].weight: there is no entry 0 in losses, which has 0"),
        ([TWO, "losses[1].weight=-2"], "losses[1].weight is -2, but should be greater than or equal to 0"),
        ([TWO, "losses[0]=3"], "unknown key 'losses[0]'"),
    ],
)
def test_a_mistake_in_a_setting_of_one_entry_is_named(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, words)
    assert str(refused.value).startswith(sentence)


def test_a_recipe_keeps_its_list_where_one_entry_is_overridden() -> None:
    changed = load_config("two_teachers_vit_base", ["losses[1].weight=7"]).transfer.losses
    plain = load_config("two_teachers_vit_base").transfer.losses
    assert changed[1].weight == 7
    assert (changed[0], changed[2]) == (plain[0], plain[2])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optim": {"epoch": 3}}, "'optim.epoch'; did you mean 'epochs'"),
        ({"optim": {"epochs": "many"}}, "optim.epochs is 'many'"),
        (
            {"transfer": {"losses": [{"method": "logits", "wait": 2.0}]}},
            "'transfer.losses.0.wait'; did you mean 'weight'",
        ),
        ({"teachers": {"large": {"sauce": "x"}}}, "'teachers.large.sauce'; did you mean 'source'"),
        ({"mod": "transfer"}, "'mod'; did you mean 'mode'"),
    ],
)
def test_a_mistake_in_python_is_one_sentence(values: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        RunConfig(**values)


@pytest.mark.parametrize("section", ["teacher", "student"])
def test_an_argument_that_no_file_can_hold_is_refused(section: str) -> None:
    with pytest.raises(ConfigError, match=r"act_layer=<class .*ReLU'> cannot be written .*give its name"):
        RunConfig.model_validate({section: {"model_args": {"act_layer": torch.nn.ReLU}}})
    RunConfig.model_validate({section: {"model_args": {"act_layer": "relu", "img_size": (8, 8)}}})
