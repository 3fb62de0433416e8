"""`torchlin predict`."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torchlin.folder import find_run, newest_run
from torchlin.predict import predict_images
from torchlin.storage import load_head

# Images per batch through a backbone, at most.
_PROBED = 128


class _Parser(argparse.ArgumentParser):
    """One whose errors `main` prints in one line."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def predict(arguments: Sequence[str]) -> None:
    """`torchlin predict`: label images, and print or write a CSV."""
    parser = _Parser(
        prog="torchlin predict",
        allow_abbrev=False,
        description="Label images with a trained head. Prints (or writes) a CSV: file,label,score,probability, one row "
        "per image in the order given; probability is empty for losses that define none (hinge, perceptron).",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, or folders of images")
    parser.add_argument("--run", help="run folder (default: the newest under runs/)")
    parser.add_argument("--output", metavar="FILE", help="CSV to write (default: standard output)")
    parser.add_argument("--scores", action="store_true", help="add one column per class with its score")
    parser.add_argument("--batch_size", type=int, default=1024, help="images per batch (default: %(default)s)")
    parser.add_argument(
        "--max_pixels",
        type=int,
        metavar="N",
        help="refuse images of more pixels, before they fill the memory (default: Pillow's limit, 89 million)",
    )
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="images that cannot be read or have another size than the training images: stop, list them and write "
        "nothing, or skip them and name them on standard error (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    folder = newest_run() if options.run is None else find_run(options.run)
    head = load_head(folder)
    scores_of, batch_size = None, options.batch_size
    if "backbone" in head.info:  # a probe, whose network takes more memory than a head, and longer to load
        from torchlin.probe import load_probe

        model = load_probe(folder)
        scores_of, batch_size = (lambda images: model(model.preprocess(images))), min(batch_size, _PROBED)
    rows = predict_images(
        head,
        options.images,
        scores_of=scores_of,
        batch_size=batch_size,
        all_scores=options.scores,
        max_pixels=options.max_pixels,
        on_error=options.on_error,
    )
    header = ["file", "label", "score", "probability", *(head.info["class_names"] if options.scores else [])]
    with _output(options.output) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    if options.output:
        print(f"{len(rows)} images labelled by {folder}: {options.output}", file=sys.stderr)


@contextmanager
def _output(path: str | None) -> Iterator[Any]:
    if path is None:
        yield sys.stdout
        return
    final = Path(path)
    beside = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        with beside.open("w", newline="", encoding="utf-8") as stream:
            yield stream
        beside.replace(final)
    except OSError as error:
        raise ValueError(f"--output {final}: cannot be written ({error.strerror})") from None
    finally:
        beside.unlink(missing_ok=True)
