"""Teacher and student side by side: one call a step, on the same images."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from textwrap import indent

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ...checkpoints.architecture import build
from ...checkpoints.copying_students import copied_teacher
from ...checkpoints.fit import own_norm_eps, refuse_changed, set_norm_eps
from ...checkpoints.pretrained import describe_model
from ...checkpoints.provenance import UNRECORDED, Pretrained, carried_license, carry, of_teacher, terms_of
from ...checkpoints.student import save
from ...models.copied import CopiedTeacher, Copying, copy_attention, copying_of
from ...models.copying.tape import Step, Tape
from ...models.copying.teacher_view import Normalization as Normalization
from ...models.copying.teacher_view import ShownImages, Wanted, view_teacher
from ...models.errors import JsonDict, TransferError, check_types, did_you_mean
from ...models.families import check_size, check_supported, evaluating, family_of, refuse_hooks
from ...models.given import Model, as_model, check_images
from ...models.hosting import host_attention
from ...models.lora import merged
from ...models.replay import replay_blocks, restore_blocks
from ..loss_config import DualSettings, MethodName, TransferConfig
from .distill import DistillMap
from .drop_path import SharedDropPath, check_shares, share_drop_paths
from .loss_terms import (
    DEFAULT_TEACHER,
    OF_DUAL,
    Lesson,
    Teacher,
    TeacherSide,
    Term,
    check_normalization,
    check_teacher,
    choose_teachers,
    collect,
    fill_tape,
    model_of,
    module_name,
    opened,
    placed,
    pretrained_normalization,
    read_settings,
    refuse_idle,
    resolve_terms,
    term_methods,
)
from .map_loss import MapLoss
from .method import Pairing, TransferMethod, TransferPlan
from .standardize import Batch, Measured, fit, mark_ready
from .taught_layer import Changes, begin_lesson, check_free, end_lesson, freeze_unused


@dataclass
class DualOutput:
    """The logits that learn from labels, the weighted transfer loss (a float32 scalar), its unweighted parts by name.

    The loss of distilled maps is a cross-entropy in nats, summed over layers: it does not fall below the teacher's
    entropy, and `DualViT.map_divergences` says how far above it is.
    `terms` has the unweighted loss of each entry of `transfer.losses`; it is empty for the short form.
    """

    logits: Tensor
    transfer_loss: Tensor
    parts: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)


class DualViT(nn.Module):
    """A student that is taught by frozen teachers: by copying or distilling their attention, features or classes.

    In the short form, `method` and the keywords describe one loss. With `losses`, several losses are summed:

        DualViT(teacher, student, losses=[{"method": "distill", "weight": 3}, {"method": "feature", "weight": 1}])

    Teacher and student are timm models of a supported family (`graftvit.models.families.SUPPORTED`, and
    pyramids); `feature`, `logits` and `block_output` take any models of timm. A teacher is never registered: it is not
    trained, not in the state dict, and stays in eval mode. Both may also be vision towers of transformers
    (docs/transfer.md). The student stays an ordinary model of its library, with its own state dict; while it is taught,
    its attention layers are hosted (`release` puts its own back).

    `forward` takes images as the student wants them. A student on the meta device has no heads to match: `heads=match`
    stays open.

    Args:
        teacher: one model (a module, what `load_pretrained` returns, or a source by name), or several by name, which an
            entry of `losses` names as its `teacher`; an entry without a name learns from the first.
        student: one model, in the same forms.
        method: what is copied, distilled or matched; "distill" by default.
        teacher_normalization: mean and standard deviation by channel of the images of a teacher that is a module; by
            default as its `pretrained_cfg` says.
        student_normalization: the same of the student's images.
        calibration: images (B, C, H, W), normalized for the student, that `heads="match"` is measured on.
        options: settings of `transfer`, as `TransferConfig` and docs/configuration.md describe them: those of the loss,
            or `losses`, a list of `LossEntry` or of dictionaries with its keys; `task_weight` and `share_drop_path`.

    Raises:
        ConfigError: a setting is unknown, not valid, or changes nothing.
        TransferError: teacher, student and method cannot be combined.
        UnsupportedModelError: one of them is not a model, or not of a kind that the method reads.
    """

    _in_use = False
    _dismissed = False
    _compiled: frozenset[str] = frozenset()

    @check_types("method")  # a registered method of another package is valid too
    def __init__(
        self,
        teacher: Teacher | Mapping[str, Teacher],
        student: Model,
        method: MethodName | None = None,
        *,
        teacher_normalization: Normalization | None = None,
        student_normalization: Normalization | None = None,
        calibration: Tensor | None = None,
        **options: Unpack[DualSettings],
    ) -> None:
        super().__init__()
        chosen_method = {} if method is None else {"method": method}
        self.config = read_settings(**options, **chosen_method)
        given = teacher if isinstance(teacher, Mapping) else {DEFAULT_TEACHER: teacher}
        chosen = choose_teachers(self.config, list(given))
        refuse_idle(chosen, list(given))
        loaded = {name: opened(name, each) for name, each in given.items()}
        student = _learner(student)
        self.student = student
        norm = student_normalization or pretrained_normalization(student)
        for given_norm in filter(None, (student_normalization, teacher_normalization)):
            check_normalization(given_norm)
        models = {name: model_of(name, each) for name, each in loaded.items()}
        for each in models.values():
            check_free(each, student)
        for each in (*models.values(), student):
            end_lesson(each)
        kinds = term_methods(self.config)
        for index, (kind, name) in enumerate(zip(kinds, chosen, strict=True)):
            with placed(self.config, index):
                check_teacher(models[name], kind)
        attends = any(kind.uses_heads for kind in kinds)
        check_supported(student, attention=attends)
        if attends:
            refuse_hooks(student, "student")
        self._normalization = norm
        layered = {name for kind, name in zip(kinds, chosen, strict=True) if kind.uses_layers}
        self._sides = tuple(
            TeacherSide.of(name, each, student, norm, teacher_normalization, layers=name in layered)
            for name, each in loaded.items()
        )
        sides = {side.name: side for side in self._sides}
        self._install(resolve_terms(self.config, chosen, sides, student, calibration))

    @property
    def teacher(self) -> nn.Module:
        """The whole frozen teacher; the first of several."""
        return self._sides[0].model

    @property
    def teachers(self) -> dict[str, nn.Module]:
        """The whole frozen teachers by name."""
        return {side.name: side.model for side in self._sides}

    @property
    def sides(self) -> tuple[TeacherSide, ...]:
        """The teachers with how images are shown to them."""
        return self._sides

    @property
    def teacher_input(self) -> ShownImages:
        """How images are shown to the first teacher."""
        return self._sides[0].input

    @property
    def teacher_part(self) -> nn.Module:
        """The part of the first teacher that a step runs."""
        return self._views[self._sides[0].name]

    @property
    def teacher_views(self) -> dict[str, nn.Module]:
        """The parts of the teachers that a step runs, by name; they share the teachers' parameters."""
        return self._views

    @property
    def terms(self) -> tuple[Term, ...]:
        """The losses and copies."""
        return self._terms

    @property
    def plan(self) -> TransferPlan:
        """The resolved pairs of the first loss."""
        return self._terms[0].plan

    @property
    def needs_teacher(self) -> bool:
        """Whether the student is nothing without its teacher: true where a method copies."""
        return any(term.method.copies for term in self._terms)

    def forward(self, images: Tensor, taught: Mapping[str, Tensor | Step] | None = None) -> DualOutput:
        """Run one step on images (B, C, H, W), normalized for the student.

        With `taught`, which `teach` or `show` gave for these images, no teacher runs.

        Raises DataError: the images do not fit the student. TransferError: `taught` is not what `teach` gives.
        """
        self._check_step(images)
        self._check_taught(taught, len(images))
        try:
            self._run_teachers(images, taught)
            logits = self._run_student(images)
            labelled = [term.labelled() for term in self._terms if term.labelled is not None]
            lesson = self._lesson(images, logits)
        finally:
            self._end_step()
        return DualOutput(labelled[0] if labelled else logits, lesson.loss, lesson.parts, lesson.terms)

    def _lesson(self, images: Tensor, logits: Tensor) -> Lesson:
        """Return the losses of the student's forward pass in this step."""
        losses = [(term, term.losses(logits, self._tapes[term.side.name].losses)) for term in self._terms]
        lesson = Lesson(torch.zeros((), device=images.device, dtype=torch.float32))
        for term, found in losses:
            if not found:
                continue
            loss = term.reduce(found.values())
            lesson.loss = lesson.loss + term.settings.weight * loss
            lesson.parts |= found
            if term.label:
                lesson.terms[term.label] = loss
        lesson.parts = {**lesson.terms, **lesson.parts}
        return lesson

    @contextmanager
    def teaching(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None) -> Iterator[Lesson]:
        """Teach a student that runs as a part of another model, once, on the same images: the backbone of a detector.

            with dual.teaching(images) as lesson:
                maps = dual.student.forward_intermediates(images, intermediates_only=True)
            loss = detection_loss(maps) + lesson.loss

        Args:
            images: (B, C, H, W), normalized for the student.
            sizes: rows and columns of each image where smaller ones are padded at the right and the bottom: tokens
                that begin in the padding do not count in the losses of attention and block outputs.

        Raises:
            TransferError: a method copies, or compares features or predictions of whole models, or the student did not
                run.
            DataError: the images do not fit the student.
        """
        for term in self._terms:
            check_teaches_parts(term.method)
        self._check_step(images)
        lesson = Lesson(torch.zeros((), device=images.device, dtype=torch.float32))
        try:
            self._run_teachers(images)
            if sizes is not None:
                filled = torch.tensor(sizes, device=images.device) / torch.tensor(
                    images.shape[-2:], device=images.device
                )
                for tape in self._tapes.values():
                    tape.fill(filled)
            self._replay()
            try:
                yield lesson
            finally:
                restore_blocks(self.student)
            found = self._lesson(images, images)
            lesson.loss, lesson.parts, lesson.terms = found.loss, found.parts, found.terms
        finally:
            self._end_step()

    @torch.no_grad()
    def map_divergences(self, images: Tensor) -> dict[str, float]:
        """Return KL(P_t ‖ P_s) in nats of each pair of layers whose maps are distilled, by the name of its loss.

        It is the cross-entropy of `distill` less the teacher's entropy H(P_t), which no student can learn away, at
        temperature 1 and over all query rows: the mean over images, heads and queries. 0 means that the maps are equal.
        Images are (B, C, H, W), normalized for the student; it runs in eval mode. Without the layers that learn from a
        mean of several heads, and empty where no maps are distilled.
        """
        watched = [
            each
            for each in self._changes.observers
            if isinstance(each, DistillMap) and max(each.link.sizes) == 1
        ]
        kept = [each.loss for each in watched]
        try:
            for each in watched:
                each.loss = MapLoss(entropy=True)
            with evaluating(self):
                losses = self.forward(images).parts if watched else {}
        finally:
            for each, loss in zip(watched, kept, strict=True):
                each.loss = loss
        found = {each.name: losses[each.name].item() for each in watched}
        return {name: value if value != value else max(0.0, value) for name, value in found.items()}

    def teach(self, images: Tensor) -> dict[str, Tensor]:
        """Return the results of the whole teachers by name, such as `teacher.classes`: what `taught` takes."""
        self._check_step(images)
        try:
            self._run_teachers(images, convert=False)
            return collect(self._tapes)
        finally:
            self._end_step()

    def show(self, images: Tensor) -> dict[str, Step]:
        """Return all that a step reads of the teachers by name, of layers too: what `taught` of another student takes.

        The other one has the same teachers, images and `needs`.
        """
        self._check_step(images)
        try:
            self._run_teachers(images)
            return {name: tape.step for name, tape in self._tapes.items() if tape.step is not None}
        finally:
            self._end_step()

    def needs(self, size: tuple[int, int]) -> object:
        """Return what a step on images of a height and width reads of the teachers; None if they run with its masks."""
        if self._drop_paths:
            return None
        sides = self._sides
        return [
            (each.name, self.wanted(each), type(each.input), each.input.teacher_size(size)) for each in sides
        ]

    def dismiss(self) -> None:
        """Let go of the teachers' weights: from now on each step needs `taught`."""
        for side in self._sides:
            side.model.to("meta")
        self._dismissed = True

    @check_types()
    def standardize(self, batches: Iterable[Batch]) -> None:
        """Measure the statistics of `transfer.standardize` on batches of images as the student wants them.

        A batch is its images, or these with their labels, or with what the teachers `taught` of them.
        Raises DataError for another one.
        """
        with evaluating(self):
            fit(self._measured, batches, self._shown)

    @check_types()
    def compile_teachers(self, names: Collection[str]) -> None:
        """Compile the forward passes of teachers by name. Raises TransferError: no teacher has that name."""
        for name in names:
            if name not in self._views:
                raise TransferError(f"there is no teacher {name!r}; {did_you_mean(name, self._views)}")
        self._compiled = self._compiled | frozenset(names)
        for name in names:
            self._views[name].compile(fullgraph=True)

    def predict(self, images: Tensor) -> Tensor:
        """Return the student's logits; the teacher runs only for the copy methods."""
        if self.needs_teacher:
            return self.forward(images).logits
        check_images(images, self.student)
        check_size(self.student, (images.shape[-2], images.shape[-1]))
        return family_of(self.student).predict(self.student, images)

    @check_types()
    def with_student(self, student: nn.Module) -> DualViT:
        """Return the same teachers, settings and resolved heads around another student, such as a moving average."""
        for side in self._sides:
            check_free(side.model, student)
        end_lesson(student)
        twin = DualViT.__new__(DualViT)
        nn.Module.__init__(twin)
        twin.config, twin._sides, twin._normalization = self.config, self._sides, self._normalization
        twin.student, twin._compiled, twin._dismissed = student, self._compiled, self._dismissed
        twin._install([replace(term, finish=None, labelled=None) for term in self._terms])
        mark_ready(twin.projectors, like=self.projectors)
        twin.train(student.training)
        return twin

    def release(self, *, bare: bool = False) -> nn.Module:
        """Return the student, which is then no longer taught: with timm's attention layers, every parameter trainable.

        The student of a copy method runs with its teacher's attention. It gets the part of the teacher that it needs,
        frozen; with `bare` it is returned alone, and the attention of its copied layers was never trained.

        Raises TransferError: `bare` of a student that copies nothing, or the part cannot be described.
        """
        if bare and not self.needs_teacher:
            raise TransferError(
                "bare=True is of methods that copy attention, and this student has its own: leave it out"
            )
        if bare and copying_of(self.student) is not None:
            raise TransferError(
                "the student was released with its teacher's part before, so bare=True comes too late"
            )
        if self._in_use:
            part = None if bare or not self.needs_teacher else self._described_part()
            end_lesson(self.student)
            self._in_use = False
            if part is not None:
                copy_attention(self.student, *part)
        return self.student

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the student, released or not, to a folder as a run does at its end, and return the folder.

        It is what `graftvit.load` opens: the student, and for a copy method the part of the teacher that it needs.
        `overwrite` replaces a model folder that is there.

        Raises CheckpointError: `folder` holds something, or timm did not create the student. TransferError: the
        teacher's part cannot be described.
        """
        return save(self, folder, overwrite=overwrite)

    def to_model(self) -> nn.Module:
        """Return the student as it would be saved, in eval mode; it shares its weights with that which is taught.

        Raises as `save`.
        """
        return self.to_pretrained().model

    def to_pretrained(self) -> Pretrained:
        """Return the student as it would be saved, with its normalization and how it was made. Raises as `save`."""
        known = describe_model(self.student, **self._normalization._asdict())
        model = build(known.architecture, known.model_args)
        epsilon = own_norm_eps(self.student, model, known.architecture)
        if epsilon is not None:
            set_norm_eps(model, epsilon)
        refuse_changed(self.student, model, known.architecture)
        model.load_state_dict(merged(self.student.state_dict()), assign=True)
        if self.needs_teacher and copying_of(model) is None:  # a released student has its part
            copy_attention(model, *self._described_part())
        made = self._provenance()
        license = carried_license(made)
        carry(model, license, known.label_names, made)
        return replace(known, model=model.eval(), license=license, provenance=made)

    def _provenance(self) -> JsonDict:
        """Return what is known of how the student was made; of its first weights, only a license that they carry."""
        teachers = {side.name: of_teacher(side.loaded) or _unrecorded(side.model) for side in self._sides}
        return {
            "version": version("graftvit"),
            "teacher": teachers.pop(self._sides[0].name),
            **({"teachers": teachers} if teachers else {}),
            "init": _unrecorded(self.student),
            "recipe": {"mode": "transfer", "transfer": self.config.model_dump(mode="json")},
        }

    def _described_part(self) -> tuple[nn.Module, Copying]:
        """Return the teacher whose attention is copied, and what the student copies of it."""
        self._check_saved_copy()
        side = next(term.side for term in self._terms if term.method.copies)
        teacher = copied_teacher(side.loaded or describe_model(side.model))
        return side.model, self.copying(replace(teacher, normalization=side.normalization))

    def copying(self, teacher: CopiedTeacher) -> Copying:
        """Return what the student of a copy method copies of a teacher that is built as described."""
        self._check_saved_copy()
        term = next(term for term in self._terms if term.method.copies)
        links = term.plan.links
        pairs, heads = tuple(link.pair for link in links), tuple(link.heads.groups for link in links)
        return Copying(term.settings.method, pairs, heads, self._normalization, teacher)

    def _check_saved_copy(self) -> None:
        """Raise TransferError: a student of these models is not saved with its teacher's attention."""
        term = next(term for term in self._terms if term.method.copies)
        for model in (term.side.model, self.student):
            cannot = family_of(model).cannot
            if "copying" in cannot:
                raise TransferError(
                    f"transfer.method={term.settings.method}: a student is saved with its teacher's attention only "
                    f"where both are plain vision transformers, and {type(model).__name__} {cannot['copying']}; use "
                    "distill, or take the student alone by release(bare=True)"
                )

    def describe(self) -> str:
        """Say in words what goes from where to where."""
        lines, shown = [], set[str]()
        for term in self._terms:
            told = [line for line in term.plan.describe() if line not in shown]
            shown |= set(term.plan.notes)  # of two models, which several losses may share
            text = "\n".join(told)
            lines.append(f"{term.label}:\n{indent(text, '  ')}" if term.label else text)
        for side in self._sides:
            name = f"{side.name}: " if len(self._sides) > 1 else ""
            lines += [name + line for line in side.input.describe()]
        return "\n".join(lines)

    def __setstate__(self, state: JsonDict) -> None:
        super().__setstate__(state)
        if self._in_use:  # of a copy, the lesson is its own
            begin_lesson(self.teachers.values(), self.student, self, self._changes)

    def _install(self, terms: Sequence[Term]) -> None:
        """Put the losses and copies into the student, and make the views of the teachers."""
        self._changes = Changes()
        self._tapes = {side.name: Tape() for side in self._sides}
        begin_lesson(self.teachers.values(), self.student, self, self._changes)
        try:
            self._terms, projectors = self._install_terms(terms)
            self._views = {side.name: self._view(side) for side in self._sides}
            for name in self._compiled:
                self._views[name].compile(fullgraph=True)
            self._drop_paths = self._shared_drop_paths() if self.config.share_drop_path else []
        except BaseException:
            end_lesson(self.student)
            raise
        if len(projectors) and not any(each.requires_grad for each in self.student.parameters()):
            end_lesson(self.student)
            raise TransferError(
                "every weight of the student is frozen, so the projectors alone would learn: call requires_grad_(True) "
                "of it, or of the part that shall learn"
            )
        self.projectors = projectors.to(next(self.student.parameters()))
        self._in_use = True

    def _install_terms(self, terms: Sequence[Term]) -> tuple[tuple[Term, ...], nn.ModuleDict]:
        """Return the terms with their losses, and the modules that learn beside the student."""
        attends = any(term.method.uses_heads for term in terms)
        hosts = host_attention(self.student) if attends else {}
        installed, projectors, self._measured = [], nn.ModuleDict(), list[Measured]()
        for index, term in enumerate(terms):
            side, tape = term.side, self._tapes[term.side.name]
            pairing = Pairing(
                term.settings, term.plan, side.model, self.student, tape, self._changes, hosts, term.prefix
            )
            with placed(self.config, index):
                term.method.check_pairing(pairing)
                made = term.method.install(pairing)
            installed.append(replace(term, finish=made.finish, labelled=made.labelled))
            self._measured += made.measured
            if not term.label:
                projectors = made.projectors
            elif len(made.projectors):
                projectors[module_name(term.label)] = made.projectors
        if attends:
            freeze_unused(self.student, hosts.values(), self._changes)
        return tuple(installed), projectors

    def wanted(self, side: TeacherSide) -> Wanted:
        """Return what a step needs of a teacher."""
        found = [term.method.wanted(term.plan) for term in self._terms if term.side is side]
        return functools.reduce(operator.or_, found)

    def _view(self, side: TeacherSide) -> nn.Module:
        return view_teacher(side.model, self.wanted(side), self._tapes[side.name])

    def _shared_drop_paths(self) -> list[SharedDropPath]:
        """Share the masks of the student with the first teacher."""
        first = self._sides[0]
        check_shares(first.name, first.model, self.student)
        return share_drop_paths(self.student, self._views[first.name], self._tapes[first.name])

    def _check_step(self, images: Tensor) -> None:
        check_images(images, self.student)
        for side in () if self._dismissed else self._sides:
            side.check_step(images)
        runs_again = self.training and getattr(self.student, "is_gradient_checkpointing", False)
        if runs_again and any(term.method.uses_layers for term in self._terms):
            raise TransferError(
                "gradient_checkpointing of transformers runs layers again in the backward pass, without what their "
                "teacher gave: call gradient_checkpointing_disable() of the student"
            )
        if not self._in_use:
            raise TransferError(
                "this DualViT was released and teaches nobody: call its student, or make another DualViT"
            )

    def _check_taught(self, taught: Mapping[str, Tensor | Step] | None, count: int) -> None:
        if taught is None or (
            isinstance(taught, Mapping) and any(isinstance(each, Step) for each in taught.values())
        ):
            return
        wanted = {side.name: self.wanted(side) for side in self._sides}
        names = [f"{side}.{result}" for side, each in wanted.items() for result in sorted(each.whole)]
        missing = [name for name in names if name not in taught] if isinstance(taught, Mapping) else names
        if missing or any(each.layers for each in wanted.values()):
            layered = "" if missing else ", and these methods read layers, which it does not hold"
            raise TransferError(f"taught is not what `teach` gives of these teachers{layered}: leave it out")
        given = [taught[name] for name in names]
        if any(isinstance(each, Tensor) and len(each) != count for each in given):
            raise TransferError(
                f"taught is of other images than these {count}: give what `teach` gave for them"
            )

    @contextmanager
    def _shown(self, images: Tensor, taught: Mapping[str, Tensor | Step] | None = None) -> Iterator[None]:
        """Let the teachers see images; within, what they give is on the tapes."""
        try:
            self._run_teachers(images, taught)
            yield
        finally:
            self._end_step()

    def _end_step(self) -> None:
        for tape in self._tapes.values():
            tape.end()

    def _run_teachers(
        self, images: Tensor, taught: Mapping[str, Tensor | Step] | None = None, *, convert: bool = True
    ) -> None:
        if taught is None and self._dismissed:
            raise TransferError("the teachers were dismissed and see no more images: give what they taught")
        for side in self._sides:
            rules = [term.plan.grids for term in self._terms if term.side is side]
            tape = self._tapes[side.name]
            tape.begin(*{side.input.grids(images, rule) for rule in rules})
            tape.features["images"] = images
        if self.training:
            for drop_path in self._drop_paths:
                drop_path.draw(images.shape[0], images)
        for side in self._sides:
            fill_tape(side, self._views[side.name], self._tapes[side.name], images, taught, convert=convert)

    def _replay(self) -> None:
        for tape in self._tapes.values():
            replay_blocks(self.student, tape.moment)

    def _run_student(self, images: Tensor) -> Tensor:
        self._replay()
        try:
            logits = family_of(self.student).predict(self.student, images)
        finally:
            restore_blocks(self.student)
        return logits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DualViT:
        # The teachers follow the student to a device although they are not registered.
        for side in self._sides:
            side.input.to(fn(side.input.scale).device)
            if not self._dismissed:
                side.model._apply(fn)
        super()._apply(fn, recurse)
        return self


