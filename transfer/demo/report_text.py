"""The sentences of the demo's report. They follow the numbers, whichever way these fall."""

from __future__ import annotations

import statistics

from .results import DemoResults, MethodResult

TITLE = "Is knowing where to look enough?"
WHAT = {
    "scratch": "starts from nothing and sees only the labelled digits",
    "finetune": "starts from all of the teacher's weights",
    "copy": "uses the teacher's attention maps at every layer; the teacher runs along, also at inference",
    "distill": "learns to make the teacher's maps itself; afterwards it stands alone",
    "ensemble": "mean of the probabilities of the fine-tuned and the distilled model of the same seed",
}
CURVES = (
    "Accuracy on the test images while the students learn from their few labels. Lines are means over the "
    "seeds, bands one deviation."
)
MAPS = (
    "Which patches does the outlined patch look at? Brighter is more attention, mean over the heads; a "
    "row has one scale. The distilled student makes its maps by itself. The copying student has the "
    "teacher's by construction."
)
DIVERGENCE = (
    "Jensen-Shannon divergence between a student's attention maps and the teacher's, mean over test "
    "images, heads and queries, in nats: 0 is the same map, ln 2 = 0.693 no overlap at all. Copying is 0 "
    "by construction."
)
OWN_IMAGES = (
    "The demo is three recipes and one loop; the same commands take a folder of images and a real "
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


def asked(results: DemoResults) -> str:
    """What the demo wants to know."""
    return (
        "Pre-training helps a vision transformer, but what of it is it that helps: the features, or only "
        "knowing where to look? A small teacher first learned to paint the hidden halves of "
        f"{results.unlabelled:,} handwritten digits, without labels. Then students had {results.labels} "
        "labelled digits to learn from. One began with nothing, one with all of the teacher's weights, "
        "and two took nothing from it but its attention."
    )


def found(results: DemoResults) -> str:
    """What came out, with the share of fine-tuning's gain where there is a gain."""
    scratch, tuned = results.method("scratch"), results.method("finetune")
    gain = tuned.mean - scratch.mean
    sentences = [
        f"From scratch the student names {scratch.mean:.1f} % of the {results.test_images} test digits, "
        f"fine-tuned {tuned.mean:.1f} %.",
        " ".join(
            _attention(results, name, word) for name, word in (("copy", "Copied"), ("distill", "Distilled"))
        ),
    ]
    if gain > 0:
        shares = [
            f"{100 * (results.method(name).mean - scratch.mean) / gain:.0f} %" for name in ("copy", "distill")
        ]
        sentences.append(
            f"That is {shares[0]} (copied) and {shares[1]} (distilled) of what fine-tuning gained."
        )
    sentences.append(
        f"The fine-tuned and the distilled model together reach {results.method('ensemble').mean:.1f} %."
    )
    return " ".join(sentences)


def table_note(results: DemoResults) -> str:
    """How to read the table."""
    seeds = len(results.seeds)
    spread = (
        "one seed, so there is no deviation"
        if seeds == 1
        else f"mean ± sample deviation over {seeds} seeds; against scratch: within the seeds, ± standard error"
    )
    quick = " This was a quick run, with a shorter pre-training than the full demo." if results.quick else ""
    return (
        f"Top-1 on {results.test_images} test images that no training saw; {spread}. A seed draws its own "
        f"{results.labels} labels, weights and augmentation; within a seed all methods share the labels. "
        "No seed and no checkpoint was picked: each number is the last step of "
        f"{results.student_steps}.{quick}"
    )


def setting(results: DemoResults) -> str:
    """What was chosen, and why."""
    return (
        "scikit-learn's digits, 8 by 8 pixels, are enlarged to 12 by 12 and cut into 36 patches. Teacher "
        "and students are the same ViT: width 64, 4 blocks, 4 heads. Training images are turned, scaled, "
        f"sheared and moved a little. The teacher is a masked autoencoder, {results.teacher_steps:,} steps "
        "with 18 of 36 patches visible. The transfer weight is the published 3, on all layers. Two "
        "choices were made after trials, so that the question means something. There are 36 patches "
        "because with 16 it is easy to learn where to look: over six seeds students from scratch reached "
        "85.6 %, with copied attention 85.1, distilled 85.7 and fine-tuned 88.5. And position embeddings "
        "start with a deviation of 0.2, because at the usual 0.02 students from scratch reached only 51.4 "
        "% in as many steps (three seeds), which would flatter attention transfer."
    )


def footer(results: DemoResults) -> str:
    """Where the numbers come from."""
    command = "graftvit demo --quick" if results.quick else "graftvit demo"
    return f"Written by `{command}`: {results.minutes:.1f} minutes of training on the CPU, without a network."


def curves_alt(results: DemoResults) -> str:
    """The learning curves in words."""
    ends = ", ".join(f"{m.title.lower()} {m.mean:.1f} %" for m in results.methods if len(m.curve) > 0)
    return f"Test accuracy over {results.student_steps} training steps; at the end {ends}."


def maps_alt(results: DemoResults) -> str:
    """The attention maps in words."""
    return (
        f"{len(results.gazes)} rows of attention maps over handwritten digits: the image, then the "
        "teacher, the distilled, the copying and the scratch-trained student."
    )


def divergence_alt(results: DemoResults) -> str:
    """The divergences in words."""
    lines = [m for m in results.methods if len(m.divergence) > 0]
    means = ", ".join(f"{m.title.lower()} {_mean_divergence(m):.3f}" for m in lines)
    return f"Divergence from the teacher's attention by layer; mean over layers: {means} nats."


def _mean_divergence(method: MethodResult) -> float:
    values = [value for row in method.divergence for value in row]
    return sum(values) / len(values)


def percent(method: MethodResult) -> str:
    """`82.8 % ± 4.1`, or `82.8 %` for one seed."""
    spread = "" if method.deviation is None else f" ± {method.deviation:.1f}"
    return f"{method.mean:.1f} %{spread}"


def against_scratch(results: DemoResults, name: str) -> str:
    """`+1.7 ± 0.8`: mean gain within the seeds, in points, and its standard error; scratch has none."""
    if name == "scratch":
        return ""
    gains, error = results.gains(name), results.gain_error(name)
    mean = f"{statistics.fmean(gains):+.1f}".replace("-", "\N{MINUS SIGN}")
    return mean if error is None else f"{mean} ± {error:.1f}"


def _attention(results: DemoResults, name: str, word: str) -> str:
    """What one kind of transfer gives; whether more seeds would be needed to tell it from nothing."""
    seeds, error, gains = len(results.seeds), results.gain_error(name), results.gains(name)
    versus = f"{against_scratch(results, name)} points against scratch"
    if error is not None:
        versus += f", better with {sum(gain > 0 for gain in gains)} of {seeds} seeds"
        if abs(statistics.fmean(gains)) < 2 * error:
            versus += "; so few seeds cannot tell that from chance"
    return f"{word} attention alone gives {results.method(name).mean:.1f} % ({versus})."
