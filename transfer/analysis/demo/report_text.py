"""The sentences of the demo's report. They follow the numbers, whichever way these fall."""

from __future__ import annotations

import statistics

from .demo_cells import TeacherName
from .results import SHORT_TITLES, DemoResults, MethodResult

TITLE = "Is knowing where to look enough?"
WHAT = {
    "scratch": "starts from nothing and sees only the labelled digits",
    "copy": "uses the teacher's attention maps at every layer; the teacher runs along, also at inference",
    "distill": "learns to make the teacher's maps itself; afterwards it stands alone",
    "finetune": "starts from all of the teacher's weights",
    "ensemble": "mean of the probabilities of the fine-tuned and the distilled model of the same seed",
}
CURVES = (
    "Accuracy on the test images while the students learn from their few labels. Lines are means over the "
    "seeds, bands one deviation."
)
MAPS = (
    "Which patches does the outlined patch look at? Brighter is more attention, mean over the heads; a "
    "row has one scale. The distilled students make their maps by themselves. A copying student has its "
    "teacher's by construction."
)
DIVERGENCE = (
    "Jensen-Shannon divergence between a student's attention maps and its teacher's, mean over test "
    "images, heads and queries, in nats: 0 is the same map, ln 2 = 0.693 no overlap at all. Copying is 0 "
    "by construction."
)
OWN_IMAGES = (
    "The demo is six recipes, run side by side; the same commands take a folder of images and a real "
    "teacher. Every setting is a key of the YAML file and a flag of the command line, and --dry_run "
    "prints the plan first."
)
COMMANDS = """\
# see what a teacher offers, then distil its attention into a fresh student
graftvit teacher info vit_small_patch16_224.dino
graftvit train attention_distill_vit_base --data_path my/images --num_classes 12 --dry_run

# no teacher for your domain? make one from unlabelled images, as this demo did
graftvit pretrain digits_pretrain --output_dir runs/my_teacher
graftvit train digits_distill --teacher.source local-dir:runs/my_teacher/student"""


def question(results: DemoResults) -> str:
    """State the demo's question."""
    return (
        "A good teacher helps a vision transformer, but what of it is it that helps: the features, or only "
        f"knowing where to look? Students had {results.labels} labelled digits to learn from. One began with "
        "nothing. Others took nothing but the attention of a teacher: either of one that had learned to "
        f"name all {results.all_labels:,} training digits, or of one that had only learned to paint their "
        "hidden halves and never saw a label. For comparison, one began with all weights of the latter."
    )


def answer(results: DemoResults) -> str:
    """State the result for both teachers."""
    words = [
        f"From scratch the student names {results.scratch.mean:.1f} % of the {results.test_images} test digits.",
        f"The teacher that knows the labels names {results.teacher_top1:.1f} %. With its attention alone, "
        f"students reach {_attention(results, 'supervised')}",
        f"With the attention of the teacher that saw no label, they reach {_attention(results, 'mae')}",
    ]
    tuned, together = results.find("finetune", "mae"), results.find("ensemble", "mae")
    words.append(
        f"All of its weights, fine-tuned, give {tuned.mean:.1f} % ({against_scratch(results, tuned)}), and the "
        f"fine-tuned and the distilled model together {together.mean:.1f} %."
    )
    return " ".join(words)


def table_note(results: DemoResults) -> str:
    """Explain the table."""
    seeds = len(results.seeds)
    spread = (
        "one seed, so there is no deviation"
        if seeds == 1
        else f"mean ± sample deviation over {seeds} seeds; against scratch: within the seeds, ± standard error"
    )
    quick = " This was a quick run, with teachers that learned for a shorter time." if results.quick else ""
    return (
        f"Top-1 on {results.test_images} test images that no training saw; {spread}. A seed draws its own "
        f"{results.labels} labels, weights and augmentation; within a seed all methods share the labels. "
        "No seed and no checkpoint was picked: each number is the last step of "
        f"{results.student_steps}.{quick}"
    )


