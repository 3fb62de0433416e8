"""What it costs to get images into a linear classifier: torchlin beside what people write otherwise, in one run.

    python scripts/bench_input.py PART [PART ...] [--root FOLDER] [--threads 2] [--rounds 3]

FOLDER holds CIFAR-10 as images: train/ and test/ with one folder per class. The parts:

epochs   One softmax classifier, SGD with lr 0.001 and momentum 0.9, on all training images, in three ways. "stock":
         torchvision's ImageFolder, ToTensor, Normalize, a DataLoader with as many workers as threads, and a
         LightningModule of one's own. "bare": all images as one standardised float32 tensor and a plain loop, without
         Lightning. "torchlin": LinearClassifier on ImageFolderDataModule, with the progress bar and the run folder of
         `torchlin fit`; stock has Lightning's default progress bar and checkpoints. All start from zero weights; bare
         and torchlin standardise every pixel, stock every channel, which alone makes some tenths of a percentage point
         in the first epochs. The first epoch
         counts from the construction of the data set: decoding, building torchlin's store in an empty cache folder
         (that of test/ too, which torchlin reads before it trains) and starting workers are in it. "second run" is
         torchlin in a new process that finds the store. Memory is the peak of RssAnon, pages of the process that no
         file backs, its imports included; stock's workers are left out.
photos   Decoding JPEG photographs of about 200×150 to 64×64, as ImageFolderDataModule does, and by Pillow under
         torchvision's Resize and CenterCrop with one thread per core.
predict  `torchlin predict` on the images of test/, and stock loops that write the same CSV: as whole processes, and
         beyond what the process takes for a single image.
memory   Training on a store of many gigabytes that is mapped into memory: RssAnon above what it was after the imports.
gpu      CIFAR-10 kept on the GPU, and the bare loop there. Bandwidth counts bytes read and written by a large copy.

Each way to train runs in a process of its own, one after the other; the ways take turns, --rounds times, and the tables
show medians. All files are read once before, so that every way finds them in the page cache of the system. On Linux
everything is kept to --threads cores. Temporary folders are made where TMPDIR says; memory needs room for its store.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Lightning, torchvision and torchlin are imported where they are used: a process pays for what its way needs, no more.

LR, MOMENTUM = 1e-3, 0.9
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PHOTO_SIZES = ((200, 150), (150, 200), (180, 135), (240, 160), (224, 168), (160, 120))


# Results and tables.


@dataclass
class Training:
    """What one process that trained has measured.

    Attributes:
        marks: seconds from the construction of the data set to the start of each epoch, and to the end of the last.
        accuracy: training accuracy, accumulated over each epoch.
        shape: samples and features.
        peak: highest RssAnon in bytes; NaN where the system does not tell.
    """

    marks: list[float]
    accuracy: list[float]
    shape: tuple[int, int]
    peak: float = math.nan

    @property
    def cold(self) -> float:
        return self.marks[1]

    @property
    def first(self) -> float:
        return self.marks[1] - self.marks[0]

    @property
    def warm(self) -> float:
        """Median of the epochs after the first."""
        return statistics.median(b - a for a, b in zip(self.marks[1:], self.marks[2:], strict=False))


@dataclass
class Check:
    """A figure and the bound that the project promises for it."""

    what: str
    value: float
    bound: float
    at_most: bool = True

    def cells(self) -> list[str]:
        met = self.value <= self.bound if self.at_most else self.value >= self.bound
        sign = "≤" if self.at_most else "≥"
        verdict = "–" if math.isnan(self.value) else ("yes" if met else "no")
        return [self.what, number(self.value, 2), f"{sign} {self.bound:g}", verdict]


def number(value: float, digits: int = 0) -> str:
    return "n/a" if math.isnan(value) else f"{value:,.{digits}f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
    print(flush=True)


def print_checks(checks: Sequence[Check]) -> None:
    print_table(["", "measured", "promised", "kept"], [check.cells() for check in checks])


def median(runs: Sequence[Any], name: str) -> float:
    return statistics.median(getattr(run, name) for run in runs)


# The machine.


def keep_to_cores(threads: int) -> int:
    """Keep this process and its children to so many cores where the system can; return how many cores they have."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return len(cores)


