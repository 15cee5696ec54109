"""What CleanVision and imagededup find in a folder, by their own interpreter: `python peers.py ARM FOLDER RESULT`.

imagededup imports torch and torchvision for its networks, which its hashes do not use; the two modules that do so are
left out, so that their start is not counted against it. Nothing here imports Safelight.
"""

import json
import sys
import types
from pathlib import Path

FLAGS = {"dark": "dark", "light": "bright", "blurry": "blur", "low_information": "low_information",
         "odd_aspect_ratio": "odd_aspect", "odd_size": "odd_size"}


def cleanvision(folder: str) -> dict:
    from cleanvision import Imagelab

    lab = Imagelab(data_path=folder)
    lab.find_issues(n_jobs=1, verbose=False)
    flags = {ours: [Path(name).name for name in lab.issues.index[lab.issues[f"is_{theirs}_issue"]]]
             for theirs, ours in FLAGS.items()}
    sets = {kind: lab.info[f"{kind}_duplicates"]["sets"] for kind in ("exact", "near")}
    pairs = {kind: [[Path(a).name, Path(b).name] for members in found for i, a in enumerate(members)
                    for b in members[:i]] for kind, found in sets.items()}
    return {"flags": flags, **pairs}


def imagededup(folder: str) -> dict:
    for module, name in (("imagededup.utils.models", "CustomModel"), ("imagededup.methods.cnn", "CNN")):
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, None)
    from imagededup.methods import PHash

    hashes = PHash(verbose=False)
    codes = hashes.encode_images(image_dir=folder, num_enc_workers=0)

    def pairs(distance: int) -> list:
        found = hashes.find_duplicates(encoding_map=codes, max_distance_threshold=distance, num_dist_workers=0)
        return [[a, b] for a, near in found.items() for b in near if a < b]

    return {"flags": {}, "exact": pairs(0), "near": pairs(10)}


if __name__ == "__main__":
    arm, source, result = sys.argv[1:]
    Path(result).write_text(json.dumps({"cleanvision": cleanvision, "imagededup": imagededup}[arm](source)))
