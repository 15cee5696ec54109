"""What a published file says of the data it was trained on, under the header keys that kohya's trainers write.

Folders go out by their last name only, so that no path and nobody's name is published.
Source: kohya-ss/sd-scripts@48d368f, train_network.py, which reads them again with every value a string.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from components.config import TrainingConfig
from components.curation.manifest import SampleRow
from components.latents.buckets import Bucket, Sizing

MOST_TAGS = 500  # in a header, the most frequent; captions that are sentences are hardly ever alike
MOST_FOLDERS = 50
Folder = tuple[str, int]  # name and repeats


def data_metadata(
    rows: Sequence[SampleRow], dataset: str, training: TrainingConfig, sizing: Sizing, steps: int
) -> dict[str, Any]:
    """Counts, epochs, buckets, folders and tags after `steps` steps at these sizes, by header key; None: left out.

    Pictures in no folder are those of `dataset`. As in kohya's trainers a picture counts as often as it is repeated,
    and at each resolution, except among the tags and in its folder's `img_count`.
    """
    train, given = ([row for row in rows if row.split == "train" and row.is_reg is is_reg] for is_reg in (False, True))
    each = len(sizing.resolutions)
    images = each * sum(row.repeats for row in train)
    drawn = training.num_class_images if training.class_prompt else 0
    class_images = each * (drawn + sum(row.repeats for row in given))
    epoch = images * (2 if class_images else 1)  # as many pictures of the class as of the data
    passes = training.gradient_accumulation_steps * training.num_processes
    batches = math.ceil(epoch / training.train_batch_size)

    def epochs(count: int) -> int:
        return math.ceil(count * passes / batches)

    folders = _folders(train, dataset)
    sizes = {size for resolution in sizing.resolutions for size in sizing.buckets_of(resolution)}
    sides = [side for size in sizes for side in (size.width, size.height)]
    bucketed = {"enable_bucket": len(sizes) > 1, "min_bucket_reso": min(sides), "max_bucket_reso": max(sides)}
    about = {
        "batch_size_per_device": training.train_batch_size,
        "num_train_images": images,
        "num_reg_images": class_images,
        **bucketed,
    }
    buckets, side = _bucket_info(train, sizing), sizing.resolution
    subsets = [
        {
            "image_dir": name,
            "img_count": len(members),
            "num_repeats": repeats,
            "shuffle_caption": training.shuffle_caption,
            "keep_tokens": training.keep_tokens,
            "is_reg": is_reg,
        }
        for is_reg, found in ((False, folders), (True, _folders(given, dataset)))
        for (name, repeats), members in found.items()
    ]
    whole = {"is_dreambooth": True, **about, "resolution": [side, side], "bucket_info": buckets, "subsets": subsets}
    named = _named(folders)
    return {
        **{f"ss_{key}": value for key, value in about.items()},
        "ss_bucket_no_upscale": sizing.no_upscale,
        "ss_num_validation_images": sum(row.split == "test" for row in rows),
        "ss_num_batches_per_epoch": batches,
        "ss_num_epochs": epochs(training.max_train_steps),
        "ss_epoch": epochs(steps),
        "ss_bucket_info": json.dumps(buckets),
        "ss_dataset_dirs": json.dumps(
            {name: {"n_repeats": members[0].repeats, "img_count": len(members)} for name, members in named.items()}
        ),
        "ss_tag_frequency": json.dumps(_tag_frequency(named, training.caption_separator), ensure_ascii=False),
        "ss_datasets": json.dumps([whole], ensure_ascii=False),
    }


def _folders(rows: Sequence[SampleRow], dataset: str) -> dict[Folder, list[SampleRow]]:
    """The fullest first."""
    found: dict[Folder, list[SampleRow]] = {}
    for row in rows:
        found.setdefault((PurePath(row.file_name).parent.name or dataset, row.repeats), []).append(row)
    return dict(sorted(found.items(), key=lambda entry: (-len(entry[1]), entry[0]))[:MOST_FOLDERS])


def _named(folders: dict[Folder, list[SampleRow]]) -> dict[str, list[SampleRow]]:
    """By name alone; one that comes again is numbered, as kohya's trainers do."""
    seen: Counter[str] = Counter()
    named = {}
    for (name, _), members in folders.items():
        seen[name] += 1
        named[name if seen[name] == 1 else f"{name} ({seen[name]})"] = members
    return named


def _tag_frequency(named: dict[str, list[SampleRow]], separator: str) -> dict[str, dict[str, int]]:
    counts = Counter(
        (name, tag.strip().lower())
        for name, members in named.items()
        for row in members
        for tag in row.text.split(separator)
        if tag.strip()
    )
    frequency: dict[str, dict[str, int]] = {}
    for (name, tag), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_TAGS]:
        frequency.setdefault(name, {})[tag] = count
    return frequency


def _bucket_info(rows: Sequence[SampleRow], sizing: Sizing) -> dict[str, Any]:
    placed = [(row, place.bucket) for row in rows for place in sizing.place(row.width, row.height)]
    counts: Counter[Bucket] = Counter()
    for row, bucket in placed:
        counts[bucket] += row.repeats
    off = [abs(bucket.width / bucket.height - row.width / row.height) for row, bucket in placed]
    return {
        "buckets": {
            str(i): {"resolution": [bucket.width, bucket.height], "count": counts[bucket]}
            for i, bucket in enumerate(sorted(counts))
        },
        "mean_img_ar_error": round(sum(off) / max(1, len(off)), 6),
    }
