from __future__ import annotations

import pytest
from graftvit.launch.fields import find_key, leaf_of, leaves, sections, unknown
from graftvit.transfer.config import RunConfig
from graftvit.transfer.setting import rule_of


def test_every_leaf_of_the_configuration_is_listed_once() -> None:
    dumped = RunConfig().model_dump()
    expected = [key for key, value in dumped.items() if key not in sections()]
    expected += [f"{name}.{key}" for name in sections() for key in dumped[name]]
    assert sorted(leaves()) == sorted(expected)


def test_each_setting_is_described_or_named_plainly() -> None:
    for leaf in leaves().values():
        assert leaf.valid(), leaf.key


def test_aliases_point_at_settings_and_hide_none() -> None:
    own = {
        leaf.name for leaf in leaves().values() if [o.name for o in leaves().values()].count(leaf.name) == 1
    }
    further = [name for leaf in leaves().values() for name in rule_of(leaf.field).also]
    assert "finetune" in further
    assert len(further) == len(set(further))
    assert not own & set(further)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("optim.blr", "optim.blr"),
        ("blr", "optim.blr"),
        ("batch-size", "data.batch_size"),
        ("student.drop-path", "student.drop_path"),
        ("teacher", "teacher.source"),
        ("atd_weight", "transfer.weight"),
        ("student.model_args.depth", "student.model_args.depth"),
        ("teacher.model_args.a.b", "teacher.model_args.a.b"),
        ("seed", "seed"),
        ("optim", None),
        ("optim.blr.x", None),
        ("blrr", None),
        ("", None),
        (".", None),
    ],
)
def test_names_resolve(name: str, key: str | None) -> None:
    assert find_key(name) == key


@pytest.mark.parametrize(
    "name",
    ["epochs", "batch_size", "blr", "layer_decay", "warmup_epochs", "drop_path", "mixup", "cutmix",
     "reprob", "resume", "seed", "output_dir", "data_path", "model", "teacher", "method", "layers",
     "smoothing", "min_lr", "weight_decay", "clip_grad", "accum_iter", "nb_classes", "input_size",
     "finetune"],
)  # fmt: skip
def test_flags_that_people_type_exist(name: str) -> None:
    assert find_key(name) in leaves()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.blr", "1e-3", 1e-3),
        ("optim.epochs", "5", 5),
        ("optim.betas", "0.9,0.95", [0.9, 0.95]),
        ("optim.betas", "[0.9, 0.95]", [0.9, 0.95]),
        ("optim.clip_grad", "none", None),
        ("data.aa", "none", None),
        ("data.aa", "rand-m9", "rand-m9"),
        ("data.train_split", "2017", "2017"),
        ("data.data_path", "/a,b", "/a,b"),
        ("transfer.layers", "0,3,5", "0,3,5"),
        ("transfer.layers", "2:5", "2:5"),
        ("transfer.layers", "3-5", "3-5"),
        ("transfer.layers", "[0, 3]", [0, 3]),
        ("transfer.layers", "[[2, 0], [5, 1]]", [[2, 0], [5, 1]]),
        ("student.img_size", "224", 224),
        ("student.img_size", "224,448", [224, 448]),
        ("student.global_pool", "", ""),
        ("student.model_args", "{depth: 6, qkv_bias: false}", {"depth": 6, "qkv_bias": False}),
        ("engine.trackers", "tensorboard,wandb", ["tensorboard", "wandb"]),
        ("engine.trackers", "none", []),
        ("engine.fsdp", "true", True),
        ("output_dir", "runs/[x]", "runs/[x]"),
    ],
)
def test_texts_become_values(key: str, text: str, value: object) -> None:
    assert leaf_of(key).parse(text) == value


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("optim.min_lr", "a number of at least 0"),
        ("student.drop_path", "a number of at least 0 and below 1"),
        ("optim.epochs", "a whole number above 0"),
        ("optim.clip_grad", "a number above 0 or none"),
        ("transfer.loss", "one of ce, kl"),
        ("engine.fsdp", "true or false or node"),
        ("optim.betas", "2 numbers"),
        ("engine.trackers", "a list of texts"),
        ("student.model_args", "a mapping such as {depth: 6}"),
        ("optim.scales", "a mapping of texts to numbers above 0, such as {head: 0.1}"),
        ("data.data_path", "text or none"),
    ],
)
def test_valid_values_are_put_in_words(key: str, words: str) -> None:
    assert leaf_of(key).valid() == words


@pytest.mark.parametrize(
    ("key", "text"),
    [("engine.trackers", "tensorboard,wandb"), ("optim.betas", "0.9,0.95"), ("imports", "mine")],
)
def test_the_refusal_of_a_text_shows_the_list_to_write(key: str, text: str) -> None:
    assert leaf_of(key).refusal(key, text).endswith(f": write [{text}]")
    assert "write [" not in leaf_of("transfer.losses").refusal("transfer.losses", text)
    assert "write [" not in leaf_of("optim.epochs").refusal("optim.epochs", text)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.blrr", "did you mean 'optim.blr'?"),
        ("epoch", "did you mean 'optim.epochs'?"),
        ("optimizer.blr", "did you mean 'optim.blr'?"),
        ("transfer.blr", "did you mean 'optim.blr'?"),
        ("optim.model", "write teacher.model or student.model"),
        ("qqqqqq", "--help"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(name: str, hint: str) -> None:
    message = str(unknown(name))
    assert name in message
    assert hint in message
    assert "\n" not in message
