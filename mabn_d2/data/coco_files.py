"""The COCO files of registered datasets, and copies of them without what can't be used."""

import logging
import os
import tempfile

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathHandler, PathManager

from .coco_check import check_coco, clean_coco


class _Replaced(PathHandler):
    """Lets Detectron2 read a copy of `file` that lacks the entries with problems."""

    def __init__(self, file, problems):
        self.file, self.folder = file, tempfile.TemporaryDirectory(prefix="mabn_d2-")
        self.copy = os.path.join(self.folder.name, os.path.basename(file))
        clean_coco(file, problems, self.copy)

    def _get_supported_prefixes(self):
        return [self.file]

    def _get_local_path(self, path, force=False, **kwargs):
        return self.copy if path == self.file else path

    def _isfile(self, path, **kwargs):
        return os.path.isfile(path)

    def _exists(self, path, **kwargs):
        return os.path.exists(path)

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering, **kwargs)


def coco_files(names):
    """Yield (name, JSON file, image folder) of the COCO datasets among these that lie there already."""
    for name in dict.fromkeys(names):
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file and os.path.isfile(json_file):
            yield name, json_file, metadata.image_root


def leave_out_bad_entries(names):
    """Have Detectron2 read the datasets of these names without what `check_coco` finds wrong."""
    for name, json_file, image_root in coco_files(names):
        problems = check_coco(json_file, image_root, skip=True)
        if problems:
            PathManager.register_handler(_Replaced(json_file, problems))
            logging.getLogger(__name__).warning(f"{name}: {len(problems)} bad entries are left out")