def describe_machine(cores: int, options: argparse.Namespace) -> str:
    names = [line.partition(":")[2].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    packages = ("torch", "torchvision", "lightning", "pillow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = f"; load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{(names or [platform.machine()])[0]}, {cores} of {os.cpu_count()} cores, {options.threads} threads; "
        f"{platform.system()}, Python {platform.python_version()}, {versions}; rounds: {options.rounds}{load}"
    )


def read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def anonymous_bytes() -> float:
    """RssAnon of this process: what it holds in memory that is no page of a file."""
    found = (line for line in read_lines("/proc/self/status") if line.startswith("RssAnon"))
    return next((int(line.split()[1]) * 1024.0 for line in found), math.nan)


class PeakMemory:
    """Looks at RssAnon every 10 ms while it is entered; `peak` is the highest value seen."""

    def __enter__(self) -> PeakMemory:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(child: Callable[..., Any], **arguments: Any) -> Any:
    """Call one of CHILDREN in a fresh process, and return what it returns, which is JSON."""
    with tempfile.TemporaryDirectory() as work:
        result = Path(work, "result.json")
        call = {"name": child.__name__, "arguments": arguments, "result": str(result)}
        run_quietly([str(Path(__file__).resolve()), "--child", json.dumps(call)])
        return json.loads(result.read_text())


def run_quietly(arguments: Sequence[str]) -> None:
    """Run Python as on a terminal that nobody looks at: the progress bars draw themselves."""
    terminal = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, *arguments], env=terminal, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr.decode(errors='replace')[-4000:]}")


def child_main(call: dict[str, Any]) -> None:
    result = CHILDREN[call["name"]](**call["arguments"])
    Path(call["result"]).write_text(json.dumps(result))


def read_all(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


# Three ways to train. Each is run by `measure`.


def train_stock(root: str, batch_size: int, epochs: int) -> dict[str, Any]:
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    class Softmax(LightningModule):
        def __init__(self, features: int, classes: int) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Flatten(), zero_linear(features, classes))
            self.accuracy = MulticlassAccuracy(classes, average="micro")

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            scores = self.model(x)
            loss = F.cross_entropy(scores, y)
            self.accuracy(scores, y)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)

    with PeakMemory() as memory:
        clock = Clock("cpu")
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD)])
        dataset = ImageFolder(str(Path(root, "train")), transform)
        workers = torch.get_num_threads()
        loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, persistent_workers=True)
        shape = len(dataset), dataset[0][0].numel()
        fit(Softmax(shape[1], len(dataset.classes)), epochs, clock, train_dataloaders=loader)
    return asdict(Training(clock.marks, clock.accuracy, shape, memory.peak))


