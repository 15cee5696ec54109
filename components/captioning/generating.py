"""What captioners built on transformers share: loading without code or pickles, and without random weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captioning.captioner import Generation
from components.captioning.weights import Weights, model_type
from components.errors import BadInput

if TYPE_CHECKING:
    import torch


class GeneratingCaptioner:
    """A model of transformers that writes a caption token by token, with the processor saved beside it."""

    name = ""
    kind = "prose"
    max_batch = 64
    needs_gpu = False
    default_prompt = ""
    types: tuple[str, ...] = ()  # model types that are its own; none: any
    model_class = ""  # of transformers
    processor_class = "AutoProcessor"

    def __init__(self, weights: Weights, generation: Generation):
        self.weights, self.revision = weights, weights.revision
        self._options = {
            "max_new_tokens": generation.max_new_tokens,
            "num_beams": generation.num_beams,
            "do_sample": False,
        }
        self._model: Any = None
        self._processor: Any = None

    @property
    def settings(self) -> str:
        return f"{self._options['max_new_tokens']} tokens, {self._options['num_beams']} beams"

    def load(self, device: str, dtype: "torch.dtype", offline: bool) -> None:
        """Raises BadInput for weights that are another model's, or incomplete, or need what is not installed."""
        import transformers

        folder = self.weights.fetched(offline)
        found = model_type(folder)
        if self.types and found not in self.types:
            raise BadInput(
                f"captioner {self.name}={self.weights.source}: holds a {found} model, expected"
                f" {' or '.join(self.types)}"
            )
        try:
            self._processor = getattr(transformers, self.processor_class).from_pretrained(folder)
            self._model, report = getattr(transformers, self.model_class).from_pretrained(
                folder, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, ImportError, KeyError, AttributeError, RuntimeError) as error:
            raise BadInput(self._why(folder, error)) from error
        if report["missing_keys"]:
            raise BadInput(
                f"captioner {self.name}={self.weights.source}: lacks {len(report['missing_keys'])} of its"
                f" tensors, such as {sorted(report['missing_keys'])[0]}; fetch it again"
            )
        self._model.eval().to(device)

    def _why(self, folder: Path, error: Exception) -> str:
        said = f"captioner {self.name}={self.weights.source}"
        for_video = (folder / "video_preprocessor_config.json").exists()  # every processor of videos needs it
        if find_spec("torchvision") is None and (for_video or "torchvision" in str(error).lower()):
            return (
                f"{said}: its processor needs torchvision, which is not installed; pip install torchvision, or"
                " choose a model that does without, such as a LLaVA"
            )
        if not list(folder.glob("*.safetensors")):
            return f"{said}: has no *.safetensors, and pickled weights are never read; choose one that has"
        return f"{said}: cannot be loaded: {' '.join(str(error).split())[:200]}; fetch it again"

    def _moved(self, inputs: Any) -> Any:
        """A processor's tensors on the model's device, pixels in its precision."""
        return inputs.to(self._model.device, self._model.dtype)
