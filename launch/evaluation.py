"""Evaluation of what the command line names: which data, which device, which models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from accelerate import Accelerator
from torch import Tensor

from ..models.errors import ConfigError
from ..transfer.config import RunConfig
from ..transfer.data.augment import with_settings
from ..transfer.data.loaders import create_eval_loader
from ..transfer.engine.parallel import create_accelerator
from ..transfer.evaluate import Metrics, evaluate
from .candidates import check_alike, load_candidate, predictor, run_config
from .config import Setting, load_config


def evaluate_sources(
    sources: Sequence[str], settings: Sequence[Setting], *, subset: str | None = None, real: bool = False
) -> dict[str, Metrics]:
    """Metrics of each source and, where there are several, of their ensemble.

    Args:
        sources: Run folders, student folders or teacher sources.
        settings: Of `data`, `engine` and `teacher`; data settings are those of the first run among the sources
            where these do not say otherwise.
        subset: `imagenet-a` or `imagenet-r`.
        real: Score against the ReaL labels of ImageNet's validation set.

    Raises:
        GraftError: if a source cannot be read, or the sources do not go together.
    """
    repeated = [source for source in sources if sources.count(source) > 1]
    if repeated:
        raise ConfigError(f"checkpoint {repeated[0]!r} is named twice; name each once")
    how = load_config(None, [each for each in settings if each.key.startswith("teacher.")]).teacher
    asked = load_config(None, [each for each in settings if each.key.startswith("data.")]).data
    candidates = [load_candidate(source, how) for source in sources]
    candidates = [replace(each, spec=with_settings(each.spec, asked)) for each in candidates]
    check_alike(candidates)
    config = _data_settings(sources, settings)
    accelerator = create_accelerator(config)
    spec = candidates[0].spec
    loader = create_eval_loader(
        config.data,
        spec,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        real=real,
    )
    for candidate in candidates:
        candidate.module.to(accelerator.device).eval()
    models = {each.name: _autocast(predictor(each, spec), accelerator) for each in candidates}
    return evaluate(models, loader, accelerator=accelerator, subset=subset)


def _data_settings(sources: Sequence[str], settings: Sequence[Setting]) -> RunConfig:
    others = [each for each in settings if not each.key.startswith("teacher.")]
    runs = [config for config in map(run_config, sources) if config is not None]
    if not runs:
        return load_config(None, others)
    own = runs[0].data.model_dump()
    return load_config(None, [*(Setting(f"data.{name}", own[name], f"data.{name}") for name in own), *others])


def _autocast(predict: Callable[[Tensor], Tensor], accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with accelerator.autocast():
            return predict(images)

    return run
