"""Each word of the attention-transfer command line is understood, or answered with what it is called here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from graftvit.launch.fields import FLAGS, OFFICIAL_METHODS, find_key
from graftvit.launch.flags import Parser, parse_command
from graftvit.launch.load_config import load_config
from graftvit.models.errors import ConfigError
from graftvit.transfer.methods.method_facts import method_names

THEIRS = """
    batch_size epochs accum_iter model input_size drop_path clip_grad weight_decay lr blr beta2 layer_decay min_lr
    warmup_epochs color_jitter aa smoothing reprob remode recount resplit mixup cutmix cutmix_minmax mixup_prob
    mixup_switch_prob mixup_mode finetune use_teacher_ema global_pool cls_token dataset_name data_path nb_classes
    output_dir log_dir device seed resume start_epoch eval dist_eval num_workers pin_mem no_pin_mem world_size
    local_rank dist_on_itp dist_url ema train_qkv mode end_layer atd_weight job_dir ngpus norm_pix_loss mask_ratio
"""


@pytest.mark.parametrize("name", THEIRS.split())
def test_each_flag_is_taken_or_answered(name: str) -> None:
    assert (find_key(name) is None) == (name in FLAGS)
    if name in FLAGS:
        with pytest.raises(ConfigError) as refused:
            parse_command(Parser(prog="graftvit train"), [f"--{name}", "1"])
        assert FLAGS[name] in str(refused.value)


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_what_to_write_instead_exists(name: str) -> None:
    for flag in re.findall(r"--([a-z_.]+)", FLAGS[name].replace(f"--{name}", "")):
        ours = flag in ("nodes", "tasks_per_node") or find_key(flag.removeprefix("no-")) is not None
        assert ours or flag == "no", f"{name}: --{flag}"


def test_their_methods_are_ours() -> None:
    assert set(OFFICIAL_METHODS) <= set(method_names())


@pytest.mark.parametrize(
    ("word", "instead"),
    [
        ("mode=distill", "--mode transfer --method distill"),
        ("model=dual_vit_large_patch16", "--teacher SOURCE and --model vit_large_patch16_224"),
        ("resume=allow", "--resume auto"),
    ],
)
def test_each_value_is_answered(word: str, instead: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(instead)):
        load_config(None, [word])


@pytest.mark.parametrize("mode", ["transfer", "align"])
def test_finetune_does_not_start_the_student_from_the_teacher(mode: str) -> None:
    with pytest.raises(
        ConfigError, match=r"--teacher mae.pth for the teacher, or --init mae.pth for the student"
    ):
        load_config(None, [f"mode={mode}", "finetune=mae.pth"])
    assert load_config(None, [f"mode={mode}", "init=mae.pth"]).student.init == "mae.pth"
    assert load_config(None, ["mode=finetune", "finetune=mae.pth"]).student.init == "mae.pth"


def test_the_page_has_each_flag_with_another_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-attention-transfer.md").read_text()
    renamed = (
        "end_layer",
        "beta2",
        "dist_eval",
        "cls_token",
        "train_qkv",
        "use_teacher_ema",
        "job_dir",
        "ngpus",
    )
    assert all(f"`--{name}" in page for name in renamed)
