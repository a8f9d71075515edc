"""The split syntax of TFDS, without TFDS: ``train``, ``train[:90%]``, ``test[-500:]``, ``train+test``, ``all``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Slice = tuple[str, int, int]  # a stored split, its first image and the one after its last

_PART = re.compile(r"([\w-]+)(?:\[([\w%:.-]+)\])?")
_EDGE = re.compile(r"(?:(-?[\d_.]+)(%|shard)?)?")


def parsed(split: str, sizes: Mapping[str, int]) -> list[Slice]:
    """The slices that a split stands for, of stored splits with these numbers of images; ValueError for what is none.

    Percentages round to the nearest image, and edges count from the end where they are negative, as in TFDS.
    """
    slices: list[Slice] = []
    for part in re.split(r"\s*\+\s*", split):
        if (match := _PART.fullmatch(part)) is None:
            raise ValueError(f"{part!r} is not of the form NAME or NAME[FROM:TO].")
        name, inside = match.groups()
        if name == "all":
            if inside:
                raise ValueError("all cannot be sliced.")
            slices += [(stored, 0, size) for stored, size in sizes.items()]
        elif name not in sizes:
            raise ValueError(f"There is no split {name!r}.")
        else:
            slices.append((name, *_edges(inside, part, sizes[name])))
    return slices


def _edges(inside: str | None, part: str, size: int) -> tuple[int, int]:
    """The first image and the one after the last of ``NAME[inside]``, a split of ``size`` images."""
    if inside is None:
        return 0, size
    matches = [_EDGE.fullmatch(edge) for edge in inside.split(":")]
    if len(matches) != 2 or not all(matches) or inside == ":":
        raise ValueError(f"{part!r} is not of the form NAME[FROM:TO], with images or percentages such as 90%.")
    edges, units = zip(*(match.groups() for match in matches if match is not None), strict=True)
    unit = units[0] or units[1]
    if unit == "shard":
        raise ValueError(f"{part!r} names shards, which only data sets of TFDS have.")
    numbers = [None if edge is None else float(edge) if unit else int(edge) for edge in edges]
    if unit and any(abs(number or 0) > 100 for number in numbers):
        raise ValueError(f"{part!r} has a percentage outside -100 to 100.")
    start, stop = (
        default if number is None else round(number * size / 100) if unit else int(number)
        for number, default in zip(numbers, (0, size), strict=True)
    )
    if abs(start) > size or abs(stop) > size:
        raise ValueError(f"{part!r} reaches past the {size:,} images of the split.")
    return start + size * (start < 0), stop + size * (stop < 0)


def ranges(
    name: str,
    split: str,
    sizes: Mapping[str, int],
    parse: Callable[[str, Mapping[str, int]], list[Slice]] = parsed,
) -> list[Slice]:
    """The slices of a data set's split, each of at least one image; ValueError that names the splits there are."""
    has = f"{name} has {', '.join(f'{key} ({size:,} images)' for key, size in sizes.items())}"
    try:
        found = parse(split, sizes)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"split must be one of the data set's, in the TFDS syntax (train, train[:90%], train+test), got {split!r}: "
            f"{str(error).splitlines()[-1]} {has}."
        ) from None
    if any(start >= stop for _, start, stop in found):
        raise ValueError(f"split must hold at least one image, got {split!r}, which is empty: {has}.")
    return found
