"""Heads: what goes in and out, the bias trick, standardised coordinates, files, export, use in a larger model."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from plain import each_loss
from torch import Tensor, nn

from torchlin import storage
from torchlin.heads import LinearHead, Standardization, StandardizedHead, absorb_bias, append_one, split_bias
from torchlin.losses import LOSSES, HingeLoss, LogisticLoss, Loss, SoftmaxLoss
from torchlin.storage import load_head, save_head

NO_PROBABILITIES = ("perceptron", "hinge", "crammer_singer", "squared_hinge")


def random_head(p: int = 6, k: int = 3, bias: bool = True, dtype: torch.dtype = torch.float64) -> LinearHead:
    head = LinearHead(p, k, bias, "normal", dtype=dtype)
    nn.init.normal_(head.weight)
    if bias:
        nn.init.normal_(head.bias)
    return head


# An nn.Linear with a classifier's manners.


def test_it_is_an_nn_linear() -> None:
    head = LinearHead(4, 3)
    assert isinstance(head, nn.Linear)
    assert list(head.state_dict()) == ["weight", "bias"]
    assert list(LinearHead(4, 3, bias=False).state_dict()) == ["weight"]
    assert (head.in_features, head.out_features, head.num_classes) == (4, 3, 3)
    assert repr(head) == "LinearHead(in_features=4, num_classes=3, bias=True)"
    linear = nn.Linear(4, 3)
    head.load_state_dict(linear.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(head(x), linear(x))
    linear.load_state_dict(copy.deepcopy(head).state_dict())


def test_init() -> None:
    assert not any(p.any() for p in LinearHead(4, 3).parameters())
    normal = LinearHead(400, 30, init="normal")
    assert normal.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not normal.bias.any()
    torch.manual_seed(1)
    expected = nn.Linear(4, 3)
    torch.manual_seed(1)
    assert torch.equal(LinearHead(4, 3, init="linear").weight, expected.weight)
    normal.reset_parameters()
    assert normal.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_bad_sizes_and_init() -> None:
    with pytest.raises(ValueError, match="in_features is at least 1, got 0"):
        LinearHead(0, 3)
    with pytest.raises(ValueError, match="num_classes is at least 1, got -2"):
        LinearHead(4, -2)
    with pytest.raises(ValueError, match="init is 'zeros', 'normal' or 'linear', got 'ones'"):
        LinearHead(4, 3, init="ones")  # type: ignore[arg-type]


def test_output_has_the_shape_an_nn_linear_gives() -> None:
    head = random_head(dtype=torch.float32)
    for shape in ((6,), (5, 6), (2, 5, 6), (0, 6)):
        x = torch.randn(shape)
        assert torch.equal(head(x), nn.functional.linear(x, head.weight, head.bias))


def test_images_are_flattened_from_dimension_one() -> None:
    head = random_head(p=24, dtype=torch.float32)
    x = torch.randn(5, 2, 3, 4)
    assert torch.equal(head(x), head(x.flatten(1)))


def test_the_last_dimension_wins_over_flattening() -> None:
    head = random_head(p=4, dtype=torch.float32)
    assert head(torch.randn(5, 1, 4)).shape == (5, 1, 3)
    assert head(torch.randn(5, 2, 2)).shape == (5, 3)


@pytest.mark.parametrize("kind", [LinearHead, StandardizedHead])
def test_uint8_is_pixels_over_255(kind: type[LinearHead]) -> None:
    head = kind(12, 3, init="normal")
    x = torch.randint(256, (5, 3, 2, 2), dtype=torch.uint8)
    torch.testing.assert_close(head(x), head(x.float() / 255))
    assert head(x).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 7), (5, 2, 2), (7,), (5,), ()], ids=str)
def test_width_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    head = random_head(dtype=torch.float32)
    with pytest.raises(ValueError, match="in_features=6, which fits neither") as caught:
        head(torch.randn(shape))
    assert str(shape) in str(caught.value)


def test_predict() -> None:
    head = random_head(dtype=torch.float32)
    x = torch.randn(5, 6)
    assert torch.equal(head.predict(x), head(x).argmax(1))
    one = random_head(k=1, dtype=torch.float32)
    assert torch.equal(one.predict(x), (one(x)[:, 0] > 0).long())
    assert not head.predict(x).requires_grad
    assert LinearHead(6, 1).predict(x).tolist() == [0] * 5


@pytest.mark.parametrize("cls", each_loss())
def test_predict_proba_follows_the_loss(cls: type[Loss]) -> None:
    head = random_head(k=cls.outputs(2), dtype=torch.float32)
    head.info = {"loss": {"name": cls.name}}
    x = torch.randn(5, 6)
    if cls.name in NO_PROBABILITIES:
        with pytest.raises(TypeError, match=f"the {cls.name} loss defines no probabilities"):
            head.predict_proba(x)
        return
    p = head.predict_proba(x)
    assert p.shape == (5, 2)
    assert not p.requires_grad
    torch.testing.assert_close(p.sum(1), torch.ones(5))
    assert torch.equal(p.argmax(1), head.predict(x))


def test_predict_proba_without_a_loss_names_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"head\.info has no 'loss'.*use loss\.probabilities\(scores\)"):
        random_head().predict_proba(torch.randn(2, 6, dtype=torch.float64))


# The bias trick.


@pytest.mark.parametrize("cls", each_loss())
def test_bias_trick_gives_equal_scores_and_gradients(cls: type[Loss]) -> None:
    head = random_head(k=cls.outputs(2))
    absorbed = absorb_bias(head)
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 2
    assert absorbed.weight.shape == (cls.outputs(2), 7)
    assert absorbed.bias is None
    torch.testing.assert_close(absorbed(append_one(x)), head(x))
    loss = cls()
    loss(head(x), y).backward()
    loss(absorbed(append_one(x)), y).backward()
    assert head.weight.grad is not None
    torch.testing.assert_close(absorbed.weight.grad, torch.cat((head.weight.grad, head.bias.grad.unsqueeze(1)), 1))
    assert bool(absorbed.weight.grad.any())


def test_split_bias_inverts_absorb_bias() -> None:
    head = random_head()
    again = split_bias(absorb_bias(head))
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)
    assert again.weight.requires_grad
    with pytest.raises(ValueError, match="no bias to absorb"):
        absorb_bias(random_head(bias=False))
    with pytest.raises(ValueError, match="holds no bias"):
        split_bias(head)


def test_append_one() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float16)
    assert torch.equal(append_one(x)[..., :4], x)
    assert torch.equal(append_one(x)[..., 4], torch.ones(2, 3, dtype=torch.float16))


def test_what_is_penalised() -> None:
    head = random_head()
    assert torch.equal(head.penalized(head.weight), head.weight)
    absorbed = absorb_bias(head)
    assert torch.equal(absorbed.penalized(absorbed.weight), head.weight)
    assert absorbed.penalized(absorbed.weight).data_ptr() == absorbed.weight.data_ptr()


def test_bias_trick_keeps_what_the_head_knows() -> None:
    head = random_head()
    head.info = {"loss": {"name": "softmax"}}
    x = torch.randn(4, 6, dtype=torch.float64)
    absorbed = absorb_bias(head)
    torch.testing.assert_close(absorbed.predict_proba(append_one(x)), head.predict_proba(x))
    torch.testing.assert_close(split_bias(absorbed).predict_proba(x), head.predict_proba(x))


# Standardised coordinates.


def standardized(p: int = 6, k: int = 3, bias: bool = True) -> tuple[StandardizedHead, Standardization]:
    head = StandardizedHead(p, k, bias, init="linear").double()
    return head, Standardization(
        torch.randn(p).double() if bias else torch.zeros(p).double(), torch.rand(p).double() + 0.5
    )


@pytest.mark.parametrize("bias", [True, False])
def test_folded_scores_equal_scores_on_standardised_data(bias: bool) -> None:
    head, s = standardized(bias=bias)
    plain = LinearHead(6, 3, bias, dtype=torch.float64)
    plain.load_state_dict({name: t.clone() for name, t in head.named_parameters()})
    head.mean.copy_(s.mean)
    head.std.copy_(s.std)
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    torch.testing.assert_close(head(x), plain((x - s.mean) / s.std))
    SoftmaxLoss()(head(x), y).backward()
    SoftmaxLoss()(plain((x - s.mean) / s.std), y).backward()
    for a, b in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert bool(a.grad is not None and a.grad.any())


@pytest.mark.parametrize("bias", [True, False])
def test_restandardize_keeps_the_scores(bias: bool) -> None:
    head, s = standardized(bias=bias)
    x = torch.randn(9, 6, dtype=torch.float64)
    before, weight = head(x), head.weight.detach().clone()
    for step in (s, Standardization(s.mean * 2, s.std + 1)):
        head.restandardize(step)
        torch.testing.assert_close(head(x), before)
        torch.testing.assert_close(head.mean, step.mean)
    assert not torch.allclose(head.weight, weight)


def test_fold_is_a_plain_head_with_the_same_scores() -> None:
    head, s = standardized()
    head.restandardize(s)
    head.info = {"loss": {"name": "softmax"}}
    folded = head.fold()
    x = torch.randn(9, 6, dtype=torch.float64)
    assert type(folded) is LinearHead
    assert list(folded.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(folded(x), head(x))
    assert folded.info == head.info
    assert folded.info is not head.info


def test_centring_without_a_bias_is_an_error() -> None:
    head, s = standardized(bias=False)
    with pytest.raises(ValueError, match="centring needs a bias"):
        head.restandardize(Standardization(s.mean + 1, s.std))


def test_standardization_of_another_width_is_an_error() -> None:
    head, _ = standardized()
    with pytest.raises(ValueError, match=r"standardization of \(4,\) features for a head with in_features=6"):
        head.restandardize(Standardization(torch.zeros(4), torch.ones(4)))


def test_the_fold_stays_exact_under_autocast() -> None:
    head = StandardizedHead(6, 3, init="linear")
    head.mean.fill_(100.0)
    with torch.autocast("cpu", torch.bfloat16):
        centred = head(torch.full((1, 6), 100.0))
    torch.testing.assert_close(centred, head(torch.full((1, 6), 100.0)))


def test_absorbing_a_standardised_head_keeps_its_scores() -> None:
    head, s = standardized()
    head.restandardize(s)
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(absorb_bias(head)(append_one(x)), head(x))


# Files.


def saved(tmp_path: Path, head: LinearHead | None = None, **options: Any) -> Path:
    options = {"class_names": ["lion", "tiger", "leopard"], "loss": "softmax"} | options
    return save_head(random_head() if head is None else head, tmp_path / "run", **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_save_and_load_round_trip(tmp_path: Path, dtype: torch.dtype, bias: bool) -> None:
    head = random_head(bias=bias, dtype=dtype)
    info = {"metrics": {"test_accuracy": 0.5}, "input": {"shape": [6]}}
    loss = SoftmaxLoss(label_smoothing=0.1, weight=[1.0, 2.0, 3.0])
    folder = saved(tmp_path, head, loss=loss, info=info)
    assert sorted(p.name for p in folder.iterdir()) == ["head.json", "head.safetensors"]
    for path in (folder, str(folder), folder / "head.safetensors"):
        again = load_head(path)
        assert type(again) is LinearHead
        assert again.weight.dtype == dtype
        assert torch.equal(again.weight, head.weight)
        assert (again.bias is None) is (head.bias is None)
        assert again.bias is None or torch.equal(again.bias, head.bias)
        assert again.weight.requires_grad
    assert again.info["class_names"] == ["lion", "tiger", "leopard"]
    assert again.info["loss"] == {"name": "softmax", "label_smoothing": pytest.approx(0.1), "weight": [1.0, 2.0, 3.0]}
    assert again.info["format"] == 1
    assert (again.info["in_features"], again.info["num_classes"]) == (6, 3)
    assert again.info["metrics"] == info["metrics"]
    assert again.info["input"] == info["input"]


@pytest.mark.parametrize("cls", each_loss())
def test_a_head_of_every_loss_is_saved_and_predicts_again(tmp_path: Path, cls: type[Loss]) -> None:
    head = random_head(k=cls.outputs(2))
    again = load_head(saved(tmp_path, head, loss=cls(), class_names=["no", "yes"]))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(again.predict(x), head.predict(x))
    if cls.name not in NO_PROBABILITIES:
        assert again.predict_proba(x).shape == (4, 2)


def test_saving_again_keeps_what_was_known(tmp_path: Path) -> None:
    first = load_head(saved(tmp_path, info={"penalty": {"name": "l1", "strength": 0.1}}))
    second = load_head(save_head(first, tmp_path / "b", class_names=["a", "b", "c"], loss=HingeLoss(margin=2.0)))
    assert second.info["penalty"] == {"name": "l1", "strength": 0.1}
    assert second.info["loss"] == {"name": "hinge", "margin": 2.0}
    assert second.info["class_names"] == ["a", "b", "c"]


def test_a_standardised_head_is_saved_on_raw_input(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    head, s = standardized()
    head.restandardize(s)
    folder = saved(tmp_path, head, standardization=s)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(load_head(folder)(x), head(x))
    assert torch.equal(load_file(folder / "head.safetensors")["mean"], s.mean)


@pytest.mark.parametrize(
    ("k", "loss", "names", "expected"), [(3, "softmax", 2, 3), (1, "logistic", 1, 2), (3, "hinge", 4, 3)]
)
def test_class_names_that_do_not_match_the_head(tmp_path: Path, k: int, loss: str, names: int, expected: int) -> None:
    with pytest.raises(ValueError, match=f"{names} class names for a head of {expected} classes under the {loss} loss"):
        saved(tmp_path, random_head(k=k), loss=loss, class_names=["x"] * names)
    assert not (tmp_path / "run").exists()


def test_info_that_json_cannot_hold_writes_nothing(tmp_path: Path) -> None:
    for value in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            saved(tmp_path, info={"metrics": value})
        assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_head_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fails_at: int
) -> None:
    old, new = random_head(), random_head()
    folder = saved(tmp_path, old, class_names=["a", "b", "c"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    owner: Any = storage.os if call == "fsync" else storage.Path
    real, calls = getattr(owner, call), []

    def full_disk(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, new, class_names=["c", "b", "a"])
    monkeypatch.undo()
    after = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(after) == set(before)
    if (call, fails_at) == ("replace", 2):
        assert after["head.json"] == before["head.json"]
    else:
        assert after == before


def test_a_missing_folder_suggests_the_nearest(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"rum: no such run folder \(did you mean 'run'\?\)"):
        load_head(tmp_path / "rum")
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        load_head(tmp_path / "nowhere" / "else")


@pytest.mark.parametrize("name", ["head.json", "head.safetensors"])
def test_an_unfinished_run_names_what_is_missing(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no {name}, so it is not a finished run"):
        load_head(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[]",
        b"3",
        b"\xff\xfe\x00",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "class_names": ["a", "b", "c"]}',
        b'{"format": 1, "class_names": ["a", "b", "c"], "in_features": 6}',
        b'{"format": 1, "class_names": 3, "in_features": 6, "loss": "softmax"}',
    ],
    ids=["cut", "empty", "list", "number", "binary", "nothing", "no_names", "no_features", "no_loss", "names"],
)
def test_a_damaged_description(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path)
    (folder / "head.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"head\.json: damaged, not the description of a head"):
        load_head(folder)


@pytest.mark.parametrize("kept", [0, 4, 40, -1], ids=["empty", "length", "header", "data"])
def test_truncated_weights(tmp_path: Path, kept: int) -> None:
    folder = saved(tmp_path)
    content = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=r"head\.safetensors: damaged, no weights can be read from it"):
        load_head(folder)


def test_a_pickle_in_place_of_the_weights_is_not_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    torch.save({"weight": torch.zeros(3, 6)}, folder / "head.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load_head(folder)


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    info = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this torchlin reads format 1: update torchlin"):
        load_head(folder)


@pytest.mark.parametrize(
    "other",
    [{"class_names": ["a", "b"]}, {"in_features": 7}, {"loss": {"name": "logistic"}}],
    ids=lambda o: next(iter(o)),
)
def test_two_files_that_do_not_belong_together(tmp_path: Path, other: dict[str, Any]) -> None:
    folder = saved(tmp_path)
    info = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps(info | other))
    with pytest.raises(ValueError, match=r"\(3, 6\), but head\.json speaks of"):
        load_head(folder)


def test_a_bias_of_another_width_is_damage(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = saved(tmp_path)
    save_file({"weight": torch.zeros(3, 6), "bias": torch.zeros(4)}, folder / "head.safetensors")
    with pytest.raises(ValueError, match=r"bias \(4,\)"):
        load_head(folder)


def test_load_head_needs_torch_and_safetensors_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    code = (
        f"import sys; from torchlin import load_head; head = load_head({str(folder)!r}); "
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {
        "lightning",
        "pytorch_lightning",
        "torchvision",
        "matplotlib",
        "sklearn",
        "torchmetrics",
        "PIL",
    }


# Export and use elsewhere.


@pytest.mark.parametrize("kind", ["linear", "standardized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_export_gives_the_same_scores(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    head = random_head(p=12, dtype=torch.float32)
    if kind == "standardized":
        head = StandardizedHead(12, 3, init="linear")
        head.restandardize(Standardization(torch.randn(12), torch.rand(12) + 0.5))
    example = (255 * torch.rand(2, 3, 2, 2)).to(dtype)
    batch = torch.export.Dim("batch")
    program = torch.export.export(head.eval(), (example,), dynamic_shapes=({0: batch},))
    onnx_program = torch.onnx.export(head, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    assert onnx_program is not None
    onnx_program.save(tmp_path / "head.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    for n in (1, 7):
        x = (255 * torch.rand(n, 3, 2, 2)).to(dtype)
        torch.testing.assert_close(program.module()(x), head(x))
        (scores,) = session.run(None, {name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), head(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_saved_head_replaces_the_fc_of_a_resnet18(tmp_path: Path) -> None:
    folder = saved(tmp_path, random_head(p=512, dtype=torch.float32))
    model = torchvision.models.resnet18(weights=None)
    model.fc = load_head(folder)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    scores: Tensor = model(x)
    assert scores.shape == (2, 3)
    SoftmaxLoss()(scores, y).backward()
    assert bool(model.fc.weight.grad.any())
    assert bool(model.conv1.weight.grad.any())


def test_logistic_head_has_one_score_for_two_names(tmp_path: Path) -> None:
    head = load_head(saved(tmp_path, random_head(k=1), loss=LogisticLoss(), class_names=["no", "yes"]))
    assert (head.out_features, head.info["num_classes"]) == (1, 2)


def test_every_loss_has_a_rule_for_probabilities() -> None:
    assert {cls.name for cls in LOSSES} >= set(NO_PROBABILITIES)
