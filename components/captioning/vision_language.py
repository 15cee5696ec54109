"""Vision-language models with a chat template, asked in words: LLaVA and JoyCaption, Qwen-VL and their like."""

from collections.abc import Sequence

import torch
from PIL import Image

from components.captioning.captioner import CaptionContext, CaptionResult
from components.captioning.generating import GeneratingCaptioner
from components.errors import BadInput


class VisionLanguageModel(GeneratingCaptioner):
    """`AutoModelForImageTextToText`; the prompt is what a person would ask it."""

    name = "vlm"
    needs_gpu = True
    model_class = "AutoModelForImageTextToText"
    default_prompt = "Write a caption of this picture in one or two plain sentences."

    def load(self, device: str, dtype: torch.dtype, offline: bool) -> None:
        """Raises BadInput, also for a model without a chat template."""
        super().load(device, dtype, offline)
        if not getattr(self._processor, "chat_template", None):
            raise BadInput(
                f"captioner vlm={self.weights.source}: has no chat template, so it cannot be asked;"
                " choose a model tuned to follow instructions"
            )
        self._processor.tokenizer.padding_side = "left"  # so that every answer begins where its question ends

    def caption(self, images: Sequence[Image.Image], contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        asked = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": context.prompt}]}]
            for image, context in zip(images, contexts, strict=True)
        ]
        inputs = self._moved(
            self._processor.apply_chat_template(
                asked,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt", "padding": True},
            )
        )
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **self._options)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self._processor.batch_decode(answers, skip_special_tokens=True)
        return [CaptionResult(text.strip()) for text in texts]