# The teacher-student wrapper that the settings of a run describe.


def _unrecorded(model: nn.Module) -> JsonDict:
    """Return the provenance of weights whose source is not known."""
    license = terms_of(model).license
    return {**UNRECORDED, **({"license": license} if license else {})}


def _learner(student: Model) -> nn.Module:
    """Return a student with gradients. Raises UnsupportedModelError, or TransferError for that of another DualViT."""
    if isinstance(student, DualViT):
        raise TransferError("the student is a DualViT, which would stop to teach it: give its release()")
    model = as_model(student, "student")
    return model.requires_grad_(True) if isinstance(student, Pretrained) else model


def check_teaches_parts(method: TransferMethod) -> None:
    """Raise TransferError for a method that cannot teach a backbone, which gives neither features nor classes."""
    if not method.loss_within_blocks:
        raise TransferError(
            f"transfer.method={method.name} teaches a classifier, and a part of another model learns from layers: "
            "use attention_output, distill, or block_output, of a pyramid with transfer.layers that end its stages"
        )


@check_types()
def build_dual(
    config: TransferConfig,
    teachers: Mapping[str, Teacher],
    student: nn.Module,
    student_normalization: Normalization,
    calibration: Tensor | None = None,
) -> DualViT:
    """Return the wrapper of a configuration.

    Args:
        config: the settings of `transfer`.
        teachers: the teachers by name.
        student: the model that learns.
        student_normalization: mean and standard deviation by channel of the student's images.
        calibration: images (B, C, H, W), normalized for the student, that `heads=match` is measured on.
    """
    return DualViT(
        teachers,
        student,
        student_normalization=student_normalization,
        calibration=calibration,
        **{name: getattr(config, name) for name in OF_DUAL},
    )
