"""What a comparison compares and measures, beside the stages that every student goes through."""

from __future__ import annotations

from pydantic import Field

from ...config import Section


class CompareConfig(Section):
    """The section `compare:` of a YAML file."""

    plans: dict[str, str] = Field(
        min_length=1, description="by name, the attention of each layer, such as {linear: '*: linear'}"
    )
    img_size: tuple[int, ...] = Field(
        (), description="sides of the images that students are trained at; student.img_size by default"
    )
    teacher_recipe: str | None = Field(
        None, description="recipe that trains the teacher first, in output_dir/teacher"
    )
    speed_img_size: tuple[int, ...] = Field(
        (), description="sides of the images that speed is measured at, beside those of the training"
    )
    batch_size: int = Field(64, gt=0, description="images in a batch of the throughput and peak memory")
    repeats: int = Field(7, gt=1, description="rounds of each timing")
    error_batches: int = Field(2, gt=0, description="test batches that the layers' errors are measured on")
