"""Checks of COCO segmentations: polygons and run-length encodings (RLE)."""

import math
from array import array
from typing import Any, NamedTuple

import numpy as np

OUTSIDE = 1.0  # how far a polygon may reach beyond the image, in sizes of the image
LARGEST = 1e9  # of a coordinate
MIN_POLYGON = 6  # numbers, which are three points
CHUNK = 5_000  # annotations whose numbers fit into the cache
MAX_DIGITS = 7  # of 5 bits, of a run that 32 bits hold
WRONG_COUNTS = "an RLE whose counts do not add up to the image"

NO_MASK, POLYGONS, RLE = 0, 1, 2


class MaskScan(NamedTuple):
    """What `scan_masks` finds.

    Attributes:
        kinds: (N,) uint8, one of NO_MASK, POLYGONS and RLE.
        suspects: positions of the annotations that `mask_problem` has to look at.
        bounds: (N, 4) x1, y1, x2, y2 of all parts of a mask, in pixels; x1 > x2 where it is not known.
        empty: (N,) bool, whether a mask has no area.
    """

    kinds: np.ndarray
    suspects: set[int]
    bounds: np.ndarray
    empty: np.ndarray


def scan_masks(annotations: list[dict], heights: np.ndarray, widths: np.ndarray) -> MaskScan:
    """Look at the segmentations of all annotations at once, which is fast.

    Args:
        annotations: COCO annotations.
        heights: (N,), of the image of each annotation.
        widths: (N,), likewise.
    """
    count = len(annotations)
    unknown = np.tile([np.inf, np.inf, -np.inf, -np.inf], (count, 1))
    scan = MaskScan(np.zeros(count, np.uint8), set(), unknown, np.zeros(count, bool))
    for first in range(0, count, CHUNK):
        _scan_part(annotations[first : first + CHUNK], first, heights, widths, scan)
    return scan


def _scan_part(
    annotations: list[dict], first: int, heights: np.ndarray, widths: np.ndarray, scan: MaskScan
) -> None:
    kinds, suspects = scan.kinds, scan.suspects
    numbers, lengths, owners = array("d"), [], []
    encoded, encoded_owners = [], []
    for position, annotation in enumerate(annotations, first):
        masks = annotation.get("segmentation")
        if not masks:
            continue  # an empty list is the same as no segmentation
        if isinstance(masks, list):
            kinds[position] = POLYGONS
            try:
                for polygon in masks:
                    length = len(polygon)
                    if length < MIN_POLYGON or length % 2:
                        raise ValueError
                    numbers.fromlist(polygon)  # refuses what is no number
                    lengths.append(length)
                    owners.append(position)
            except (TypeError, ValueError, OverflowError):
                suspects.add(position)
        else:
            kinds[position] = RLE
            if _rle_form_problem(masks, [heights[position], widths[position]]):
                suspects.add(position)
            elif isinstance(masks["counts"], str):
                encoded.append(masks)
                encoded_owners.append(position)
            else:
                scan.empty[position] = not any(masks["counts"][1::2])
    if encoded:
        owners_of_encoded = np.array(encoded_owners)
        pixels = heights[owners_of_encoded] * widths[owners_of_encoded]
        wrong = decoded_lengths([masks["counts"] for masks in encoded]) != pixels
        suspects.update(owners_of_encoded[wrong].tolist())
        _measure_rle([encoded[i] for i in np.flatnonzero(~wrong)], owners_of_encoded[~wrong], scan)
    if lengths:
        _measure_polygons(numbers, lengths, np.array(owners), heights, widths, scan)


def _measure_rle(encoded: list[dict], owners: np.ndarray, scan: MaskScan) -> None:
    import pycocotools.mask as mask_util

    if encoded:
        x, y, width, height = mask_util.toBbox(encoded).T
        scan.bounds[owners] = np.stack((x, y, x + width, y + height), 1)
        scan.empty[owners] = width * height == 0


def _measure_polygons(
    numbers: "array[float]",
    lengths: list[int],
    owners: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scan: MaskScan,
) -> None:
    """Enter bounds and area; those with points far outside of their image, or NaN, are suspects."""
    points = np.frombuffer(numbers).reshape(-1, 2)
    starts = np.cumsum([0, *lengths[:-1]]) // 2
    bad = np.zeros(len(owners), bool)
    from_first = []
    for column, size in ((0, widths[owners]), (1, heights[owners])):
        values = np.ascontiguousarray(points[:, column])
        low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        bad |= ~((low >= -OUTSIDE * size) & (high <= (1 + OUTSIDE) * size))  # true of NaN
        with np.errstate(invalid="ignore"):  # NaN
            np.minimum.at(scan.bounds[:, column], owners, low)
            np.maximum.at(scan.bounds[:, column + 2], owners, high)
        from_first.append(values - np.repeat(values[starts], np.array(lengths) // 2))
    scan.suspects.update(owners[bad].tolist())
    # The triangles between the first point and each side: all are 0 if the points lie on one line.
    (x, y), triangles = from_first, np.zeros(len(points))
    triangles[:-1] = np.abs(x[:-1] * y[1:] - x[1:] * y[:-1])
    has_area = np.add.reduceat(triangles, starts) > 0
    scan.empty[owners] = True
    scan.empty[owners[has_area]] = False


def mask_problem(masks: Any, size: list[int]) -> str | None:
    """Return what is wrong with a segmentation, or None.

    Args:
        masks: polygons or an RLE, not empty.
        size: height and width of the image.
    """
    if isinstance(masks, dict):
        return rle_problem(masks, size)
    if not isinstance(masks, list):
        return f"a segmentation {masks!r:.40}, which is neither polygons nor an RLE"
    for polygon in masks:
        if not isinstance(polygon, list) or len(polygon) < MIN_POLYGON or len(polygon) % 2:
            return "a polygon that is not three points or more"
        if not are_numbers(polygon):
            return "a polygon with coordinates that are no finite numbers"
        # pycocotools reserves memory for the way from point to point.
        for values, length in ((polygon[1::2], size[0]), (polygon[0::2], size[1])):
            if min(values) < -OUTSIDE * length or max(values) > (1 + OUTSIDE) * length:
                return "a polygon far outside of the image"
    return None


def cocos_form(masks: Any) -> Any:
    """Return a segmentation in the form that COCO defines, or `masks` itself.

    Corrects one polygon that is not in a list of its own (VIA), points that are pairs, also without a
    list of their own, and an RLE in a list.
    """
    if not isinstance(masks, list) or not masks:
        return masks
    if type(masks[0]) in (int, float):
        return [masks]
    if len(masks) == 1 and isinstance(masks[0], dict):
        return masks[0]
    points = masks if _is_list_of_pairs(masks) and all(map(are_numbers, masks)) else []
    if 2 * len(points) >= MIN_POLYGON:
        masks = [points]
    if all(_is_list_of_pairs(polygon) for polygon in masks):
        return [[value for point in polygon for value in point] for polygon in masks]
    return masks


def _is_list_of_pairs(polygon: Any) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) > 0
        and all(isinstance(point, list) and len(point) == 2 for point in polygon)
    )


