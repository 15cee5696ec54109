"""What a file's header says of pictures of the class that someone gave: they are no training pictures."""

import json

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.families.family import Geometry
from components.latents.keys import sizing_of
from components.training.trained_data import data_metadata


def row(name: str, *, repeats: int = 1, is_reg: bool = False, split: str = "train") -> SampleRow:
    provenance = {"licence": None, "author": None, "source": None}
    return SampleRow(name, name, name, "a dog", None, name, split, 64, 64, **provenance, repeats=repeats, is_reg=is_reg)


def test_pictures_of_the_class_are_counted_apart_and_named_as_such():
    rows = [row("10_dog/a.png", repeats=10), row("10_dog/b.png", repeats=10), row("10_dog/c.png", split="test"),
            row("1_class/d.png", is_reg=True), row("1_class/e.png", is_reg=True)]
    training = TrainingConfig(train_batch_size=4, max_train_steps=20)
    said = data_metadata(rows, "dogs", training, sizing_of(Geometry(64, 16, 64, 8, 4), training), 20)
    assert (said["ss_num_train_images"], said["ss_num_reg_images"], said["ss_num_validation_images"]) == (20, 2, 1)
    assert said["ss_num_batches_per_epoch"] == 10  # 20 pictures and as many of the class, by 4
    (dataset,) = json.loads(said["ss_datasets"])
    assert [(subset["image_dir"], subset["is_reg"]) for subset in dataset["subsets"]] == [
        ("10_dog", False), ("1_class", True)]
