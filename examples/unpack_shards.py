"""WebDataset shards as the class folders that vitrm-train reads, each picture at the size that training needs.

    pip install 'vitrm[examples]'
    python examples/unpack_shards.py 'shards/train-{000..009}.tar' photos/train --classes classes.txt --side 256 --workers 4
    python examples/unpack_shards.py 'pipe:curl -sL https://HOST/train-{000..009}.tar' photos/train

Shards are streamed, so those behind a `pipe:` never lie on this disk.  A sample is a picture and `cls`, a class's number or name;
`--classes` is a file with a name on each line, for numbers.  Larger pictures are resized to a shorter side of `--side` pixels, which is
what makes a set fit that does not fit as it is.  Each worker unpacks whole shards; one that was unpacked is not read again, one
that was interrupted is.  Pictures that cannot be read are kept as they are: `vitrm-train` names them all, and goes on without them
with --skip-damaged.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image, ImageOps
from webdataset.shardlists import expand_urls

from vitrm.data.decoding import readable_suffixes
from vitrm.errors import UserError, first_line

DONE = ".unpacked"  # a hidden folder, which training passes over: a file in it for each shard that is unpacked
CLASS_KEYS = ("cls", "cls.txt", "txt")


def main() -> int:
    """Unpacks the shards; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tar files or URLs; {000..009} stands for all between")
    parser.add_argument("out", type=Path, help="the folder that is to hold the class folders")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, a line each, for numbers")
    parser.add_argument(
        "--side", type=int, default=256, help="shorter side that larger pictures are resized to; 0: kept"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args()
    names = args.classes.read_text(encoding="utf-8").splitlines() if args.classes else None
    shards = [url for named in args.shards for url in expand_urls(named)]
    left = [shard for shard in shards if not (args.out / DONE / _short(shard)).exists()]
    (args.out / DONE).mkdir(parents=True, exist_ok=True)
    pictures = passed_over = 0
    with ProcessPoolExecutor(max(1, min(args.workers, len(left)))) as pool:
        unpacking = [pool.submit(unpack, shard, args.out, names, args.side) for shard in left]
        try:
            for number, (shard, found) in enumerate(zip(left, unpacking, strict=True), 1):
                written, others = found.result()
                pictures, passed_over = pictures + written, passed_over + others
                print(f"{number} of {len(left)}: {shard}, {written} pictures", flush=True)
        except UserError as error:
            pool.shutdown(cancel_futures=True)
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(
        f"{pictures} pictures of {len(left)} shards in {args.out}; {len(shards) - len(left)} shards were there already"
    )
    if passed_over:
        print(
            f"{passed_over} samples passed over: they have no picture that is read here, or no class", file=sys.stderr
        )
    return 2 if passed_over else 0


def unpack(shard: str, out: Path, names: Sequence[str] | None, side: int) -> tuple[int, int]:
    """Writes a shard's pictures below `out`, each into the folder of its class; returns how many, and how many samples were passed over.

    Raises `UserError` for a shard that cannot be read to its end, and for a class that has no name.
    """
    written = passed_over = 0
    try:
        for sample in webdataset.WebDataset([shard], shardshuffle=False, handler=webdataset.reraise_exception):
            key = next((key for key in sample if f".{key.lower()}" in readable_suffixes()), None)
            folder = _class_folder(sample, names)
            if key is None or not folder:
                passed_over += 1
                continue
            content, suffix = smaller(sample[key], side, f".{key.lower()}")
            name = f"{_short(shard)}-{sample['__key__'].replace('/', '_')}{suffix}"
            (out / folder).mkdir(exist_ok=True)
            (out / folder / f".{name}").write_bytes(content)
            (out / folder / f".{name}").replace(out / folder / name)
            written += 1
    except UserError:
        raise
    except Exception as error:  # of a tar file, a process, a connection
        raise UserError(f"{shard} cannot be read to its end ({first_line(error)}): check it, and start again") from None
    (out / DONE / _short(shard)).touch()
    return written, passed_over


def smaller(content: bytes, side: int, suffix: str) -> tuple[bytes, str]:
    """A picture's file with a shorter side of `side` pixels, and its suffix; as it is where it is no larger, or cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if not side or min(image.size) <= side or image.mode[0] in "IF":  # 16 bits and more
                return content, suffix
            image.draft(None, tuple(2 * side * length // min(image.size) for length in image.size))
            picture = ImageOps.exif_transpose(image)
        transparent = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        picture = picture.convert("RGBA" if transparent else "RGB")
        share = side / min(picture.size)
        size = (max(side, round(picture.width * share)), max(side, round(picture.height * share)))
        written = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(written, "PNG" if transparent else "JPEG", quality=95)
    except Exception:  # decoders raise anything; training names the file
        return content, suffix
    return written.getvalue(), ".png" if transparent else ".jpg"


def _class_folder(sample: Mapping[str, Any], names: Sequence[str] | None) -> str:
    """The folder of a sample's class: its name, or its number with zeros ahead, so that folders are in the order of numbers."""
    label = next((sample[key].decode().strip() for key in CLASS_KEYS if key in sample), "")
    if label.isdecimal() and names is not None:
        if int(label) >= len(names):
            raise UserError(
                f"a sample is of class {label}, --classes has {len(names)} names: it is that of another set"
            )
        label = names[int(label)]
    elif label.isdecimal():
        label = f"{int(label):05}"
    return label.replace("/", "_").lstrip(".")  # hidden folders are none of a class, and others are not this set's


def _short(shard: str) -> str:
    """A name for a shard's files: its own, and a few digits that tell it from one of that name elsewhere."""
    return f"{Path(shard.split()[-1]).stem}-{hashlib.sha256(shard.encode()).hexdigest()[:6]}"


if __name__ == "__main__":
    sys.exit(main())
