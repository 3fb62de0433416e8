"""Listing and clearing the stores of decoded images: `python -m torchlin.data.cache`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from torchlin.data.store import CACHE_VARIABLE, MANIFEST, cache_folder, is_unfinished, locked, read_manifest, remove
from torchlin.registry import nearest

_DAY = 86_400


class StoreInfo(NamedTuple):
    """What a store says about itself, and what it takes.

    Attributes:
        folder: where it is; the folder's name is the store's name.
        source: the image folder it was made of, or "?" for a store that is damaged or unfinished.
        images: how many.
        size: in bytes, on disk.
        last_used: seconds since 1970.
    """

    folder: Path
    source: str
    images: int
    size: int
    last_used: float


def list_stores(cache: Path) -> list[StoreInfo]:
    """The stores in a cache folder, the one used last first; folders that are no stores are passed over."""
    found = [path for path in cache.iterdir() if path.is_dir()] if cache.is_dir() else []
    infos = []
    for folder in found:
        if (folder / MANIFEST).is_file() or is_unfinished(folder.name):
            # A folder may go away under our eyes.
            try:
                infos.append(_info(folder))
            except FileNotFoundError:
                continue
    return sorted(infos, key=lambda info: -info.last_used)


def clear_stores(infos: Sequence[StoreInfo]) -> tuple[list[StoreInfo], list[StoreInfo]]:
    """Remove stores; return those removed and those left because a process is building or opening them.

    A process that has a store open keeps its pages and does not notice.
    """
    removed: list[StoreInfo] = []
    busy: list[StoreInfo] = []
    for info in infos:
        store = info.folder
        while is_unfinished(store.name):
            store = store.with_suffix("")
        try:
            with locked(store, wait=False):
                if info.folder.is_dir():
                    remove(info.folder)
            removed.append(info)
        except Timeout:
            busy.append(info)
    return removed, busy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 for a store that does not exist or cannot be removed."""
    options = _parser().parse_args(arguments)
    cache = cache_folder(options.cache_dir)
    infos = list_stores(cache)
    if options.command != "clear":
        _show(cache, infos)
        return 0
    by_name = {info.folder.name: info for info in infos}
    for name in options.names:
        if name not in by_name:
            print(f"{cache}/: no store {name!r}{nearest(name, by_name)}", file=sys.stderr)
            return 2
    chosen = [by_name[name] for name in options.names] if options.names else infos
    if options.older_than is not None:
        chosen = [info for info in chosen if info.last_used < time.time() - options.older_than * _DAY]
    try:
        removed, busy = clear_stores(chosen)
    except OSError as error:
        print(f"{cache}/: cannot be cleared ({error})", file=sys.stderr)
        return 2
    print(f"removed {len(removed)} of {len(infos)} stores, {_megabytes(sum(info.size for info in removed))}")
    for info in busy:
        print(f"{info.folder}/: left, a process is working on it", file=sys.stderr)
    return 2 if busy else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m torchlin.data.cache", description=__doc__)
    parser.add_argument("--cache-dir", help=f"the cache folder; else {CACHE_VARIABLE}, else the user's cache folder")
    commands = parser.add_subparsers(dest="command", metavar="list | clear")
    commands.add_parser("list", help="list the stores (also without any command)")
    clear = commands.add_parser("clear", help="remove stores; they are built again when they are needed")
    clear.add_argument("names", nargs="*", metavar="NAME", help="which; all if none is named")
    clear.add_argument("--older-than", type=float, metavar="DAYS", help="only those not used for so many days")
    return parser


def _info(folder: Path) -> StoreInfo:
    manifest = read_manifest(folder) or {}
    size = sum(path.stat().st_size for path in folder.iterdir())
    images = manifest.get("images")
    return StoreInfo(
        folder,
        str(manifest.get("source", "?")),
        images if isinstance(images, int) else 0,
        size,
        folder.stat().st_mtime,
    )


def _show(cache: Path, infos: Sequence[StoreInfo]) -> None:
    print(f"{cache}/: {len(infos)} stores, {_megabytes(sum(info.size for info in infos))}")
    width = max((len(info.folder.name) for info in infos), default=0)
    for info in infos:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.last_used))
        images = f"{info.images:>9,} images"
        # Quoted, for a folder's name may hold anything, a line break too.
        print(f"  {info.folder.name:<{width}} {images} {_megabytes(info.size):>12}  used {used}  {info.source!r}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
