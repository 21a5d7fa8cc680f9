"""What section `task` holds for image_classification."""

from typing import Literal

from pydantic import Field

from megadsl.config.section import Section


class ImageOptions(Section):
    """Options of image_classification; the sizes of images and the classes come with the data."""

    patch_size: int = Field(16, ge=1, description="side of the square patches that an image is cut into; it must divide height and width")
    pooling: Literal["class_token", "mean"] = Field(
        "class_token", description="what the classifier reads: a learned token in front of the patches, or the mean of all patches"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of a training label that is spread over all classes alike")
    mixup_alpha: float = Field(
        0.0, ge=0, description="a of Beta(a, a), from which mixup (arXiv 1710.09412) draws how much of a second image is blended in; 0: none"
    )
    cutmix_alpha: float = Field(
        0.0, ge=0, description="the same for the area that CutMix (arXiv 1905.04899) pastes from a second image; with both, a coin decides"
    )
    crop_padding: int = Field(0, ge=0, description="black pixels around an image, of which a training sample is cut out at random")
    horizontal_flip: bool = Field(False, description="mirror half of the training samples")
