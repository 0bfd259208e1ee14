"""Pictures in folders: one's own, and CelebA. Pillow reads them, which the extra `pictures`
installs. All other images are read without it.
"""

import hashlib
import os
import time
import zlib
from pathlib import Path

import numpy as np

from vnca.program import VncaError, store
from vnca.program.clock import PRINT
from vnca.program.metrics import pace

KINDS = ".png", ".jpg", ".jpeg", ".webp"  # how the name of a picture ends, in any case
SETS = "train", "test"
TEST_SHARE = 10  # of a folder without train and test, about a tenth is for testing
PARTITION = "list_eval_partition"  # of CelebA: .txt as published, .csv as on Kaggle
PARTS = {"train": "0", "test": "2"}  # of CelebA; 1, for validation, is not used


def pillow():
    """Pillow's modules Image and ImageOps. Raises VncaError without it."""
    try:
        from PIL import Image, ImageOps
    except ImportError as fault:
        raise VncaError(
            "pictures need Pillow: python -m pip install -e '.[pictures]' installs it"
        ) from fault
    Image.MAX_IMAGE_PIXELS = None  # the user's own pictures may have any size
    return Image, ImageOps


def pictures_in(folder):
    """The paths of all pictures in a folder and its subfolders, sorted, but for hidden ones. Links
    are followed, but no folder is read twice. Raises OSError for one that cannot be read."""

    def fail(fault):
        raise fault

    found, seen = [], set()
    for place, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads in a circle
            inner.clear()
            continue
        seen.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in KINDS and not path.is_fifo()]
    return sorted(found)


def read_picture(path, size, colours, is_cut):
    """A picture of size×size pixels: uint8 [size, size, colours].

    Its orientation is that of its EXIF data, and what is transparent is white. is_cut: it is cut to
    a centred square first; otherwise it is squeezed into one. Resizing is bilinear: where it makes
    a picture smaller, Pillow's filter averages. Raises VncaError for a damaged picture, and OSError
    for storage that fails.
    """
    image_of, operations = pillow()
    try:
        with image_of.open(path) as file:
            picture = operations.exif_transpose(file)
            if picture.mode.startswith("I"):  # 16 bits a pixel, which `convert` would cut at 255
                picture = image_of.fromarray(np.uint8(np.rint(np.asarray(picture) / 257)))
            picture = picture.convert("RGBA")
    except Exception as fault:  # Pillow raises all kinds
        if getattr(fault, "errno", None):  # of the storage: it says what is wrong, and the path
            raise
        line = " ".join(str(fault).split())
        raise VncaError(f"{path}: {line}; remove it, or copy it again") from fault
    white = image_of.new("RGBA", picture.size, "white")
    picture = image_of.alpha_composite(white, picture).convert("RGB" if colours == 3 else "L")
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if is_cut:
        picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), image_of.Resampling.BILINEAR)
    return np.asarray(picture).reshape(size, size, colours)


def read_pictures(paths, likelihood, is_cut, log):
    """The pictures at some paths, uint8 [N, size, size, colours], with a line of progress every few
    seconds. log: a function that takes a line of text."""
    size, colours = likelihood.size, likelihood.colours
    pictures = np.empty((len(paths), size, size, colours), np.uint8)
    began = shown = time.monotonic()
    for done, path in enumerate(paths, 1):
        pictures[done - 1] = read_picture(path, size, colours, is_cut)
        now = time.monotonic()
        if now - shown > PRINT or (done == len(paths) and shown > began):
            shown = now
            speed = pace(now - began, done, len(paths) - done)
            log(f"{done:,}/{len(paths):,} pictures read  {speed}")
    return pictures


# ---- One's own -----------------------------------------------------------------------------------


