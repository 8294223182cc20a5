"""A model card is metadata that the hub's own library reads back, and says nothing that is not recorded."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from graftvit.checkpoints.card import (
    MARKER,
    MATCHES,
    CardFacts,
    hub_name,
    is_generated,
    load_lines,
    student_card,
)
from graftvit.checkpoints.licenses import MODES
from graftvit.transfer.config import AlignConfig, RunConfig
from graftvit.transfer.engine.modes import MODES as RUN_MODES
from graftvit.transfer.methods.method_facts import method_names
from graftvit.transfer.methods.registry import describe_transfer
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

FACTS = CardFacts("me/my-vit", "cc-by-nc-4.0", parameters=5_700_000, describe_transfer=describe_transfer)
COMMIT = "c" * 40


def config(**sections: Any) -> dict[str, Any]:
    """The config.json of a distilled student; `sections` are those of its run."""
    base: dict[str, Any] = {
        "data": {"dataset": "torch/cifar10"},
        "teacher": {"source": "vit_large_patch16_224.mae"},
    }
    recipe = RunConfig.model_validate(base | sections).model_dump(mode="json")
    del recipe["output_dir"], recipe["engine"]
    teacher = {
        "source": recipe["teacher"]["source"], "architecture": "vit_large_patch16_224",
        "revision": COMMIT, "license": "cc-by-nc-4.0",
    }  # fmt: skip
    return {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 10,
        "model_args": {"img_size": [32, 32]},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
        "graftvit": {
            "version": "0.1.0", "part": "student", "teacher": teacher, "init": None, "recipe": recipe,
            "results": {"dataset": "torch/cifar10", "top1": 91.23456, "top5": 99.5, "loss": 0.34567, "epoch": 99},
        },
    }  # fmt: skip


def row(card: str, name: str) -> str:
    """A value of one of the card's tables."""
    found = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    assert len(found) == 1, name
    return found[0].removeprefix(f"| {name} |").removesuffix("|").strip()


def test_the_hubs_library_reads_the_metadata_back(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(student_card(config(), FACTS), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == (
        "timm", "cc-by-nc-4.0", "image-classification",
    )  # fmt: skip
    assert data["base_model"] == ["timm/vit_large_patch16_224.mae"]
    assert data["base_model_relation"] == "finetune"
    assert {"timm", "graftvit", "attention-transfer"} <= set(data["tags"])
    assert (card.data.model_name, data["metrics"]) == ("my-vit", ["accuracy"])
    results = [
        (one.metric_name, one.metric_value, one.dataset_type, one.dataset_split)
        for one in card.data.eval_results
    ]
    assert results == [
        ("Top-1 accuracy (%)", 91.235, "cifar10", "validation"),
        ("Top-5 accuracy (%)", 99.5, "cifar10", "validation"),
    ]
    again = ModelCard(str(card))
    assert again.data.to_dict() == data
    assert again.text == card.text


def test_it_says_what_was_transferred_from_which_revision() -> None:
    card = student_card(config(transfer={"layers": "first:9", "weight": 2.5, "heads": "match"}), FACTS)
    assert row(card, "teacher") == "`vit_large_patch16_224.mae`"
    assert row(card, "teacher: revision") == f"`{COMMIT}`"
    assert row(card, "teacher: license") == "cc-by-nc-4.0"
    assert (
        row(card, "method")
        == "`distill`: cross-entropy between the student's attention maps and the teacher's"
    )
    assert (row(card, "layers"), row(card, "weight of its loss")) == (
        "the first 9",
        "2.5, summed over layers",
    )
    assert "least distance" in row(card, "heads")
    assert row(card, "start") == "fresh weights"
    assert row(card, "input (channels x height x width)") == "3 x 32 x 32"
    assert row(card, "mean of each channel") == "0.5, 0.4, 0.3"
    assert "| `torch/cifar10`, `validation` | 91.23 | 99.50 | 0.3457 | 99 |" in card
    assert "5.7 M parameters" in card
    fold = card.split("```yaml\n")[1].split("```")[0]
    assert (
        yaml.safe_load(fold)
        == config(transfer={"layers": "first:9", "weight": 2.5, "heads": "match"})["graftvit"]["recipe"]
    )


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("all", "all"), ("last:3", "the last 3"), ("every:2", "one in 2, and the last"), (":-6", "`:-6`"),
        ([0, 3, 5], "`0, 3, 5`"), ([(2, 0), (5, 1)], "`2>0, 5>1` (teacher > student)"),
        ("2>0", "`2>0` (teacher > student)"),
    ],
)  # fmt: skip
def test_layers_in_words(layers: Any, words: str) -> None:
    assert row(student_card(config(transfer={"layers": layers}), FACTS), "layers") == words


