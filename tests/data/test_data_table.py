"""Tables: every format, and an error for every way in which one can be wrong."""

from __future__ import annotations

import builtins
import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchlin.data import DataError, FeaturesDataModule

X = np.arange(24, dtype=np.float32).reshape(8, 3) / 7
Y = np.array([3, 10, 3, 10, -1, 3, 10, -1])
NAMES = ["a", "b", "c"]


def write_csv(path: Path) -> None:
    lines = ["a,target,b,c"] + [f"{a!r},{y},{b!r},{c!r}" for (a, b, c), y in zip(X.tolist(), Y, strict=True)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_parquet(path: Path) -> None:
    frame = pandas.DataFrame(X, columns=NAMES)
    frame.insert(1, "target", Y)
    frame.index = frame.index + 5  # stored in the file, and no feature
    frame.to_parquet(path)


def write_npz(path: Path) -> None:
    np.savez(path, features=X, target=Y)


def write_safetensors(path: Path) -> None:
    save_file({"features": torch.from_numpy(X), "target": torch.from_numpy(Y)}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "t.csv": write_csv,
    "t.parquet": write_parquet,
    "t.npz": write_npz,
    "t.safetensors": write_safetensors,
}


def everything(module: FeaturesDataModule) -> tuple[Tensor, Tensor]:
    batches = list(module.train_dataloader())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = x[:, 0].argsort()
    return x[order], y[order]


def message(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        FeaturesDataModule(str(path), **options)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") or "test_path" in options
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", WRITERS)
def test_every_format(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    module = FeaturesDataModule(str(tmp_path / name), val_fraction=0)
    assert (module.name, module.num_classes, module.in_features) == ("t", 3, 3)
    assert module.class_names == ["-1", "3", "10"]
    assert module.feature_names == (NAMES if name in ("t.csv", "t.parquet") else None)
    assert json.loads(json.dumps(module.input_info)) == module.input_info
    assert (module.input_info["kind"], module.input_info["shape"]) == ("features", [3])
    module.setup("fit")
    assert module.sizes == {"train": 8, "val": 0, "test": 0}
    x, y = everything(module)
    assert torch.equal(x, torch.from_numpy(X))
    assert y.tolist() == [1, 2, 1, 2, 0, 1, 2, 0]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(module.standardization.std.numpy(), X.astype(np.float64).std(0), rtol=1e-6)
    with pytest.raises(DataError, match=r"no target column|no key"):
        FeaturesDataModule(str(tmp_path / name), target="nope")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.uint16, np.bool_])
def test_features_become_float32(tmp_path: Path, dtype: type) -> None:
    features = (np.arange(8).reshape(4, 2) % 3).astype(dtype)
    np.savez(tmp_path / "t.npz", features=features, target=[0, 1, 0, 1])
    x, _ = next(iter(FeaturesDataModule(str(tmp_path / "t.npz"), val_fraction=0).train_dataloader()))
    assert x.dtype == torch.float32
    assert sorted(x.tolist()) == sorted(features.astype(np.float32).tolist())


def test_bfloat16_and_fortran_order(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"features": torch.eye(4).bfloat16(), "target": torch.arange(4, dtype=torch.int32)}, path)
    assert FeaturesDataModule(str(path)).class_names == ["0", "1", "2", "3"]
    np.savez(tmp_path / "t.npz", features=np.asfortranarray(X), target=Y)
    assert torch.equal(everything(FeaturesDataModule(str(tmp_path / "t.npz"), val_fraction=0))[0], torch.from_numpy(X))


def test_names_as_targets(tmp_path: Path) -> None:
    (tmp_path / "taste.csv").write_text("﻿sweet, sour ,taste\n1,2,bad\n\n3,4, good\n5,6,bad\n", encoding="utf-8")
    module = FeaturesDataModule(str(tmp_path / "taste.csv"), target="taste", val_fraction=0)
    assert module.class_names == ["bad", "good"]
    assert module.feature_names == ["sweet", "sour"]
    assert module.class_counts.tolist() == [2, 1]
    np.savez(tmp_path / "t.npz", features=X[:3], target=["b", "a", "b"])
    assert FeaturesDataModule(str(tmp_path / "t.npz")).class_names == ["a", "b"]
    frame = pandas.DataFrame({"x": [1, 2, 3], "target": pandas.Categorical(["b", "a", "b"])})
    frame.to_parquet(tmp_path / "t.parquet")
    assert FeaturesDataModule(str(tmp_path / "t.parquet")).class_names == ["a", "b"]


