"""Digits, still and before a camera of events: what is in each part, and what a camera reports."""

import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from strop.core.errors import StropError
from strop.tasks.digits import CLUTTERED, EVENTS, PARTS, Camera, Labelled, accuracy, digits, recordings, right

datasets = pytest.importorskip("sklearn.datasets")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_parts_hold_every_image_once_with_its_label():
    source = datasets.load_digits()
    wanted = sorted((x.tobytes(), int(y)) for x, y in zip(source.images / 16, source.target, strict=True))
    parts = {part: digits(part) for part in PARTS}
    assert {part: len(data) for part, data in parts.items()} == {"test": 300, "plan": 300, "train": 1197}
    found = [
        (x.numpy().tobytes(), int(y))
        for data in parts.values()
        for x, y in zip(data.images[:, 0].double(), data.labels, strict=True)
    ]
    assert sorted(found) == wanted
    for data in parts.values():
        assert data.images.shape[1:] == (1, 8, 8) and data.labels.bincount().min() > 0.07 * len(data)


def test_a_missing_library_and_an_unknown_part_are_told(monkeypatch):
    with pytest.raises(StropError, match="no part of the digits is called 'valid'; known: test, plan, train"):
        digits("valid")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StropError, match=r"the digits are scikit-learn's: pip install 'strop\[audit\]'"):
        digits("test")


def test_recordings_are_of_their_parts_images_and_the_seed_says_which():
    camera = EVENTS
    still = digits("test")
    found, again, other = (recordings("test", camera, seed=seed) for seed in (3, 3, 4))
    assert found.images.shape == (1200, camera.steps, 2, camera.size, camera.size) and len(found) >= 1000
    assert torch.equal(found.labels, still.labels.repeat_interleave(4))
    assert torch.equal(found.images, again.images) and not torch.equal(found.images, other.images)
    assert len({x.numpy().tobytes() for x in found.images[:40]}) == 40
    seen = found.images.bool()
    assert torch.equal(seen.to(found.images.dtype), found.images)
    assert not (seen[:, :, 0] & seen[:, :, 1]).any()  # nothing rises and falls at once
    assert 0.02 < found.images.mean() < 0.3


def test_a_field_can_be_larger_and_cluttered():
    still = digits("test").images[:100]
    found = CLUTTERED.record(still, draw())
    assert found.shape == (100, 8, 2, 32, 32) and torch.equal(found, CLUTTERED.record(still, draw()))
    assert 0.02 < found.mean() < 0.3


def test_a_camera_that_does_not_move_reports_nothing():
    still = digits("plan").images[:50]
    assert not Camera(reach=0.0).record(still, draw()).any()
    assert not Camera(threshold=1.0).record(still, draw()).any()


@pytest.mark.parametrize("steps", (3, 6, 8))
def test_the_path_is_a_triangle_that_closes(steps):
    path = Camera(steps=steps, reach=3.0)._path(100, draw())
    assert path.shape == (100, steps + 1, 2) and not path[:, 0].any()
    torch.testing.assert_close(path[:, -1], path[:, 0], rtol=0, atol=1e-6)
    lengths = path.diff(dim=1).norm(dim=-1).sum(1)
    assert lengths.max() <= 9 + 1e-4 and lengths.min() >= (4.5 if steps % 3 == 0 else 3.5)
    if steps % 3 == 0:
        legs = path[:, :: steps // 3].diff(dim=1).norm(dim=-1)
        torch.testing.assert_close(legs, legs[:, :1].expand(-1, 3))


@pytest.mark.parametrize("camera", (EVENTS, Camera(steps=4, size=20, reach=5.0, threshold=0.3, clutter=2)))
def test_reports_are_those_of_a_slow_camera(camera):
    """Pixel by pixel in numpy, with scipy's shifts: only a change on the threshold may turn out otherwise."""
    still = digits("plan").images[:6]
    found = camera.record(still, draw()).bool().numpy()
    source = draw()
    scene, path = camera._scene(still, source).numpy(), camera._path(len(still), source).numpy()
    for n in range(len(still)):
        views = [ndimage.shift(scene[n, 0], (-y, -x), order=1, mode="grid-constant") for x, y in path[n]]
        seen = views[0].copy()
        for t, view in enumerate(views[1:]):
            change = view - seen
            sure = abs(abs(change) - camera.threshold) > 1e-4
            assert np.array_equal(found[n, t, 0][sure], (change > camera.threshold)[sure])
            assert np.array_equal(found[n, t, 1][sure], (change < -camera.threshold)[sure])
            reported = found[n, t].any(0)
            seen[reported] = view[reported]


def test_clutter_hides_no_part_of_the_digit():
    still = digits("plan").images[:40]
    alone = Camera(size=32)._scene(still, draw())
    among = Camera(size=32, clutter=4)._scene(still, draw())
    assert (among >= alone).all() and among.max() <= 1
    assert ((among > alone).flatten(1).sum(1) > 20).all()
    corners = {tuple(map(int, x.nonzero()[0])) for x in alone[:, 0]}
    assert len(corners) > 30  # digits stand anywhere


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"size": 15}, {"clutter": -1}])
def test_cameras_that_cannot_be_are_refused(wrong):
    with pytest.raises(StropError, match="a camera has at least 1 step, 16 pixels"):
        Camera(**wrong)


def test_accuracy_is_the_share_of_right_answers():
    images = torch.eye(10).view(10, 1, 1, 10).repeat(70, 1, 1, 1)
    labels = torch.arange(10).repeat(70)
    labels[:7] = (labels[:7] + 1) % 10
    data = Labelled(images, labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 10, bias=False)).eval()
    nn.init.eye_(model[1].weight)
    assert accuracy(model, data) == pytest.approx(0.99)
    assert right(model, data).tolist() == [False] * 7 + [True] * 693
    with pytest.raises(StropError, match="the model is in training"):
        accuracy(model.train(), data)
