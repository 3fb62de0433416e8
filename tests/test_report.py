"""Pictures: what is drawn and written, and the errors. Whether they are pleasant to look at, no test can tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchlin import LOSSES, LinearHead, absorb_bias, report
from torchlin.heads import Standardization, StandardizedHead


@pytest.fixture(autouse=True)
def headless() -> Iterator[None]:
    with plt.rc_context():
        plt.switch_backend("Agg")
        yield
        plt.close("all")


def own_axes() -> Axes:
    """An Axes that pyplot knows nothing of, as a training run uses."""
    return Figure(figsize=(4, 3)).add_subplot()


def head_of(in_features: int, scores: int, **info: object) -> LinearHead:
    torch.manual_seed(0)
    head = LinearHead(in_features, scores, init="linear")
    head.info = dict(info)
    return head


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def drawn(ax: Axes) -> None:
    """Nothing fails or warns when the figure is really drawn."""
    ax.figure.canvas.draw()


DIGITS = {"class_names": [f"digit {i}" for i in range(10)], "input": {"shape": [1, 8, 8]}}


# Templates.


@pytest.mark.parametrize("given", [False, True])
def test_templates_are_the_rows_of_the_weight(given: bool) -> None:
    head = head_of(64, 10, **DIGITS)
    ax = own_axes() if given else None
    drawn_on = report.plot_templates(head, ax=ax)
    drawn(drawn_on)
    assert ax is None or drawn_on is ax
    assert bool(plt.get_fignums()) != given
    assert texts(drawn_on) == DIGITS["class_names"]
    images = drawn_on.get_images()
    assert len(images) == 10
    for image, row in zip(images, head.weight.detach(), strict=True):
        np.testing.assert_allclose(image.get_array(), row.view(8, 8).numpy())
        low, high = image.get_clim()
        assert low == -high
        assert high == pytest.approx(float(head.weight.detach().abs().max()))
        assert image.get_interpolation() == "nearest"


def test_rgb_templates_are_scaled_around_grey() -> None:
    head = head_of(3 * 32 * 32, 2)
    ax = report.plot_templates(head, ["cat", "dog"], (3, 32, 32))
    drawn(ax)
    for image, row in zip(ax.get_images(), head.weight.detach(), strict=True):
        shown = np.asarray(image.get_array())
        assert shown.shape == (32, 32, 3)
        expected = 0.5 + row.view(3, 32, 32).permute(1, 2, 0) / (2 * row.abs().max())
        np.testing.assert_allclose(shown, expected.numpy(), atol=1e-6)


def test_arguments_come_before_the_info() -> None:
    ax = report.plot_templates(head_of(64, 10, **DIGITS), [str(i) for i in range(10)], (1, 4, 16))
    assert texts(ax) == [str(i) for i in range(10)]
    assert np.asarray(ax.get_images()[0].get_array()).shape == (4, 16)


def test_a_logistic_head_has_one_template_and_says_what_positive_means() -> None:
    ax = report.plot_templates(head_of(64, 1, class_names=["benign", "malignant"], input={"shape": [1, 8, 8]}))
    drawn(ax)
    assert texts(ax) == ["malignant − benign"]
    assert ax.get_title() == "score > 0: malignant"
    assert len(ax.get_images()) == 1


def test_a_table_is_a_heatmap_with_feature_names() -> None:
    features = [f"signal {i}" for i in range(9)]
    head = head_of(9, 3, class_names=["sweet", "sour", "salty"], input={"shape": [9], "feature_names": features})
    ax = report.plot_templates(head)
    drawn(ax)
    np.testing.assert_allclose(ax.get_images()[0].get_array(), head.weight.detach().numpy())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sweet", "sour", "salty"]
    assert [label.get_text() for label in ax.get_xticklabels()] == features
    assert len(texts(ax)) == 27  # small enough for the numbers


@pytest.mark.parametrize(
    ("features", "scores", "shape"), [(2, 1, None), (512, 100, None), (512, 10, (8, 8, 8)), (9, 3, (9,))]
)
def test_what_is_no_image_is_a_heatmap(features: int, scores: int, shape: tuple[int, ...] | None) -> None:
    ax = report.plot_templates(head_of(features, scores), shape=shape, ax=own_axes())
    drawn(ax)
    assert np.asarray(ax.get_images()[0].get_array()).shape == (scores, features)
    assert len(ax.get_yticklabels()) <= 40


@pytest.mark.parametrize(("classes", "shown"), [(100, 100), (130, 100)])
def test_many_classes_are_capped_with_a_note(classes: int, shown: int) -> None:
    names = [f"a class with a long name {i}" for i in range(classes)]
    ax = report.plot_templates(head_of(16, classes), names, (1, 4, 4))
    assert len(ax.get_images()) == len(texts(ax)) == shown
    assert ax.get_title() == ("" if classes == shown else "the first 100 of 130 classes")
    assert max(map(len, texts(ax))) < 20
    assert texts(ax)[0].endswith("…")


def test_a_zero_head_is_drawn_too() -> None:
    drawn(report.plot_templates(LinearHead(12, 2), shape=(3, 2, 2)))
    drawn(report.plot_templates(LinearHead(4, 2), shape=(1, 2, 2)))


def test_a_standardised_head_is_folded_and_an_absorbed_bias_left_out() -> None:
    head = StandardizedHead(4, 2, init="normal")
    head.restandardize(Standardization(torch.rand(4), torch.rand(4) + 0.5))
    shown = report.plot_templates(head, shape=(1, 2, 2)).get_images()
    np.testing.assert_allclose(shown[1].get_array(), head.fold().weight[1].detach().view(2, 2).numpy())
    absorbed = absorb_bias(head_of(4, 2))
    shown = report.plot_templates(absorbed, shape=(1, 2, 2)).get_images()
    np.testing.assert_allclose(shown[1].get_array(), absorbed.weight[1, :-1].detach().view(2, 2).numpy())


@pytest.mark.parametrize(("scores", "names", "expected"), [(10, 9, 10), (1, 3, 2)])
def test_the_number_of_names_is_checked(scores: int, names: int, expected: int) -> None:
    with pytest.raises(ValueError, match=f"{names} class names for a head with {scores} score.*expected {expected}"):
        report.plot_templates(head_of(64, scores), [str(i) for i in range(names)], (1, 8, 8))


def test_the_shape_is_checked() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\) has 192 numbers, the head has in_features=64"):
        report.plot_templates(head_of(64, 10), shape=(3, 8, 8))


# Curves.


def epochs(count: int) -> list[dict[str, object]]:
    """As a CSV logger writes them: training and validation in separate rows, with empty cells."""
    rows: list[dict[str, object]] = []
    for epoch in range(count):
        rows.append({"epoch": epoch, "val_loss": 2 / (epoch + 1), "val_accuracy": 0.5, "train_loss": ""})
        rows.append({"epoch": epoch, "train_loss": 1 / (epoch + 1), "train_accuracy": 0.6, "val_loss": None})
    return rows


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("count", [1, 10, 60])
def test_curves_of_rows(count: int, given: bool) -> None:
    ax = own_axes() if given else None
    drawn_on = report.plot_curves(epochs(count), ax=ax)
    drawn(drawn_on)
    assert ax is None or drawn_on is ax
    lines = {str(line.get_label()): line for line in drawn_on.get_lines()}
    assert lines.keys() == {"train loss", "val loss"}
    np.testing.assert_array_equal(lines["val loss"].get_xdata(), range(count))
    np.testing.assert_allclose(lines["val loss"].get_ydata(), [2 / (i + 1) for i in range(count)])
    left, right = drawn_on.figure.axes
    assert [line.get_label() for line in right.get_lines()] == ["train accuracy", "val accuracy"]
    legend = left.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        "train loss", "val loss", "train accuracy", "val accuracy"
    ]  # fmt: skip
    for tick in left.get_xticks():
        assert tick == round(tick)
    # The legend stands below the lines, not on them.
    assert legend.get_window_extent().y1 < left.get_window_extent().y0


def test_curves_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train_objective,val_accuracy\n0,10,1.5,\n0,10,,0.25\n1,20,1.0,\n1,20,,0.75\n")
    ax = report.plot_curves(path)
    drawn(ax)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [1.5, 1.0])
    np.testing.assert_allclose(ax.figure.axes[1].get_lines()[0].get_ydata(), [0.25, 0.75])


def test_accuracies_alone_need_no_second_axis() -> None:
    ax = report.plot_curves([{"val_accuracy": 0.5}, {"val_accuracy": 0.6}])
    assert len(ax.figure.axes) == 1
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), [0, 1])


@pytest.mark.parametrize("rows", [[], [{"epoch": 0, "lr": 0.1, "val_loss": ""}]])
def test_nothing_to_draw_is_an_error(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match=r"nothing to draw; known columns are train_objective, .*found"):
        report.plot_curves(rows)


# Confusion matrices.


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("classes", [2, 10, 20, 21, 100])
def test_confusion(classes: int, given: bool) -> None:
    matrix = torch.eye(classes, dtype=torch.int64) * 30 + 1
    ax = own_axes() if given else None
    drawn_on = report.plot_confusion(matrix, [f"class {i}" for i in range(classes)], ax=ax)
    drawn(drawn_on)
    assert ax is None or drawn_on is ax
    np.testing.assert_allclose(drawn_on.get_images()[0].get_array(), (matrix / (classes + 30)).numpy(), rtol=1e-6)
    assert (drawn_on.get_xlabel(), drawn_on.get_ylabel()) == ("predicted", "true")
    assert drawn_on.get_title() == f"accuracy {31 / (classes + 30):.1%}"
    assert len(texts(drawn_on)) == (classes**2 if classes <= 20 else 0)
    assert len(drawn_on.get_xticklabels()) <= 25
    bars = drawn_on.child_axes[0]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([31 / (classes + 30)] * classes)


def test_numbers_are_readable_on_both_ends_and_zeros_left_out() -> None:
    ax = report.plot_confusion(np.array([[99, 1], [0, 0]]), ["a", "b"])
    assert {(text.get_text(), text.get_color()) for text in ax.texts} == {("99", "white"), ("1", "black")}
    assert texts(ax.child_axes[0]) == ["99%", "–"]  # the second class has no samples


@pytest.mark.parametrize("shape", [(2, 3), (4,), (0, 0)])
def test_a_confusion_matrix_is_square(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"a confusion matrix is \(k, k\), got shape"):
        report.plot_confusion(torch.zeros(shape), ["a", "b"])


def test_a_confusion_matrix_has_a_name_per_class() -> None:
    with pytest.raises(ValueError, match="3 class names for a confusion matrix of 2 classes"):
        report.plot_confusion(torch.eye(2), ["a", "b", "c"])


# Losses.


@pytest.mark.parametrize("given", [False, True])
def test_losses_against_the_score_difference(given: bool) -> None:
    ax = own_axes() if given else None
    drawn_on = report.plot_losses(ax=ax)
    drawn(drawn_on)
    assert ax is None or drawn_on is ax
    curves = {str(line.get_label()): np.asarray(line.get_xydata()) for line in drawn_on.get_lines()[:3]}
    assert list(curves) == ["perceptron", "hinge", "squared hinge"]
    difference = curves["hinge"][:, 0]
    np.testing.assert_allclose(curves["perceptron"][:, 1], np.maximum(0, -difference), atol=1e-12)
    np.testing.assert_allclose(curves["hinge"][:, 1], np.maximum(0, 1 - difference), atol=1e-12)
    np.testing.assert_allclose(curves["squared hinge"][:, 1], np.maximum(0, 1 - difference) ** 2, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_every_loss_can_be_drawn(loss: type) -> None:
    drawn(report.plot_losses((loss(),)))


def test_an_unknown_loss_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown loss 'svm'.*did you mean 'hinge'"):
        report.plot_losses(("svm",))


# Saving.


@pytest.mark.parametrize("given", [False, True])
def test_save_replaces_the_file_and_closes_nothing(tmp_path: Path, given: bool) -> None:
    path = tmp_path / "losses.png"
    path.write_bytes(b"old")
    ax = report.plot_losses(ax=own_axes() if given else None)
    open_before = plt.get_fignums()
    assert report.save(ax, path) == path
    assert plt.get_fignums() == open_before
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]
    pixels = matplotlib.image.imread(path)
    width, height = ax.figure.get_size_inches()
    assert pixels.shape[1] == pytest.approx(150 * width, rel=0.15)
    assert pixels.shape[0] == pytest.approx(150 * height, rel=0.15)


def test_save_of_an_axes_in_a_subfigure(tmp_path: Path) -> None:
    ax = report.plot_losses(ax=Figure().subfigures(1, 2)[0].add_subplot())
    assert report.save(ax, str(tmp_path / "a.png")).is_file()