def train_bare(root: str, batch_size: int, epochs: int, device: str = "cpu") -> dict[str, Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    with PeakMemory() as memory:
        clock = Clock(device)
        folder = ImageFolder(str(Path(root, "train")), pil_to_tensor)
        pixels = torch.stack([image for image, _ in folder]).flatten(1)
        y = torch.tensor(folder.targets).to(device)
        x = pixels.to(device, torch.float32)
        x.sub_(x.mean(0)).div_(x.std(0, correction=0).clamp(min=1e-6))
        head = zero_linear(x.shape[1], len(folder.classes)).to(device)
        optimizer = torch.optim.SGD(head.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        for _ in range(epochs):
            clock.mark()
            loss_sum, correct = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
            for rows in torch.randperm(len(x), device=device).split(batch_size):
                batch, target = x.index_select(0, rows), y.index_select(0, rows)
                scores = head(batch)
                loss = F.cross_entropy(scores, target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach() * len(rows)
                correct += (scores.detach().argmax(1) == target).sum()
            clock.accuracy.append(float(correct) / len(x))
            assert loss_sum.isfinite()
        clock.mark()
    return asdict(Training(clock.marks, clock.accuracy, (len(x), x.shape[1]), memory.peak))


def train_torchlin(
    root: str, batch_size: int, epochs: int, cache: str, device: str = "cpu", resident: str = "auto"
) -> dict[str, Any]:
    import lightning.pytorch  # noqa: F401  (before the clock starts)

    import torchlin
    from torchlin.data import ImageFolderDataModule

    with PeakMemory() as memory:
        clock = Clock(device)
        options = {} if resident == "auto" else {"resident": resident}
        data = ImageFolderDataModule(root, cache_dir=cache, batch_size=batch_size, val_fraction=0, **options)
        model = torchlin.LinearClassifier(
            data.in_features, data.num_classes, lr=LR, momentum=MOMENTUM, schedule="constant"
        )
        with tempfile.TemporaryDirectory() as work:
            callbacks = [torchlin.ProgressBar(), torchlin.RunFolder(Path(work) / "run")]
            fit(model, epochs, clock, callbacks, datamodule=data)
    return asdict(Training(clock.marks, clock.accuracy, (data.sizes["train"], data.in_features), memory.peak))


def zero_linear(features: int, classes: int) -> nn.Linear:
    """Where torchlin's head starts too: the accuracies of the first epochs depend on it, the times do not."""
    head = nn.Linear(features, classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class Clock:
    """Seconds since it was made, at the start of each epoch and at the end of the last."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[float] = []
        self.accuracy: list[float] = []
        self._start = time.perf_counter()

    def mark(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter() - self._start)

    def mark_epoch(self, trainer: Any, _: object) -> None:
        self.mark()
        if "train_accuracy" in trainer.callback_metrics:  # that of the epoch before
            self.accuracy.append(float(trainer.callback_metrics["train_accuracy"]))


def fit(model: Any, epochs: int, clock: Clock, callbacks: Sequence[Any] = (), **data: Any) -> None:
    """Train as a script of one's own would; what Lightning writes goes into a temporary folder."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import LambdaCallback

    watch = LambdaCallback(on_train_epoch_start=clock.mark_epoch, on_train_end=clock.mark_epoch)
    accelerator = "cpu" if clock.device == "cpu" else "gpu"
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            devices=1,
            logger=False,
            default_root_dir=work,
            callbacks=[watch, *callbacks],
        )
        trainer.fit(model, **data)


# epochs


def part_epochs(options: argparse.Namespace) -> None:
    root = need_root(options)
    read_all(root)
    for batch_size in options.batch_size:
        runs: dict[str, list[Training]] = {way: [] for way in ("stock", "bare", "torchlin", "torchlin, second run")}
        for _ in range(options.rounds):
            for way, run in epochs_round(str(root), batch_size, options):
                runs[way].append(run)
        print_epochs(batch_size, runs, options)


def epochs_round(root: str, batch_size: int, options: argparse.Namespace) -> Iterator[tuple[str, Training]]:
    what = {"root": root, "batch_size": batch_size}
    yield "stock", Training(**measure(train_stock, epochs=options.stock_epochs, **what))
    yield "bare", Training(**measure(train_bare, epochs=options.epochs, **what))
    with tempfile.TemporaryDirectory() as cache:
        for way in ("torchlin", "torchlin, second run"):
            yield way, Training(**measure(train_torchlin, epochs=options.epochs, cache=cache, **what))


def print_epochs(batch_size: int, runs: dict[str, list[Training]], options: argparse.Namespace) -> None:
    seen = options.stock_epochs - 1  # accuracies are compared after as many epochs as stock has trained
    accuracy = {way: statistics.median(run.accuracy[seen] for run in of) for way, of in runs.items()}
    samples = runs["stock"][0].shape[0]
    rows = [
        [
            way,
            number(median(of, "cold"), 3),
            number(median(of, "first"), 3),
            number(median(of, "warm"), 3),
            number(samples / median(of, "warm")),
            f"{accuracy[way]:.4f}",
            number(median(of, "peak") / 1e6),
        ]
        for way, of in runs.items()
    ]
    seconds = ("data set to end of first epoch, s", "first epoch alone, s", "warm epoch, s")
    print(f"### Epochs of {samples:,} images, batches of {batch_size}\n")
    print_table(["", *seconds, "images/s, warm", f"training accuracy, epoch {seen + 1}", "peak RssAnon, MB"], rows)
    stock, bare, ours = runs["stock"], runs["bare"], runs["torchlin"]
    spread = 100 * (max(accuracy.values()) - min(accuracy.values()))
    print_checks(
        [
            Check("torchlin's cold start / stock's", median(ours, "cold") / median(stock, "cold"), 0.4),
            Check(
                "stock's warm epoch / torchlin's",
                median(stock, "warm") / median(ours, "warm"),
                25 if batch_size >= 1024 else 15,
                at_most=False,
            ),
            Check("torchlin's warm epoch / bare's", median(ours, "warm") / median(bare, "warm"), 1.4),
            Check("largest difference of accuracies, percentage points", spread, 0.7),
        ]
    )


# photos


def part_photos(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as work:
        write_photos(Path(work), options.photos)
        read_all(Path(work))
        ways = {"torchlin": decode_by_torchlin, "Pillow": decode_by_pillow}
        rates: dict[str, list[float]] = {way: [] for way in ways}
        pixels: dict[str, Tensor] = {}
        for _ in range(options.rounds + 1):
            for way, decode in ways.items():
                start = time.perf_counter()
                pixels[way] = decode(work, options.cores)
                rates[way].append(options.photos / (time.perf_counter() - start))
    speed = {way: statistics.median(of[1:]) for way, of in rates.items()}  # the first round warms up
    difference = float((pixels["torchlin"].float() - pixels["Pillow"].float()).abs().mean())
    print(f"### {options.photos} JPEG photographs of about 200×150 to 64×64, {options.cores} threads\n")
    print_table(["", "images/s"], [[way, number(rate)] for way, rate in speed.items()])
    print(f"Mean absolute difference of the pixels: {difference:.2f} of 255.\n")
    print_checks([Check("torchlin / Pillow", speed["torchlin"] / speed["Pillow"], 2, at_most=False)])


def decode_by_torchlin(folder: str, _: int) -> Tensor:
    from torchlin.data.decoding import decode_files
    from torchlin.data.images import PixelFormat, list_images

    return decode_files(list_images(Path(folder)), PixelFormat((3, 64, 64), "rgb", 64))


def decode_by_pillow(folder: str, threads: int) -> Tensor:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), np.array])
    dataset = ImageFolder(folder, steps)
    pixels = np.empty((len(dataset), 64, 64, 3), dtype=np.uint8)

    def decode(i: int) -> None:
        pixels[i] = dataset[i][0]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decode, range(len(dataset))))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def write_photos(folder: Path, count: int) -> None:
    """Noise at four scales, the coarsest the strongest: smooth shapes with texture, as photographs have."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = PHOTO_SIZES[i % len(PHOTO_SIZES)]
        pixels = np.full((height, width, 3), 128.0)
        for cells, strength in ((4, 60), (12, 30), (48, 12)):
            noise = rng.integers(0, 256, (cells * height // width + 1, cells, 3), dtype=np.uint8)
            layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, dtype=np.float64) - 128) * strength / 64
        pixels += rng.normal(0, 5, pixels.shape)
        path = folder / "ab"[i % 2] / f"{i:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


# predict


def part_predict(options: argparse.Namespace) -> None:
    root = need_root(options)
    read_all(root / "test")
    with tempfile.TemporaryDirectory() as work:
        head = write_head(root, Path(work))
        ways: dict[str, Callable[[bool], None]] = {
            "stock, one at a time": lambda one: run_stock_predict(root, head, 1, one),
            "stock, batches of 128": lambda one: run_stock_predict(root, head, 128, one),
            "torchlin predict": lambda one: run_torchlin_predict(root, head, one),
        }
        times: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
        tables: dict[str, list[list[str]]] = {}
        for _ in range(options.rounds):
            for way, predict in ways.items():
                for one, record in zip((True, False), times[way], strict=True):
                    start = time.perf_counter()
                    predict(one)
                    record.append(time.perf_counter() - start)
                tables[way] = read_csv(head / "labels.csv")
    print_predict(times, tables)


def print_predict(times: dict[str, tuple[list[float], list[float]]], tables: dict[str, list[list[str]]]) -> None:
    labels = {way: {row[0]: row[1] for row in table[1:]} for way, table in tables.items()}
    ours = labels["torchlin predict"]
    start, whole = ({way: statistics.median(of[i]) for way, of in times.items()} for i in (0, 1))
    rate = {way: len(ours) / whole[way] for way in times}
    net = {way: (len(ours) - 1) / max(whole[way] - start[way], 1e-9) for way in times}
    rows = []
    for way, of in labels.items():
        same = sum(of[file] == label for file, label in ours.items()) / len(ours)
        figures = [number(whole[way], 2), number(rate[way]), number(start[way], 2), number(net[way])]
        rows.append([way, *figures, f"{same:.1%}"])
    print(f"### Labelling {len(ours):,} images\n")
    beyond = "images/s beyond that"
    print_table(["", "process, s", "images/s", "process for one image, s", beyond, "same label as torchlin"], rows)
    print_checks(
        [
            Check(f"torchlin / {way}, {what}", of["torchlin predict"] / of[way], 3, at_most=False)
            for what, of in (("images/s of the process", rate), (beyond, net))
            for way in times
            if way.startswith("stock")
        ]
    )


def write_head(root: Path, work: Path) -> Path:
    """A run folder with a head of random weights, which is as quick as any other; and the same for a stock loop."""
    import torchlin
    from torchlin.data import ImageFolderDataModule

    data = ImageFolderDataModule(str(root), cache=False)
    head = torchlin.LinearHead(data.in_features, data.num_classes, init="normal")
    torch.save({"weight": head.weight.detach(), "bias": head.bias.detach()}, work / "linear.pt")
    info = {"input": data.input_info}
    return torchlin.save_head(head, work / "run", class_names=data.class_names, loss="softmax", info=info).parent


def run_torchlin_predict(root: Path, head: Path, one: bool) -> None:
    images = first_image(root / "test") if one else root / "test"
    output = str(head / "labels.csv")
    run_quietly(["-m", "torchlin", "predict", str(images), "--run", str(head / "run"), "--output", output])


def run_stock_predict(root: Path, head: Path, batch_size: int, one: bool) -> None:
    measure(predict_stock, folder=str(root / "test"), head=str(head), batch_size=batch_size, one=one)


@torch.no_grad()
def predict_stock(folder: str, head: str, batch_size: int, one: bool) -> None:
    from torch.utils.data import DataLoader, Subset
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    dataset = ImageFolder(folder, ToTensor())
    state = torch.load(Path(head, "linear.pt"), weights_only=True)
    model = nn.Linear(*reversed(state["weight"].shape))
    model.load_state_dict(state)
    chosen = Subset(dataset, range(1 if one else len(dataset)))
    if batch_size == 1:
        batches = (x.unsqueeze(0) for x, _ in chosen)
    else:
        batches = (x for x, _ in DataLoader(chosen, batch_size, num_workers=torch.get_num_threads()))
    files = (path for path, _ in dataset.samples)
    with Path(head, "labels.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["file", "label", "score", "probability"])
        for x in batches:
            scores = model(x.flatten(1))
            best, labels = scores.max(1)
            shares = scores.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
            for label, score, share in zip(labels.tolist(), best.tolist(), shares.tolist(), strict=True):
                writer.writerow([next(files), dataset.classes[label], f"{score:.6g}", f"{share:.6g}"])


def first_image(folder: Path) -> Path:
    return next(path for path in sorted(folder.rglob("*")) if path.is_file())


def read_csv(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


# memory


def part_memory(options: argparse.Namespace) -> None:
    side = 256
    count = max(20, round(options.gigabytes * 1e9 / (3 * side * side)))
    with tempfile.TemporaryDirectory() as work:
        images = Path(work, "images")
        write_linked_images(images, count, side)
        found = measure(train_mapped, root=str(images), cache=str(Path(work, "cache")), epochs=2)
        size = sum(path.stat().st_size for path in Path(work, "cache").rglob("*") if path.is_file())
    print(f"### Training on a store of {size / 1e9:.2f} GB, {count:,} images of {side}×{side}, 2 epochs\n")
    above = {phase: found[phase] - found["baseline"] for phase in ("building", "training")}
    print_table(
        ["", "s", "peak RssAnon, MB", "above imports, MB"],
        [
            ["after the imports", "–", number(found["baseline"] / 1e6), "–"],
            *(
                [f"{phase}", number(found[f"{phase}_s"], 1), number(found[phase] / 1e6), number(above[phase] / 1e6)]
                for phase in above
            ),
        ],
    )
    print_checks([Check("peak RssAnon above the imports, MB", max(above.values()) / 1e6, 600)])


def write_linked_images(folder: Path, count: int, side: int, classes: int = 10, distinct: int = 200) -> None:
    """Bitmaps of noise, a few hundred of them, each under many names; links cost neither room nor time."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % classes}" / f"{i:06}.bmp"
        if i < distinct:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
        else:
            original = i % distinct
            os.link(folder / f"class{original % classes}" / f"{original:06}.bmp", path)