def usable_polygons(masks: Any) -> list | None:
    """Return the polygons of three points or more, as Detectron2 keeps them; None for an RLE."""
    if not isinstance(masks, list) or not all(isinstance(part, list) for part in masks):
        return None
    return [part for part in masks if len(part) >= MIN_POLYGON and len(part) % 2 == 0]


def are_numbers(values: list, limit: float = LARGEST) -> bool:
    """Return whether all values are numbers between -limit and limit, which NaN is not."""
    return all(type(v) in (int, float) and -limit <= v <= limit for v in values)


def rle_problem(masks: Any, size: list[int]) -> str | None:
    """Return what is wrong with a run-length encoding, or None."""
    problem = _rle_form_problem(masks, size)
    if problem is not None or isinstance(masks["counts"], list):
        return problem
    wrong = decoded_lengths([masks["counts"]])[0] != math.prod(size)
    return WRONG_COUNTS if wrong else None


def _rle_form_problem(masks: Any, size: list[int]) -> str | None:
    """As `rle_problem`, but compressed counts are not decoded."""
    if not isinstance(masks, dict):
        return f"a segmentation {masks!r:.40}, which is neither polygons nor an RLE"
    counts, found = masks.get("counts"), masks.get("size")
    if not isinstance(found, list) or found != list(size):
        return f"an RLE of size {found!r:.80}, not the image's {[int(n) for n in size]}"
    if isinstance(counts, list):
        if not all(type(n) is int and n >= 0 for n in counts) or sum(counts) != math.prod(size):
            return WRONG_COUNTS
    elif not isinstance(counts, str):
        return WRONG_COUNTS
    return None


def decoded_lengths(encoded: list[str]) -> np.ndarray:
    """Return how many pixels each of COCO's compressed counts covers, -1 where they are damaged.

    They are decoded here, because pycocotools writes out of bounds if counts are too long. A run
    is stored in digits of 5 bits, the lowest first; from the fourth run on it is the difference to
    the run before the last.

    Returns:
        (N,) int64.
    """
    text = "".join(encoded).encode("ascii", "replace")  # "?" is no digit
    sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    owner = np.repeat(np.arange(len(encoded)), sizes)  # of each digit
    bad = np.zeros(len(encoded), bool)
    last = np.cumsum(sizes) - 1
    more = digits & 32 != 0
    bad[owner[(digits < 0) | (digits >= 64)]] = True
    bad[sizes > 0] |= more[last[sizes > 0]]
    more[last[sizes > 0]] = False  # a damaged one does not reach into the next
    ends = np.flatnonzero(~more)
    starts = np.concatenate(([0], ends[:-1] + 1))[: len(ends)]
    lengths = ends - starts + 1
    bad[owner[starts[lengths > MAX_DIGITS]]] = True
    shifts = np.minimum(5 * (np.arange(len(digits)) - np.repeat(starts, lengths)), 60)
    values = np.add.reduceat((digits & 31) << shifts, starts) if len(starts) else digits
    values = values - np.where(digits[ends] & 16, 1 << np.minimum(5 * lengths, 60), 0)

    # The runs of a mask form two chains of differences: the odd ones and, after the first, the even.
    owner = owner[starts]
    odd = (np.arange(len(owner)) - _first_of_group(owner)) % 2 == 1
    first = np.diff(owner, prepend=-1) != 0
    pixels = np.bincount(owner[first], weights=values[first], minlength=len(encoded))
    for chain in (odd, ~odd & ~first):
        owners, totals = owner[chain], np.cumsum(values[chain])
        group = _first_of_group(owners)
        runs = totals - (totals - values[chain])[group]
        bad[owners[runs < 0]] = True
        pixels += np.bincount(owners, weights=runs, minlength=len(encoded))
    bad[owner[first & (values < 0)]] = True
    return np.where(bad, -1, pixels.astype(np.int64))


def _first_of_group(owners: np.ndarray) -> np.ndarray:
    """Return for each entry the position of the first one with the same owner; (N,) sorted."""
    changed = np.flatnonzero(np.diff(owners, prepend=-1))
    return np.repeat(changed, np.diff(changed, append=len(owners)))
