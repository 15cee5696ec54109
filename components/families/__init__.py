"""Model families: how an architecture is loaded, encoded, denoised and adapted. A new one is a file and a line here."""

from components.families.family import Family
from components.families.flux import Flux
from components.families.stable_diffusion import StableDiffusion
from components.families.stable_diffusion_3 import StableDiffusion3
from components.families.stable_diffusion_xl import REFINER, StableDiffusionXL

FAMILIES: dict[str, Family] = {  # by the class name in model_index.json
    family.pipeline: family
    for family in (
        StableDiffusion(),
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
    )
}
EXCLUDED = {"StableDiffusionXLImg2ImgPipeline": REFINER}  # classes that no family trains, and why