def setting(results: DemoResults) -> str:
    """Explain the choices."""
    supervised, mae = results.teacher_steps["supervised"], results.teacher_steps["mae"]
    return (
        "scikit-learn's digits, 8 by 8 pixels, are enlarged to 12 by 12 and cut into 36 patches. Teachers "
        "and students are the same ViT: width 64, 4 blocks, 4 heads. Training images are turned, scaled, "
        f"sheared and moved a little. One teacher learns from all labels, for {supervised:,} steps; the other "
        f"is a masked autoencoder, {mae:,} steps with 18 of 36 patches visible. The transfer weight is the "
        "published 3, on all layers. There are 36 patches because with 16 it is easy to learn where to look, "
        "and position embeddings start with a deviation of 0.2 because students from scratch would need "
        "more steps at the usual 0.02, which would flatter attention transfer."
    )


def footer(results: DemoResults) -> str:
    """State where the numbers come from."""
    command = "graftvit demo --quick" if results.quick else "graftvit demo"
    return (
        f"Written by `{command}`: {results.minutes:.1f} minutes of training, added up over its processes, "
        "without a network."
    )


def teacher_title(results: DemoResults, teacher: TeacherName) -> str:
    """Return the heading of a teacher's rows in the table."""
    if teacher == "supervised":
        return (
            f"The teacher knows all {results.all_labels:,} labels, "
            f"and names {results.teacher_top1:.1f} % of the test images"
        )
    return "The teacher saw no label: a masked autoencoder"


def curves_alt(results: DemoResults) -> str:
    """Describe the learning curves in words."""
    ends = ", ".join(f"{_named(m)} {m.mean:.1f} %" for m in results.methods if len(m.curve) > 0)
    return f"Test accuracy over {results.student_steps} training steps; at the end {ends}."


def maps_alt(results: DemoResults) -> str:
    """Describe the attention maps in words."""
    return (
        f"{len(results.gazes)} rows of attention maps over handwritten digits: the image, then the teacher "
        "that knows the labels and the student distilled from it, the one that saw no label and the student "
        "distilled from that, and the scratch-trained student."
    )


def divergence_alt(results: DemoResults) -> str:
    """Describe the divergences in words."""
    means = [
        f"{SHORT_TITLES[method]} {statistics.fmean(value for row in rows for value in row):.3f}"
        f" ({_TEACHERS[teacher]})"
        for teacher, methods in results.divergences.items()
        for method, rows in methods.items()
    ]
    return f"Divergence from the teacher's attention by layer; mean over layers, in nats: {', '.join(means)}."


def percent(method: MethodResult) -> str:
    """Return `82.8 % ± 4.1`, or `82.8 %` for one seed."""
    spread = "" if method.deviation is None else f" ± {method.deviation:.1f}"
    return f"{method.mean:.1f} %{spread}"


def against_scratch(results: DemoResults, method: MethodResult) -> str:
    """Return `+1.7 ± 0.8`: mean gain within the seeds, in points, and its standard error; empty for scratch."""
    if method.method == "scratch":
        return ""
    gains, error = results.gains(method), results.gain_error(method)
    mean = f"{statistics.fmean(gains):+.1f}".replace("-", "\N{MINUS SIGN}")
    return mean if error is None else f"{mean} ± {error:.1f}"


_TEACHERS: dict[TeacherName, str] = {"supervised": "labels", "mae": "no label"}


def _named(method: MethodResult) -> str:
    teacher = "" if method.teacher is None else f" ({_TEACHERS[method.teacher]})"
    return f"{SHORT_TITLES[method.method]}{teacher}"


def _attention(results: DemoResults, teacher: TeacherName) -> str:
    copied, distilled = (_gain(results, results.find(name, teacher)) for name in ("copy", "distill"))
    return f"{copied} when it is copied, and {distilled} when it is distilled."


def _gain(results: DemoResults, method: MethodResult) -> str:
    """State what one kind of transfer gives, and whether it takes more seeds to tell it from nothing."""
    seeds, error, gains = len(results.seeds), results.gain_error(method), results.gains(method)
    versus = f"{against_scratch(results, method)} points against scratch"
    if error is not None:
        versus += f", better with {sum(gain > 0 for gain in gains)} of {seeds} seeds"
        if abs(statistics.fmean(gains)) < 2 * error:
            versus += "; so few seeds cannot tell that from chance"
    return f"{method.mean:.1f} % ({versus})"
