"""A teacher, a student and the same images for both: what a search or a calibration measures on."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from ...checkpoints.pretrained import load_pretrained
from ...models.copying.teacher_view import Normalization
from ..config import RunConfig
from ..data.loaders import create_train_loader
from ..data.randomness import preserved
from .alike import shown_to


def calibration_batches(
    config: RunConfig, student: str, count: int
) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return the teacher of `config`, the model of the source `student`, and the first `count` batches of the
    training set.

    Each batch is a pair: the images as the teacher wants them, and as the student does. Both models are in eval
    mode and need no gradients.

    Raises CheckpointError, DataError or TransferError, one sentence each.
    """
    ours = load_pretrained(student)
    how = config.teacher
    theirs = load_pretrained(
        str(how.source),
        model=how.model,
        model_args=how.model_args,
        img_size=how.image_size(ours.preprocessing.input_size[1:]),
        position_embedding=how.position_embedding,
        revision=how.revision,
    )
    norms = Normalization(theirs.mean, theirs.std), Normalization(ours.mean, ours.std)
    teacher_input = shown_to(theirs.model, ours.model, *norms)
    with preserved():
        loader = create_train_loader(config.data, ours.preprocessing, seed=config.seed, labels=False)
        images = [batch[0] for batch in itertools.islice(loader.epoch(0), count)]
    return theirs.model, ours.model, [(teacher_input(batch), batch) for batch in images]