@pytest.mark.parametrize("method", method_names())
def test_each_method_is_described(method: str) -> None:
    made = config(transfer={"method": method})
    card = student_card(made, FACTS)
    assert row(card, "method").startswith(f"`{method}`: ")
    assert "{" not in row(card, "method")
    assert ModelCard(card).data.eval_results is not None
    assert "91.23" in card


@pytest.mark.parametrize("match", get_args(AlignConfig.model_fields["match"].annotation))
def test_each_alignment_is_described(match: str) -> None:
    card = student_card(config(mode="align", student={"plan": "*: linear"}, align={"match": match}), FACTS)
    assert row(card, "matched") == MATCHES[match]
    assert row(card, "teacher: revision") == f"`{COMMIT}`"
    assert "| method |" not in card


def test_each_mode_is_described() -> None:
    assert MODES.keys() == RUN_MODES.keys()


def test_a_copying_student_says_what_it_holds_and_what_that_costs() -> None:
    made = config(transfer={"method": "copy"})
    made["model_args"] |= {"student": made["architecture"], "copied": {"method": "copy"}}
    made["architecture"] = "graftvit_copied"
    made["graftvit"]["cost"] = {
        "student": {"parameters": 5_400_000, "macs": 1_000_000_000},
        "teacher": {"parameters": 900_000, "macs": 250_000_000},
    }
    card = student_card(made, FACTS)
    assert "A vision transformer (`vit_tiny_patch16_224`, 5.7 M parameters)" in card
    assert "the teacher's attention maps in place of the student's, on the student's values" in card
    assert row(card, "the student itself") == "5,400,000 parameters, 1,000.0 M multiply-adds an image"
    assert row(card, "the part of its teacher") == "900,000 parameters, 250.0 M multiply-adds an image"
    assert 'model = graftvit.load("hf-hub:me/my-vit").eval()' in card
    assert ModelCard(card).data.library_name == "graftvit"
    assert ModelCard(card).data.eval_results is not None
    assert "never trained" not in card


def test_settings_that_are_on_are_all_in_the_table() -> None:
    made = config(
        data={"dataset": "digits", "mixup": 1.0, "cutmix": 1.0, "reprob": 0.25, "smoothing": 0.0},
        optim={"layer_decay": 1.0},
    )
    card = student_card(made, FACTS)
    assert "mixup 1, cutmix 1, erasing 0.25" in row(card, "augmentation")
    assert "smoothing" not in row(card, "augmentation")
    assert "layer decay" not in row(card, "optimizer")


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"lr": 0.1}, "0.1, warm-up of at most a tenth of the run, then `cosine`"),
        ({"warmup_epochs": 2.0}, "0.001 x effective batch / 256, warm-up of 2 epochs, then `cosine`"),
        (
            {"lr": 0.1, "warmup_steps": 9, "schedule": "poly"},
            "0.1, warm-up of 9 steps, then `poly`",
        ),
    ],
)
def test_the_learning_rate_is_that_of_the_schedule(optim: dict[str, Any], words: str) -> None:
    assert row(student_card(config(optim=optim), FACTS), "learning rate") == words


def test_a_state_that_was_picked_says_by_what_and_when() -> None:
    made = config()
    made["graftvit"] |= {"step": 7, "picked": "top1"}
    card = student_card(made, FACTS)
    assert row(card, "what is published") == "the weights after step 7, the best by `test_top1`"
    assert "on the images that this state was picked by" in card
    del made["graftvit"]["picked"]
    card = student_card(made, FACTS)
    assert row(card, "what is published") == "the weights after step 7"
    assert "picked by" not in card


def test_a_bare_student_says_that_it_is_one() -> None:
    made = config(transfer={"method": "copy"})
    made["graftvit"]["bare"] = True
    del made["graftvit"]["results"]
    card = student_card(made, FACTS)
    assert card.count("its own was never trained") == 2
    assert ModelCard(card).data.eval_results is None


