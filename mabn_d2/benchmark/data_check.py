"""Times the check of a COCO file of COCO's size, beside what Detectron2 needs to read it.

    python -m mabn_d2.benchmark.data_check --output benchmarks/data_check.json

Each measurement is the CPU time of a process of its own, from before the reading to its end.
`added` is the CPU time of the check and of the loading after it, less that of Detectron2's loading
alone, as a share of the time of pycocotools' `COCO(file)`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from . import measure

SIZE = (640, 480)  # width and height of all images
READERS = ("pycocotools", "detectron2", "checked", "checked, skip")
LINKS = 60_000  # names of one file; file systems have a limit


def write_dataset(folder: Path, num_images: int, num_annotations: int) -> tuple[Path, Path]:
    """Write images, a COCO file like instances_train2017.json, and one with bad entries.

    Returns:
        The paths of the two COCO files. The second has a bad box in every 10,000th annotation.
    """
    rng = np.random.default_rng(0)
    _write_images(folder / "images", num_images)
    images = [
        {
            "license": 3, "file_name": f"{i:012d}.png", "height": SIZE[1], "width": SIZE[0],
            "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
            "date_captured": "2013-11-14 11:18:45", "id": i,
            "flickr_url": "http://farm9.staticflickr.com/8186/8119368305_4e622c8349_z.jpg",
        }
        for i in range(num_images)
    ]  # fmt: skip
    annotations = _annotations(rng, num_images, num_annotations)
    categories = [{"supercategory": "s", "id": i + 1, "name": f"class {i}"} for i in range(80)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    good, bad = folder / "good.json", folder / "bad.json"
    good.write_text(json.dumps(content))
    for annotation in annotations[::10_000]:
        annotation["bbox"] = [2 * SIZE[0], 0, 10, 10]
    bad.write_text(json.dumps(content))
    return good, bad


def _write_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        path = folder / f"{i:012d}.png"
        if i % LINKS == 0:
            source = path
            Image.new("L", SIZE).save(source)
        else:
            os.link(source, path)


def _annotations(rng: np.random.Generator, num_images: int, count: int) -> list[dict[str, Any]]:
    """One in 90 is a crowd region with an RLE; the others have one or two polygons, as COCO's do."""
    numbers = np.arange(count)
    polygons = np.where(numbers % 90 == 0, 0, 1 + (numbers % 5 == 0))
    corners = rng.random((count, 2)) * (500, 350)
    sizes = rng.random((count, 2)) * (139, 129) + 1
    lengths = rng.integers(4, 38, polygons.sum())
    owners = np.repeat(np.repeat(numbers, polygons), lengths)
    points = np.round(rng.random((lengths.sum(), 2)) * sizes[owners] + corners[owners], 2)
    parts = iter(np.split(points.ravel(), 2 * np.cumsum(lengths)[:-1]))
    boxes = np.round(np.concatenate([corners, sizes], 1), 2).tolist()
    areas = np.round(sizes.prod(1), 5).tolist()
    images = rng.integers(num_images, size=count).tolist()
    runs = [272, 2, 4, 4, 4, 4, 2, 9, 1, 2, 16, 43, 143, 24] * 8
    rle = {"counts": [*runs, SIZE[0] * SIZE[1] - sum(runs)], "size": [SIZE[1], SIZE[0]]}
    return [
        {
            "segmentation": [next(parts).tolist() for _ in range(polygons[i])] or rle,
            "area": areas[i],
            "iscrowd": int(i % 90 == 0),
            "image_id": images[i],
            "bbox": boxes[i],
            "category_id": i % 80 + 1,
            "id": 900_000 + i,
        }
        for i in tqdm(range(count), "annotations", mininterval=1)
    ]


def read(reader: str, json_file: str, image_root: str) -> float:
    """Read a COCO file in this process; return CPU seconds."""
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances
    from pycocotools.coco import COCO

    from .. import add_mabn_config
    from ..engine import check_data

    register_coco_instances("benchmark", {}, json_file, image_root)
    cfg = get_cfg()
    add_mabn_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = ("benchmark",)
    cfg.DATALOADER.BAD_INPUT = "skip" if "skip" in reader else "stop"
    start = time.process_time()
    if reader == "pycocotools":
        kept = COCO(json_file)
    else:
        if reader.startswith("checked"):
            check_data(cfg)
        kept = DatasetCatalog.get("benchmark")
    seconds = time.process_time() - start
    assert kept
    return seconds


def run(args: argparse.Namespace) -> dict:
    """Measure all readers in turn, round by round; return the report."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        good, bad = write_dataset(folder, args.images, args.annotations)
        seconds: dict[str, list[float]] = {reader: [] for reader in READERS}
        for _ in tqdm(range(args.rounds), "rounds"):
            for reader in READERS:
                file = bad if "skip" in reader else good
                command = [
                    sys.executable,
                    "-m",
                    __spec__.name,
                    "--read",
                    reader,
                    str(file),
                    str(folder / "images"),
                ]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                seconds[reader].append(json.loads(done.stdout.splitlines()[-1]))
        megabytes = good.stat().st_size / 1e6
    rows = []
    for reader in READERS:
        pairs = zip(seconds[reader], seconds["detectron2"], seconds["pycocotools"], strict=True)
        rows.append(
            {
                "reader": reader,
                "cpu_s": statistics.median(seconds[reader]),
                "added": statistics.median((own - d2) / coco for own, d2, coco in pairs),
            }
        )
    settings = {"images": args.images, "annotations": args.annotations, "file_mb": round(megabytes)}
    return {
        "settings": {**settings, "rounds": args.rounds},
        **measure.describe("cpu"),
        "results": rows,
        "seconds": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, default=860_001)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="for the dataset, 1.5 GB; default: the system's own")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.read:
        print(json.dumps(read(*args.read)))
        return
    report = run(args)
    columns = ["reader", "cpu_s", "added"]
    table = [[row[column] for column in columns] for row in report["results"]]
    print(tabulate(table, columns, tablefmt="github", floatfmt=("", ".1f", ".2f")))
    if args.output:
        measure.write_json(report, args.output)


if __name__ == "__main__":
    main()