def test_mixed_targets_are_names_and_truth_values_are_integers(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x,target\n1,10\n2,9\n3,other\n")
    assert FeaturesDataModule(str(tmp_path / "t.csv")).class_names == ["10", "9", "other"]
    np.savez(tmp_path / "t.npz", features=X[:3], target=[True, False, True])
    assert FeaturesDataModule(str(tmp_path / "t.npz")).class_names == ["0", "1"]


def test_validation_is_stratified_and_the_fingerprint_is_of_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", features=np.random.default_rng(0).normal(size=(100, 2)), target=[0, 1, 1, 1] * 25)
    module = FeaturesDataModule(str(tmp_path / "t.npz"), val_fraction=0.2)
    assert module.sizes == {"train": 80, "val": 20, "test": 0}
    assert module.class_counts.tolist() == [20, 60]
    assert FeaturesDataModule(str(tmp_path / "t.npz"), seed=9).fingerprint == module.fingerprint
    np.savez(tmp_path / "u.npz", features=np.zeros((100, 2)), target=[0, 1, 1, 1] * 25)
    assert FeaturesDataModule(str(tmp_path / "u.npz")).fingerprint != module.fingerprint


def test_test_path(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b,target\n1,2,x\n3,4,y\n5,6,z\n")
    (tmp_path / "test.csv").write_text("a,target,b\n7,z,8\n9,x,10\n")
    module = FeaturesDataModule(str(tmp_path / "train.csv"), test_path=str(tmp_path / "test.csv"), val_fraction=0)
    assert module.sizes == {"train": 3, "val": 0, "test": 2}
    ((x, y),) = module.test_dataloader()
    assert x.tolist() == [[7, 8], [9, 10]]
    assert y.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("test_text", "expected"),
    [
        ("a,b,target\n1,2,Xx\n", "class 'Xx' is not among the 2 training classes (did you mean 'xx'?)"),
        ("a,target\n1,xx\n", "1 features per sample, the training file has 2"),
        ("b,a,target\n1,2,xx\n", "feature column 1 is 'b', in the training file it is 'a'; the columns must have"),
        ("a,c,target\n1,2,xx\n", "feature column 2 is 'c', in the training file it is 'b'"),
    ],
)
def test_test_path_that_does_not_fit(tmp_path: Path, test_text: str, expected: str) -> None:
    (tmp_path / "train.csv").write_text("a,b,target\n1,2,xx\n3,4,y\n")
    (tmp_path / "test.csv").write_text(test_text)
    text = message(tmp_path / "train.csv", test_path=str(tmp_path / "test.csv"))
    assert text.startswith(f"{tmp_path / 'test.csv'}: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b,target\n1,2,0\n1,abc,1\n", "line 3, column 'b' holds 'abc', not a number; all columns but the target"),
        ("a,b,target\n\n1,2,0\n2024_01,2,1\n", "line 4, column 'a' holds '2024_01', not a number"),
        ("a,b,target\n1,2,0\n1, ,1\n", "line 3, column 'b' is empty; fill it in"),
        ("a,b,target\n1,2,0\nnan,2,1\n", "line 3, column 'a' holds nan, not a finite 32-bit number"),
        ("a,b,target\n1,inf,0\n1,2,1\n", "line 2, column 'b' holds inf, not a finite"),
        ("a,b,target\n1,1e300,0\n1,2,1\n", "line 2, column 'b' holds 1e+300, not a finite"),
        ("a,b,target\n1,2,0\n1,2\n", "line 3 has 2 cells, the header has 3"),
        ("a,b,target\n1,2,0\n1,2,3,4\n", "line 3 has 4 cells, the header has 3"),
        ("a,b,target\n1,2,0\n1,2,\n", "line 3, column 'target' (the target) is empty"),
        ('a,target\n1,"x\ny"\nz,0\n', "line 4, column 'a' holds 'z'"),
        ("a,b,a,target\n1,2,3,0\n", "two columns are called 'a'; rename one"),
        ("a,b,Targte\n1,2,0\n", "no target column 'target' (did you mean 'Targte'?); the columns are 'a', 'b', 'Ta"),
        ("a;b;target\n1;2;0\n", "the columns are separated by ';'; separate them by commas"),
        ("a,target\n1,0.5\n2,1\n", "target 'target' holds '0.5', not a class label; store integers or names"),
        ("a,target\n1,1.0\n2,0.0\n", "target 'target' holds "),
        ("a,target\n1,x\n2,x\n", "target 'target' holds only 'x'; at least two classes are needed"),
        ("a,target\n", "0 rows of 1 features; at least one row and one feature"),
        ("target\n1\n2\n", "2 rows of 0 features"),
        ("", "no target column 'target'; the columns are nothing"),
        ('a,target\n1,"0\n', "not a table of comma-separated values ("),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    assert message(tmp_path / "t.csv").startswith(expected)


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("größe,target\n1,0\n".encode("latin-1"))
    assert message(tmp_path / "t.csv").startswith("not UTF-8 text (invalid")


def test_long_header_is_cut_in_the_message(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(f"c{i}" for i in range(50)) + "\n")
    assert "'c9' and 40 more; choose one with target=" in message(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"a": ["x", "y"], "target": [0, 1]}, "row 1, column 'a' holds 'x', not a number"),
        ({"a": [1.0, None], "target": [0, 1]}, "row 2, column 'a' is empty"),
        ({"a": [1.0, np.inf], "target": [0, 1]}, "row 2, column 'a' holds inf, not a finite"),
        ({"a": [1.0, 2.0], "target": [0.5, 1]}, "target 'target' holds floating-point numbers, not class labels"),
        ({"a": [1.0, 2.0], "target": ["x", None]}, "row 2, column 'target' is empty"),
        ({"a": pandas.Series([], dtype=str), "target": []}, "0 rows of 1 features"),
        ({"a": [1.0, 2.0], "label": ["x", "y"]}, "no target column 'target'; the columns are 'a', 'label'"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, list[object]], expected: str) -> None:
    pandas.DataFrame(columns).to_parquet(tmp_path / "t.parquet")
    assert message(tmp_path / "t.parquet").startswith(expected)