def train_mapped(root: str, cache: str, epochs: int) -> dict[str, float]:
    import lightning.pytorch  # noqa: F401  (part of the baseline)

    import torchlin
    from torchlin.data import ImageFolderDataModule

    baseline = anonymous_bytes()
    clock = Clock("cpu")
    with PeakMemory() as building:
        data = ImageFolderDataModule(root, cache_dir=cache, val_fraction=0)
        data.setup("fit")
        clock.mark()
    with PeakMemory() as training:
        fit(torchlin.LinearClassifier(data.in_features, data.num_classes), epochs, clock, datamodule=data)
    return {
        "baseline": baseline,
        "building": building.peak,
        "training": training.peak,
        "building_s": clock.marks[0],
        "training_s": clock.marks[-1] - clock.marks[0],
    }


# gpu


def part_gpu(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        print("no GPU here\n")
        return
    root = need_root(options)
    bandwidth = copy_bandwidth()
    what = {"root": str(root), "batch_size": 1024, "epochs": options.epochs, "device": "cuda"}
    runs: dict[str, list[Training]] = {"bare": [], "torchlin": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(options.rounds):
            runs["bare"].append(Training(**measure(train_bare, **what)))
            runs["torchlin"].append(Training(**measure(train_torchlin, cache=cache, resident="device", **what)))
    rows = []
    for way, bytes_per_number in (("bare", 4), ("torchlin", 1)):  # float32 and uint8
        seconds = median(runs[way], "warm")
        rate = math.prod(runs[way][0].shape) * bytes_per_number / seconds
        accuracy = statistics.median(run.accuracy[-1] for run in runs[way])
        share = f"{rate / bandwidth:.2%}"
        rows.append([way, number(seconds, 4), number(1 / seconds, 2), number(rate / 1e9, 2), share, f"{accuracy:.4f}"])
    name = torch.cuda.get_device_name()
    print(f"### {name}: batches of 1024, data on the GPU; a copy moves {bandwidth / 1e9:,.0f} GB/s\n")
    print_table(["", "warm epoch, s", "epochs/s", "pixels read, GB/s", "share of the copy", "training accuracy"], rows)
    ratio = median(runs["torchlin"], "warm") / median(runs["bare"], "warm")
    print(f"torchlin's warm epoch / bare's: {ratio:.2f}\n")


def copy_bandwidth(size: int = 2**30, repeats: int = 20) -> float:
    """Bytes read plus bytes written per second by copies within the GPU's memory."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size / statistics.median(seconds)


# The command line.

CHILDREN = {f.__name__: f for f in (train_stock, train_bare, train_torchlin, train_mapped, predict_stock)}
PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "epochs": part_epochs,
    "photos": part_photos,
    "predict": part_predict,
    "memory": part_memory,
    "gpu": part_gpu,
}


def need_root(options: argparse.Namespace) -> Path:
    root = None if options.root is None else Path(options.root).expanduser()
    if root is None or not (root / "train").is_dir() or not (root / "test").is_dir():
        sys.exit(f"--root {root}: name a folder that holds train/ and test/ with one folder of images per class")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    add("--root", help="CIFAR-10 as a folder of images; needed by epochs, predict and gpu")
    add("--threads", type=int, default=2, help="threads, workers and cores (default: %(default)s)")
    add("--rounds", type=int, default=3, help="how often the ways take turns (default: %(default)s)")
    add("--batch-size", type=int, nargs="+", default=[128], help="epochs: one table each, such as 128 1024")
    add("--epochs", type=int, default=8, help="epochs, gpu: of bare and torchlin (default: %(default)s)")
    add("--stock-epochs", type=int, default=2, help="epochs: of stock, at most --epochs (default: %(default)s)")
    add("--photos", type=int, default=1200, help="photos: how many (default: %(default)s)")
    add("--gigabytes", type=float, default=4.0, help="memory: size of the store (default: %(default)s)")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_main(options.child)
        return
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; known: {', '.join(PARTS)}")
    if not 2 <= options.stock_epochs <= options.epochs:
        parser.error("--stock-epochs is at least 2 and at most --epochs")
    options.cores = keep_to_cores(options.threads)
    print(describe_machine(options.cores, options), end="\n\n")
    for part in options.parts or PARTS:
        PARTS[part](options)


if __name__ == "__main__":
    main()
