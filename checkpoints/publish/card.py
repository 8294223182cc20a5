"""Write the model card of a student: metadata that the hub reads, and how the student was made, in plain words."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

from ...models.errors import Json, JsonDict
from ..licenses import card_fields
from ..provenance import KEY
from ..public import public
from .card_text import section
from .sections import CardFacts, body, classes, measured, needs_graftvit

MARKER = "<!-- Written by graftvit push. Remove this line to keep a card that you edit. -->"
METRICS = {"top1": "Top-1 accuracy (%)", "top5": "Top-5 accuracy (%)"}


def student_card(config: Json, facts: CardFacts) -> str:
    """Return README.md for a student with this config.json, without any path of this machine."""
    config = public(config)
    head = _metadata(config, facts).to_yaml()
    return str(ModelCard(f"---\n{head}\n---\n{MARKER}\n\n{body(config, facts)}"))


def is_generated(card: str) -> bool:
    """Return whether a card is generated and unedited: it may be replaced."""
    return MARKER in card


def hub_name(source: str) -> str | None:
    """Return the hub repository of a source of weights, None for a local one and for one that timm has elsewhere."""
    if source.startswith(("hf-hub:", "hf_hub:")):
        return source.partition(":")[2].partition("@")[0]
    try:
        published = get_pretrained_cfg(source)
    except (RuntimeError, ValueError):  # no model of timm, or none of its tags
        return None
    place = getattr(published, "hf_hub_id", None)
    if published is None or not place:
        return None
    name = ".".join(filter(None, (published.architecture, published.tag)))
    return f"{place}{name}" if place.endswith("/") else str(place)


def _metadata(config: Json, facts: CardFacts) -> ModelCardData:
    made = section(config, KEY)
    dataset = str(section(section(made, "recipe"), "data").get("dataset") or "")
    results = _eval_results(config, facts)
    transfer = ["attention-transfer"] if made.get("teacher") else []
    return ModelCardData(
        library_name="graftvit" if needs_graftvit(config, facts) else "timm",
        pipeline_tag="image-classification" if classes(config) else "image-feature-extraction",
        tags=["graftvit", "timm", "vision-transformer", *transfer],
        datasets=[dataset.removeprefix("hfds/")] if dataset.startswith("hfds/") else None,
        metrics=["accuracy"] if results else None,
        model_name=facts.name if results else None,
        eval_results=results or None,
        **{**_bases(made), **card_fields(facts.license)},
    )


def _bases(made: Json) -> JsonDict:
    """Return the hub's repositories that the student learned from or started from.

    The hub knows adapters, merges, quantized models and finetunes; whole weights that were trained on what
    others give are the last.
    """
    further = section(made, "teachers")
    origins = [section(made, "teacher"), *(section(further, name) for name in further), section(made, "init")]
    sources = [str(origin.get("source", "")) for origin in origins]
    names = list(dict.fromkeys(name for name in map(hub_name, filter(None, sources)) if name))
    return {"base_model": names, "base_model_relation": "finetune"} if names else {}


def _eval_results(config: Json, facts: CardFacts) -> list[EvalResult]:
    """Measured accuracies."""
    made = section(config, KEY)
    recipe = section(made, "recipe")
    dataset = str(section(made, "results").get("dataset") or "")
    name, split = facts.dataset_name or dataset.rpartition("/")[2], section(recipe, "data").get("val_split")
    if not name:
        return []
    found = measured(config)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset.partition("/")[2] or dataset or name,
            dataset_name=name,
            dataset_split=split if isinstance(split, str) else None,
            metric_type="accuracy",
            metric_name=words,
            metric_value=round(found[key], 3),
        )
        for key, words in METRICS.items()
        if key in found
    ]