def test_parquet_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "t.parquet")
    real_import = builtins.__import__

    def without_pandas(name: str, *rest: object) -> object:
        if name == "pandas":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    assert "pip install 'torchlin[tables]'" in message(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (
            {"feature": X, "target": Y},
            "no key 'features' (did you mean 'feature'?); the file holds 'feature', 'target'",
        ),
        ({"features": X, "labels": Y}, "no key 'target'; the file holds 'features', 'labels'; it must hold"),
        ({"features": X, "target": Y[:5]}, "'features' has 8 rows, 'target' has 5; they must be equal"),
        ({"features": X[0], "target": Y}, "'features' has shape (3,); it must be (samples, features)"),
        ({"features": X, "target": Y[:, None]}, "'target' has shape (8, 1); it must be (samples,)"),
        (
            {"features": X, "target": Y * 1.0},
            "target 'target' holds floating-point numbers, not class labels; store int",
        ),
        ({"features": X, "target": Y * 1j}, "target 'target' holds complex numbers"),
        ({"features": X * 1j, "target": Y}, "'features' has dtype complex64; it must be numeric"),
        ({"features": X.astype(str), "target": Y}, "'features' has dtype <U"),
        (
            {"features": X, "target": Y.astype(object)},
            "'target' is an array of Python objects, which are never unpickled",
        ),
        ({"features": np.where(X[4, 1] == X, np.nan, X), "target": Y}, "row 5, feature 2 holds nan, not a finite"),
        ({"features": X[:0], "target": Y[:0]}, "0 rows of 3 features"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    assert message(tmp_path / "t.npz").startswith(expected)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"x": torch.rand(2, 2), "target": torch.arange(2)}, "no key 'features'; the file holds 'target', 'x'"),
        ({"features": torch.rand(2, 2), "target": torch.rand(2).bfloat16()}, "target 'target' holds floating-point"),
        ({"features": torch.rand(2, 2) * 1j, "target": torch.arange(2)}, "'features' has dtype torch.complex64"),
        ({"features": torch.rand(3, 2), "target": torch.arange(2)}, "'features' has 3 rows, 'target' has 2"),
        ({"features": torch.full((2, 2), torch.inf), "target": torch.arange(2)}, "row 1, feature 1 holds inf"),
    ],
)
def test_bad_safetensors(tmp_path: Path, tensors: dict[str, Tensor], expected: str) -> None:
    save_file(tensors, tmp_path / "t.safetensors")
    assert message(tmp_path / "t.safetensors").startswith(expected)


def test_every_damaged_byte_of_an_archive_is_survived(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "good.npz", features=X, target=Y)
    good = (tmp_path / "good.npz").read_bytes()
    for position in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[position] ^= 0xFF
        (tmp_path / "t.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):  # and nothing else
            FeaturesDataModule(str(tmp_path / "t.npz"))


@pytest.mark.parametrize("name", ["t.npz", "t.safetensors", "t.parquet"])
@pytest.mark.parametrize("content", [b"", b"rubbish" * 20, b"PK\x03\x04rubbish", b"\x93NUMPY\x01\x00"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.match(rf"not a readable (\.?){name.split('.')[1]} file \(", message(tmp_path / name))


def test_an_array_in_place_of_an_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", X)
    (tmp_path / "t.npy").rename(tmp_path / "t.npz")
    assert message(tmp_path / "t.npz").startswith("not a readable .npz file (")


def test_missing_unknown_and_folder(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv")
    assert message(tmp_path / "tabel.csv") == "no such file (did you mean 'table.csv'?)"
    assert message(tmp_path / "none" / "t.csv") == "no such file"
    assert message(tmp_path / "t.xlsx") == "unknown table format '.xlsx'; use one of .csv .parquet .npz .safetensors"
    (tmp_path / "folder.csv").mkdir()
    assert message(tmp_path / "folder.csv").startswith("is a folder, not a table")


def test_uint8_features_are_pixels_as_everywhere(tmp_path: Path) -> None:
    pixels = np.arange(120, dtype=np.uint8).reshape(20, 6)
    np.savez(tmp_path / "t.npz", features=pixels, target=np.arange(20) % 2)
    data = FeaturesDataModule(str(tmp_path / "t.npz"), val_fraction=0)
    x, _ = next(iter(data.train_dataloader()))
    assert x.dtype == torch.uint8
    np.testing.assert_allclose(data.standardization.mean, pixels.mean(0) / 255, rtol=1e-6)
