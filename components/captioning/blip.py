"""BLIP: short prose, from a prompt that it goes on from where there is one. Li et al. 2022, arXiv:2201.12086."""

from collections.abc import Sequence

import torch
from PIL import Image

from components.captioning.captioner import CaptionContext, CaptionResult
from components.captioning.generating import GeneratingCaptioner


class Blip(GeneratingCaptioner):
    """`BlipForConditionalGeneration`; a prompt such as "a photo of" becomes the caption's beginning."""

    name = "blip"
    types = ("blip",)
    model_class = "BlipForConditionalGeneration"
    processor_class = "BlipProcessor"

    def caption(self, images: Sequence[Image.Image], contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        """Pictures that are asked the same go through together: padding in front would shift BLIP's positions."""
        results: list[CaptionResult] = [CaptionResult()] * len(images)
        for prompt in dict.fromkeys(context.prompt for context in contexts):
            places = [i for i, context in enumerate(contexts) if context.prompt == prompt]
            for i, text in zip(places, self._texts([images[i] for i in places], prompt), strict=True):
                results[i] = CaptionResult(text)
        return results

    def _texts(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        asked = {"text": [prompt] * len(images)} if prompt else {}
        inputs = self._moved(self._processor(images=list(images), return_tensors="pt", **asked))
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **self._options)
        return [text.strip() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]