def test_modes_without_a_teacher() -> None:
    made = config(mode="finetune")
    made["graftvit"] |= {
        "teacher": None,
        "init": {"source": "hf-hub:org/start", "revision": None, "license": None},
    }
    card = student_card(made, CardFacts("me/vit", None))
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == ["org/start"]
    assert "license" not in data
    assert "attention-transfer" not in data["tags"]
    assert "| method |" not in card
    assert (row(card, "start: revision"), row(card, "start: license")) == ("not recorded", "unknown")
    assert row(card, "what was done") == "fine-tuning"
    assert "Unknown. Ask the owner" in card


def test_nothing_is_made_up_where_nothing_is_recorded() -> None:
    card = student_card({"architecture": "vit_tiny_patch16_224"}, CardFacts("me/vit", None))
    data = ModelCard(card).data.to_dict()
    assert sorted(data) == ["library_name", "pipeline_tag", "tags"]
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "Nothing is recorded of how it was made." in card
    assert "No results are recorded." in card
    assert "None" not in card


@pytest.mark.parametrize("bad", [math.nan, math.inf, "91", None, True])
def test_a_result_that_is_no_number_is_left_out(bad: Any) -> None:
    made = config()
    made["graftvit"]["results"] = {"dataset": "digits", "top1": bad}
    card = student_card(made, FACTS)
    assert ModelCard(card).data.eval_results is None
    assert "No results are recorded." in card


def test_the_name_of_the_data_may_be_given() -> None:
    made = config(data={"data_path": "/home/secret/in1k", "dataset": ""})
    made["graftvit"]["results"]["dataset"] = ""
    assert ModelCard(student_card(made, FACTS)).data.eval_results is None
    card = ModelCard(student_card(made, CardFacts("me/vit", None, dataset_name="ImageNet-1k")))
    assert {(one.dataset_name, one.dataset_type) for one in card.data.eval_results} == {
        ("ImageNet-1k", "ImageNet-1k")
    }
    assert "`ImageNet-1k`" in card.text


def test_data_of_the_hub_is_linked() -> None:
    made = config(data={"dataset": "hfds/uoft-cs/cifar100"})
    assert ModelCard(student_card(made, FACTS)).data.datasets == ["uoft-cs/cifar100"]
    assert ModelCard(student_card(config(), FACTS)).data.datasets is None


def converted(plan: str) -> dict[str, Any]:
    arguments = {"architecture": "vit_tiny_patch16_224", "plan": plan}
    return {**config(), "architecture": "graftvit_converted", "model_args": arguments}


def test_a_converted_student_needs_graftvit() -> None:
    made = converted("*: linear; 9-11: softmax")
    card = student_card(made, FACTS)
    assert ModelCard(card).data.library_name == "graftvit"
    assert "Its attention was converted: `*: linear; 9-11: softmax`." in card
    assert load_lines(made, FACTS)[1] == 'model = graftvit.load("hf-hub:me/my-vit").eval()'
    assert "`pip install ./graftvit`, of a clone" in card
    assert "first import" not in card + student_card(converted("*: keep; 1: none"), FACTS)
    assert "| `mean`: first import the package" in student_card(converted("*: mean(size=3); 1: keep"), FACTS)
    assert "first import" not in student_card(converted("no plan at all"), FACTS)


def test_a_student_with_its_own_code_loads_by_that_first() -> None:
    facts = replace(FACTS, alone=True, revision="half")
    card = student_card(converted("*: linear"), facts)
    first, local, ours = (block.partition("```")[0] for block in card.split("```python\n")[1:])
    assert first.splitlines() == load_lines(converted("*: linear"), facts, alone=True)
    assert '("me/my-vit", revision="half", trust_remote_code=True)' in first
    assert "from modeling_graftvit import load" in local
    assert 'graftvit.load("hf-hub:me/my-vit@half")' in ours
    assert "modeling_graftvit" not in student_card(converted("*: linear"), FACTS)


def test_an_architecture_of_our_own_needs_graftvit() -> None:
    made = {**config(), "architecture": "vit_cifar_tiny"}
    assert load_lines(made, FACTS)[1] == 'model = graftvit.load("hf-hub:me/my-vit").eval()'
    assert ModelCard(student_card(made, FACTS)).data.library_name == "graftvit"


def test_what_timm_cannot_load_is_not_said_to_load_with_timm() -> None:
    assert "timm.create_model" in load_lines(config(), FACTS)[1]
    sharded = CardFacts("me/vit", None, sharded=True, revision="half")
    assert load_lines(config(), sharded)[1] == 'model = graftvit.load("hf-hub:me/vit@half").eval()'
    assert all(len(load_lines(config(), facts)) == 3 for facts in (FACTS, sharded))


