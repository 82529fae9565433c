"""Handwritten digits: still images, and what a camera of events sees of them while it moves.

scikit-learn's 1,797 images of 8 x 8, in three parts: no image of one is in another. A camera of events
reports at each pixel where brightness rose or fell since its last report, and nothing else;
as in N-MNIST (Orchard et al. 2015) it moves along three straight legs before a still digit, here drawn anew
for every recording. `clutter` hides the digit in a larger field among pieces of others.

Nothing is stored: the same seed gives the same recording.
"""

from dataclasses import dataclass
from hashlib import blake2b
from math import pi

import torch
from torch import Tensor
from torch.nn import functional as F

from strop.core.errors import StropError, quoted

SIZE, INK, CLASSES = 8, 16, 10
PARTS = {"test": slice(300), "plan": slice(300, 600), "train": slice(600, None)}
"""Images for the last word, for choosing something by, and for training, once they are in order."""
DIGIT = 16
"""Pixels along a digit before a camera."""


@dataclass(frozen=True)
class Labelled:
    """Images and what they show."""

    images: Tensor
    """`[N, 1, 8, 8]` in 0 to 1, or recordings `[N, T, 2, S, S]` of 0 and 1."""
    labels: Tensor
    """`[N]`, int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def repeat(self, times: int) -> "Labelled":
        """Every image `times` times, neighbours."""
        return Labelled(self.images.repeat_interleave(times, 0), self.labels.repeat_interleave(times, 0))


def digits(part: str) -> Labelled:
    """The still images of `train` (1,197), `plan` (300) or `test` (300), in an order by their own hashes.

    Raises StropError where scikit-learn is missing, or for another part.
    """
    if part not in PARTS:
        raise StropError(f"no part of the digits is called {quoted(part)}; known: {', '.join(PARTS)}")
    images, labels = _read()
    order = sorted(range(len(images)), key=lambda i: blake2b(images[i].numpy().tobytes()).digest())
    chosen = order[PARTS[part]]
    return Labelled(images[chosen].unsqueeze(1).float() / INK, labels[chosen])


def _read() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise StropError("the digits are scikit-learn's: pip install 'strop[audit]'") from error
    found = load_digits()
    return torch.from_numpy(found.images).to(torch.uint8), torch.from_numpy(found.target).long()


@dataclass(frozen=True)
class Camera:
    """A camera of events that is moved along a triangle before digits."""

    steps: int = 6
    """T: frames of a recording."""
    size: int = DIGIT
    """S: pixels along a frame, at least a digit's 16; a smaller digit is put anywhere in it."""
    reach: float = 3.0
    """Longest leg in pixels; the shortest is half of it."""
    threshold: float = 0.15
    """Change of brightness, of 1, that a pixel reports."""
    clutter: int = 0
    """Pieces of other digits, half a digit wide, in the same frame."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.size < DIGIT or self.clutter < 0:
            raise StropError(
                f"a camera has at least 1 step, {DIGIT} pixels and 0 pieces of clutter, got "
                f"steps={self.steps!r}, size={self.size!r} and clutter={self.clutter!r}"
            )

    def record(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Recordings `[N, T, 2, S, S]` of images `[N, 1, 8, 8]`, on their device: rising, falling."""
        scene = self._scene(images, draw)
        path = self._path(len(images), draw).to(images.device)
        seen = _moved(scene, path[:, 0])
        frames = []
        for t in range(1, self.steps + 1):
            now = _moved(scene, path[:, t])
            rose, fell = now - seen > self.threshold, seen - now > self.threshold
            seen = torch.where(rose | fell, now, seen)
            frames.append(torch.cat((rose, fell), 1))
        return torch.stack(frames, 1).to(images.dtype)

    def _scene(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """What stands before the camera, `[N, 1, S, S]`."""
        count, piece = len(images), DIGIT // 2
        large = F.interpolate(images, (DIGIT, DIGIT), mode="bilinear")
        scene = images.new_zeros(count, 1, self.size, self.size)
        _paste(scene, large, _places(count, self.size - DIGIT, draw))
        for _ in range(self.clutter):
            others = torch.randint(count, (count,), generator=draw)
            cut = _window(large[others.to(images.device)], piece, _places(count, DIGIT - piece, draw))
            _paste(scene, cut, _places(count, self.size - piece, draw))
        return scene

    def _path(self, count: int, draw: torch.Generator) -> Tensor:
        """Where the camera looks, `[N, T + 1, 2]` in pixels: along three legs, back to the start."""
        turn = 2 * pi * torch.rand(count, 1, generator=draw)
        leg = self.reach * (0.5 + 0.5 * torch.rand(count, 1, generator=draw))
        angles = turn + torch.tensor([0.0, pi / 3])
        corners = torch.zeros(count, 4, 2)
        corners[:, 1:3] = torch.stack((angles.cos(), angles.sin()), -1) * leg.unsqueeze(-1)
        at = 3 * torch.arange(self.steps + 1) / self.steps
        before = at.long().clamp(max=2)
        share = (at - before).view(1, -1, 1)
        return corners[:, before] * (1 - share) + corners[:, before + 1] * share


EVENTS = Camera()
CLUTTERED = Camera(steps=8, size=32, reach=4.0, clutter=4)
"""The same for a large model: a digit anywhere in a field that it must be found in."""


def recordings(part: str, camera: Camera, times: int = 4, seed: int = 0) -> Labelled:
    """Every image of a part recorded `times` times; no recording of one part shows an image of another."""
    still = digits(part).repeat(times)
    draw = torch.Generator().manual_seed(seed)
    return Labelled(camera.record(still.images, draw), still.labels)


def _places(count: int, most: int, draw: torch.Generator) -> Tensor:
    """Top left corners `[N, 2]`, from 0 to `most`."""
    return torch.randint(most + 1, (count, 2), generator=draw)


def _pixels(corners: Tensor, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of squares: of the image `[N, 1, 1]`, row `[N, width, 1]` and column `[N, 1, width]`."""
    along = torch.arange(width, device=device)
    rows, columns = (corners[:, i].to(device).view(-1, 1, 1) for i in (0, 1))
    number = torch.arange(len(corners), device=device).view(-1, 1, 1)
    return number, rows + along.view(1, -1, 1), columns + along.view(1, 1, -1)


def _window(images: Tensor, width: int, corners: Tensor) -> Tensor:
    """A square `[N, 1, width, width]` out of each image."""
    return images[:, 0][_pixels(corners, width, images.device)].unsqueeze(1)


def _paste(scene: Tensor, squares: Tensor, corners: Tensor) -> None:
    """Lay squares over a scene; the brighter of both is seen."""
    at = _pixels(corners, squares.shape[-1], scene.device)
    scene[:, 0][at] = torch.maximum(scene[:, 0][at], squares[:, 0])


def _moved(scene: Tensor, by: Tensor) -> Tensor:
    """The scene with the camera moved by `[N, 2]` pixels, in between bilinear, dark outside."""
    unturned = torch.eye(2, device=scene.device, dtype=scene.dtype).expand(len(scene), 2, 2)
    theta = torch.cat((unturned, (2 * by / scene.shape[-1]).to(scene.dtype).unsqueeze(-1)), -1)
    grid = F.affine_grid(theta, list(scene.shape), align_corners=False)
    return F.grid_sample(scene, grid, mode="bilinear", align_corners=False)


def right(model: torch.nn.Module, data: Labelled, batch: int = 300) -> Tensor:
    """Which answers of a classifier are right, `[N]`, computed where its weights are.

    Raises StropError for a model in training, whose batch norms would read other batches into each answer.
    """
    if model.training:
        raise StropError("the model is in training, where answers depend on the batch: call its eval() first")
    place = next(model.parameters()).device
    with torch.inference_mode():
        answers = [model(images.to(place)).argmax(-1).cpu() for images in data.images.split(batch)]
    return torch.cat(answers) == data.labels


def accuracy(model: torch.nn.Module, data: Labelled) -> float:
    """The share of right answers, 0 to 1."""
    return right(model, data).double().mean().item()
