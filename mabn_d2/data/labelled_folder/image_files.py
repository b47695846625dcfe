"""Finds the image files that an annotation file names, however it spells them."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from .layouts import WHOLE, holds_masks, part_of

# Not all that Pillow opens: it takes PDF and MPEG files for images, too.
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jfif", ".jpe", ".mpo", ".ppm",
    ".pgm", ".pbm", ".pnm", ".dib", ".tga", ".apng", ".avif", ".jp2", ".j2k", ".jpx", ".jpf",
)  # fmt: skip
# Photos that Pillow can't open, or only the small preview in them.
OTHER_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2",
    ".psd",
)  # fmt: skip


class ImageFinder:
    """Finds the file of an image entry under some folders.

    A labelling tool may write the path of its own machine, Windows backslashes, a URL, or a name
    with `%20`. The longest trailing part of the path that names an existing file is used; a file in a
    nested folder is found by its name if no other file has that name. In folders that are named after
    another part of the dataset nothing is found by its name alone.

    Args:
        roots: the folders, the likeliest first.
        dataset: the folder of the whole dataset.
        part: the part that the images belong to.
    """

    def __init__(
        self, roots: Iterable[str | Path], dataset: str | Path = "", part: str = WHOLE
    ) -> None:
        self.roots = [os.fspath(root) for root in roots]
        self.dataset, self.part = dataset, part
        self.by_name: list[tuple[str, str]] = []  # (name, path) of those found by their name alone
        self.several: list[list[str]] = []  # the paths where a name alone could be each of them
        self._by_name: dict[str, list[str]] | None = None

    def find(self, file_name: str) -> str | None:
        """Return the path of the file, or None if there is none or more than one."""
        spellings = _spellings(file_name)
        for name in spellings:
            if path := self._existing(name):
                return path
        for name in spellings:
            parts = [p for p in re.split("/+", name) if p not in ("", ".", "..")]
            for start in range(len(parts)):
                if path := self._existing("/".join(parts[start:])):
                    return path
        for name in spellings:
            if path := self._in_nested_folder(name):
                return path
        return None

    def _existing(self, name: str) -> str | None:
        for root in self.roots:
            path = os.path.join(root, name)
            if os.path.isfile(path):
                return path
        return None

    def _in_nested_folder(self, name: str) -> str | None:
        if self._by_name is None:
            self._by_name = {}
            files = (file for root in self.roots for file in image_files(root))
            for path in sorted({os.path.realpath(file): file for file in files}.values()):
                if self._is_of_other_part(path):
                    continue
                self._by_name.setdefault(_key(os.path.basename(path)), []).append(path)
        same = self._by_name.get(_key(PurePosixPath(name).name), [])
        same = [p for p in same if not holds_masks(os.path.dirname(p), self.dataset)] or same
        if not same:
            return None
        # Of several files with this name, the one that shares most of the path.
        wanted = [_key(part) for part in PurePosixPath(name).parts[::-1]]
        lengths = [_common(wanted, [_key(p) for p in Path(path).parts[::-1]]) for path in same]
        best = max(lengths)
        if lengths.count(best) > 1:
            self.several.append(same)
            return None
        path = same[lengths.index(best)]
        if best == 1 < len(wanted):
            self.by_name.append((name, path))
        return path

    def _is_of_other_part(self, path: str) -> bool:
        if self.part == WHOLE:
            return False
        folders = Path(os.path.relpath(os.path.dirname(path), self.dataset)).parts
        named = next(filter(None, map(part_of, folders)), self.part)
        return named != self.part


def image_files(folder: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Iterator[str]:
    """Yield the paths of the files of these endings below a folder, behind links to folders too."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(path, file) for file in files if file.lower().endswith(suffixes))


def _spellings(file_name: str) -> list[str]:
    """Return the spellings of a name to try, as it stands first."""
    names = [file_name, file_name.replace("\\", "/")]
    url = urlsplit(names[1]) if "://" in names[1] or "?" in names[1] else None
    if url is not None:
        # Label Studio's local files are /data/local-files/?d=FOLDER/NAME.
        names += [*parse_qs(url.query).get("d", ()), url.path]
    names += [unquote(name) for name in names if "%" in name]
    # Zip files made on a Mac hold decomposed accents, its JSON files composed ones.
    names += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in names]
    return [name for name in dict.fromkeys(names) if name.strip("/") and "\0" not in name]


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _common(one: list[str], other: list[str]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other))
    )