def test_no_path_of_this_machine_is_in_it() -> None:
    made = config(
        data={"data_path": "/secret/data/cifar", "dataset": ""},
        teacher={"source": "/secret/runs/mae.pth", "model_args": {"x": "~/secret/y"}},
        student={"init": "local-dir:/secret/runs/student#ema"},
    )
    made["graftvit"]["init"] = {
        "source": "local-dir:C:\\secret\\runs\\student",
        "revision": None,
        "license": "mit",
    }
    made["graftvit"]["results"]["dataset"] = "/secret/data/cifar"
    card = student_card(made, FACTS)
    assert "secret" not in card
    assert row(card, "teacher") == "`mae.pth`"
    assert row(card, "trained on") == "`cifar`"


HOSTILE = "a`b|c\n---\nlicense: mit\n---\n```\n<script>"


def test_hostile_text_ends_neither_the_head_nor_a_table() -> None:
    made = config(teacher={"source": HOSTILE}, data={"dataset": HOSTILE})
    made["graftvit"]["results"]["dataset"] = HOSTILE
    card = ModelCard(student_card(made, FACTS))
    assert card.data.license == "cc-by-nc-4.0"
    assert card.text.startswith(MARKER)
    assert row(str(card), "teacher") == r"`a'b\|c --- license: mit --- ''' <script>`"
    fold = str(card).split("````yaml\n")[1].split("````")[0]
    assert yaml.safe_load(fold)["data"]["dataset"] == HOSTILE


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("vit_large_patch16_224.mae", "timm/vit_large_patch16_224.mae"),
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("hf-hub:org/vit@v1", "org/vit"),
        ("local-dir:student", None),
        ("mae.pth", None),
        ("vit_tiny_patch16_224.no_such_tag", None),
    ],
)
def test_base_models_are_those_of_the_hub(source: str, name: str | None) -> None:
    assert hub_name(source) == name


def test_a_card_is_ours_while_its_mark_is_there() -> None:
    card = student_card(config(), FACTS)
    assert is_generated(card)
    assert is_generated(card + "\nmore\n")
    assert not is_generated(card.replace(MARKER, ""))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return [path]
    return [path] * bool(path) + [
        found for key, part in value.items() for found in places(part, (*path, key))
    ]


@settings(max_examples=100)
@given(st.data())
def test_any_config_gives_a_card_that_is_read_back(data: st.DataObject) -> None:
    made = copy.deepcopy(config(transfer={"method": data.draw(st.sampled_from(["copy", "distill"]))}))
    for _ in range(2):
        *above, last = data.draw(st.sampled_from(places(made)))
        place: Any = made
        for key in above:
            place = place[key] if isinstance(place, dict) and key in place else {}
        if isinstance(place, dict):
            place[last] = data.draw(JSON)
    card = ModelCard(student_card(made, FACTS))
    assert card.data.license == "cc-by-nc-4.0"
    assert "## License" in card.text


MARKED = "<img src=x onerror=alert(1)>\n\n# x\n````\n```` [a](javascript:alert(1)) `<b>` | \x1b[2J\u202e"


def rendered(card: str) -> str:
    """What of a card Markdown takes for more than text: its head, blocks and spans of code are left out."""
    text = card.split("---\n", 2)[2]
    text = re.sub(r"^(`{3,})[^`\n]*\n.*?^\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!\\)`[^`\n]*`", "", text)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [leaf for key, value in pairs for leaf in leaves(value, (*path, key))]
    return found or [path]


def test_nothing_that_is_recorded_becomes_html_or_a_link() -> None:
    plain_lines = len(rendered(student_card(config(), FACTS)).splitlines())
    for path in leaves(config()):
        made = config()
        place: Any = made
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = MARKED
        if path == ("pretrained_cfg", "input_size", 0) or path[-1] in ("train_samples", "license"):
            assert "&lt;img" in (card := student_card(made, FACTS)) or "`<img" in card, path
        text = rendered(student_card(made, FACTS))
        assert "<img" not in text, path
        assert "<b>" not in text, path
        assert not re.search(r"(?<!\\)\]\(javascript", text), path
        assert text.replace("\n", "").isprintable(), path
        assert len(text.splitlines()) <= plain_lines + 3, path


def test_facts_that_a_person_gives_are_no_html_either() -> None:
    text = rendered(student_card(config(), CardFacts("me/vit", MARKED, revision=MARKED, dataset_name=MARKED)))
    assert "<img" not in text
    assert "javascript" not in text
