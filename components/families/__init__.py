"""Model families: how an architecture is loaded, encoded, denoised and adapted. A new one is a file and a line here."""

from components.families.family import Family
from components.families.stable_diffusion import StableDiffusion

FAMILIES: dict[str, Family] = {  # by the class name in model_index.json
    family.pipeline: family
    for family in (
        StableDiffusion(),
    )
}
