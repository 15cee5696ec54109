"""Model families: how an architecture is loaded, encoded, denoised and adapted. A new one is a file and a line here."""

from components.families.family import Family
from components.families.flux import Flux
from components.families.flux2 import Flux2Klein
from components.families.qwen_image import QwenImage
from components.families.sana import Sana
from components.families.stable_diffusion import StableDiffusion
from components.families.stable_diffusion_3 import StableDiffusion3
from components.families.stable_diffusion_xl import REFINER, StableDiffusionXL
from components.families.z_image import ZImage

FAMILIES: dict[str, Family] = {  # by the class name in model_index.json
    family.pipeline: family
    for family in (
        StableDiffusion(),
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        Sana(),
        QwenImage(),
        ZImage(),
        Flux2Klein(),
    )
}
EXCLUDED = {"StableDiffusionXLImg2ImgPipeline": REFINER}  # classes that no family trains, and why