def read_tree(folder, likelihood, log):
    """The pictures of a folder, as arrays: {"train": uint8 [N, size, size, colours], "test": …}. If
    they are in classes, there are "train_labels", "test_labels" and "names", too.

    If the folder has subfolders train and test, in capitals or not, these are the two sets.
    Otherwise, about a tenth of its pictures, chosen by a hash of the name, is for testing. Further
    subfolders are classes, and their names are sorted. A warning tells of pictures outside of train
    and test. Raises VncaError for a folder with only one of these two, for a set without pictures,
    for a picture outside of the classes, and for a damaged one. Raises OSError for storage that
    fails.
    """
    every = pictures_in(folder)
    subfolders = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    roots = {key: subfolders[key] for key in SETS if key in subfolders}
    if len(roots) == 1:
        [(key, root)] = roots.items()
        other = "test" if key == "train" else "train"
        raise VncaError(
            f"{folder} has {root.name}, but no folder {other}: give it both, or neither"
        )
    if roots:
        paths = {
            key: [path for path in every if path.is_relative_to(root)]
            for key, root in roots.items()
        }
        if unused := len(every) - sum(map(len, paths.values())):
            log(f"warning: pictures outside of train and test are not used: {unused:,} in {folder}")
    else:
        roots, paths = dict.fromkeys(SETS, folder), {key: [] for key in SETS}
        for path in every:
            name = os.fsencode(path.relative_to(folder).as_posix())
            paths["train" if zlib.crc32(name) % TEST_SHARE else "test"].append(path)
    for key in SETS:
        if not paths[key]:
            raise VncaError(
                f"{roots[key]} has no picture to {key} with. Of all ({', '.join(KINDS)}) there are "
                f"{len(every)} in {folder}: add some, or make the folders train and test"
            )
    arrays, classes = {}, {}
    for key in SETS:
        inner = [path.relative_to(roots[key]).parts[:-1] for path in paths[key]]
        classes[key] = [parts[0] if parts else None for parts in inner]
    names = sorted({name for key in SETS for name in classes[key]} - {None})
    for key in SETS:
        if names:
            if None in classes[key]:
                stray = paths[key][classes[key].index(None)]
                raise VncaError(f"{stray} is in no class, and others are: put all into subfolders")
            labels = [names.index(name) for name in classes[key]]
            arrays[f"{key}_labels"] = np.array(labels)
        arrays[key] = read_pictures(paths[key], likelihood, True, log)
    if names:
        arrays["names"] = np.array(names)
    return arrays


# ---- CelebA --------------------------------------------------------------------------------------


def celeba_names(folder):
    """The file in a folder that parts CelebA, and the names of the pictures of each part: {"train":
    a list, "test": a list}. Raises VncaError if there is no such file, or one of its lines is
    wrong, or a part is empty."""
    lists = [path for path in sorted(folder.rglob(f"{PARTITION}.*")) if path.is_file()]
    if not lists:
        raise VncaError(
            f"{folder} has no {PARTITION}.txt or {PARTITION}.csv: give --config.data.dir the "
            "folder that has it and img_align_celeba"
        )
    parts = {}  # of each picture, by its name
    text = lists[0].read_text(encoding="utf-8-sig", errors="replace").replace(",", " ")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or (number == 1 and words == ["image_id", "partition"]):
            continue
        if len(words) != 2 or words[1] not in ("0", "1", "2") or words[0] in parts:
            raise VncaError(
                f"{lists[0]}, line {number}: {line!r}: it must name one more picture, and "
                "its part: 0, 1 or 2"
            )
        parts[words[0]] = words[1]
    names = {key: [name for name in parts if parts[name] == part] for key, part in PARTS.items()}
    for key, some in names.items():
        if not some:
            raise VncaError(f"{lists[0]} names no picture of part {PARTS[key]}, to {key} with")
    return lists[0], names


def read_celeba(folder, likelihood, log, cache):
    """CelebA in a folder, as published or as Kaggle has it: {"train": uint8 [N, size, size,
    colours], "test": …}. As in the paper's code, whole pictures are squeezed into squares.

    cache: the folder to keep what was read in. Raises VncaError for a file that is missing or
    damaged.
    """
    partition, names = celeba_names(folder)
    images = {path.name: path for path in pictures_in(folder)}
    missing = [name for key in SETS for name in names[key] if name not in images]
    if missing:
        raise VncaError(
            f"{folder} lacks {len(missing):,} of the pictures in {partition.name}, the first is "
            f"{missing[0]}: unpack img_align_celeba there"
        )
    paths = {key: [images[name] for name in names[key]] for key in SETS}
    digest = hashlib.sha256(f"{likelihood.size} {likelihood.colours}".encode())
    for some in paths.values():
        for path in some:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    kept = cache / f"celeba_{digest.hexdigest()[:16]}.npz"
    if kept.exists():
        try:
            with np.load(kept) as file:
                return {key: file[key] for key in SETS}
        except Exception as fault:  # zipfile, zlib and NumPy raise all kinds
            log(f"warning: {kept} is damaged ({fault}): the pictures are read again")
    arrays = {key: read_pictures(paths[key], likelihood, False, log) for key in SETS}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        store.clean(cache)
        store.write(kept, lambda file: np.savez(file, **arrays))
    except OSError as fault:
        log(
            f"warning: the next start reads the pictures again, since they cannot be kept ({fault})"
        )
    return arrays
