"""Florence-2: prose as long as the task asks for. Xiao et al. 2023, arXiv:2311.06242.

The class is transformers' own; the first release's repositories bring code of their own and stand for those without.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from components.captioning.captioner import CaptionContext, CaptionResult
from components.captioning.generating import GeneratingCaptioner
from components.errors import BadInput


class Florence2(GeneratingCaptioner):
    """`Florence2ForConditionalGeneration`; the prompt is one of its tasks that answer in text."""

    name = "florence2"
    types = ("florence2",)
    model_class = "Florence2ForConditionalGeneration"
    processor_class = "Florence2Processor"
    default_prompt = "<MORE_DETAILED_CAPTION>"
    renamed = {  # noqa: RUF012
        f"microsoft/Florence-2-{size}": f"florence-community/Florence-2-{size}"
        for size in ("base", "base-ft", "large", "large-ft")
    }

    def caption(self, images: Sequence[Image.Image], contexts: Sequence[CaptionContext]) -> list[CaptionResult]:
        """Raises BadInput for a task that answers with boxes."""
        tasks = [context.prompt for context in contexts]
        for task in tasks:
            if self._processor.tasks_answer_post_processing_type.get(task, "pure_text") != "pure_text":
                raise BadInput(f"captioner florence2: {task} answers with boxes; ask for {self.default_prompt}")
        inputs = self._moved(self._processor(text=tasks, images=list(images), padding=True, return_tensors="pt"))
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, **self._options)
        padding = self._processor.tokenizer.pad_token
        texts = self._processor.batch_decode(tokens, skip_special_tokens=False)
        return [
            CaptionResult(
                self._processor.post_process_generation(text.replace(padding, ""), task=task, image_size=image.size)[
                    task
                ]
            )
            for text, task, image in zip(texts, tasks, images, strict=True)
        ]
