"""Synthetic transperineal ultrasound images whose landmarks are known exactly.

    python test/phantom.py --output DIR --count N [--seed S]

writes DIR/images/*.png, DIR/masks/*.png (0 background, 1 pubic symphysis, 2 fetal head) and
DIR/cases.csv. No patient is in them: they serve tests, samples and demonstrations.

Echo and attenuation are laid out along the rays of a convex probe, so that shadows fall where a
probe's would. Anatomy is measured in fractions of the image's shorter side, within the ranges of
the training images of PSFHS; the two machines imitate the two in that data set.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

if __name__ == "__main__":  # run as a file: Python then looks into test/, which has a training/ too
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from model.anatomy import Floats, angle_of_progression, implausibilities

RAYS, SAMPLES = 224, 336  # of the simulated probe: lines, and echoes along each
Range = tuple[float, float]


@dataclass(frozen=True)
class Machine:
    """What one machine's pictures look like; lengths are fractions of the image's shorter side."""

    name: str
    opening_deg: Range  # half the sector's angle
    apex: tuple[float, float]  # where the rays meet, above the image
    depths: tuple[float, float]  # distance of the probe's face and of the deepest echo from there
    ps1: tuple[Range, Range]  # x and y
    symphysis_axes: tuple[Range, Range]  # semi-axes
    symphysis_deg: Range  # the way from PS1 to PS2
    head: tuple[Range, Range]  # centre's x and y
    head_axes: tuple[Range, Range]  # semi-axes, the longer first
    black_db: float  # echo shown as black; 0 dB is white
    tissue: float  # amplitude of its echoes
    haze: float  # amplitude that the far field glows with


MACHINES = (
    Machine(
        "A", (25, 37), (0.494, -0.19), (0.247, 1.09),
        ((0.45, 0.57), (0.09, 0.19)), ((0.102, 0.150), (0.055, 0.085)), (152, 178),
        ((0.37, 0.61), (0.50, 0.62)), ((0.27, 0.33), (0.22, 0.28)), -41, 0.06, 0.010,
    ),
    Machine(
        "B", (24, 27), (0.502, -0.24), (0.285, 1.22),
        ((0.51, 0.67), (0.07, 0.19)), ((0.080, 0.125), (0.040, 0.065)), (150, 188),
        ((0.33, 0.57), (0.36, 0.56)), ((0.19, 0.27), (0.14, 0.22)), -44, 0.05, 0.016,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Ellipse:
    """centre (2,), semi-axes (2,), direction of the first axis in degrees from x towards y."""

    centre: Floats
    axes: Floats
    angle_deg: float

    @property
    def frame(self) -> Floats:
        """(2, 2): rows are the unit vectors of the axes."""
        a = np.radians(self.angle_deg)
        return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])

    def to_circle(self, points: Floats) -> Floats:
        """(..., 2) points in the frame in which the ellipse is the unit circle."""
        return np.asarray((points - self.centre) @ self.frame.T / self.axes)

    def from_circle(self, points: Floats) -> Floats:
        """The inverse of `to_circle`."""
        return np.asarray((points * self.axes) @ self.frame + self.centre)

    def distance(self, points: Floats) -> Floats:
        """(...) distance from the outline along the line to the centre; negative inside."""
        radius = np.linalg.norm(self.to_circle(points), axis=-1)
        from_centre = np.linalg.norm(points - self.centre, axis=-1)
        return np.asarray(from_centre * (1 - 1 / np.maximum(radius, 1e-6)))

    def normal(self, points: Floats) -> Floats:
        """(..., 2) unit vectors out of the ellipse."""
        gradient = (self.to_circle(points) / self.axes) @ self.frame
        return np.asarray(gradient / np.linalg.norm(gradient, axis=-1, keepdims=True))


@dataclass(frozen=True)
class Phantom:
    """image (H, W) uint8, mask (H, W) uint8 of 0/1/2, landmarks_px (3, 2): the exact truth."""

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    landmarks_px: Floats
    aop_deg: float
    machine: str


def tangent_point(head: Ellipse, vertex: Floats, away_from: Floats) -> Floats:
    """(2,) where the tangent from the vertex touches the head, on the side away from a point."""
    q = head.to_circle(vertex)
    turned = np.sqrt(q @ q - 1) * np.array([-q[1], q[0]])
    one, other = head.from_circle(np.array([q + turned, q - turned]) / (q @ q))
    axis = head.centre - vertex
    across = np.array([-axis[1], axis[0]])
    return one if (one - vertex) @ across * ((away_from - vertex) @ across) < 0 else other


@dataclass(frozen=True)
class Scene:
    """What is drawn, in fractions of the shorter side: landmarks (3, 2), opening in radians."""

    machine: Machine
    opening: float
    symphysis: Ellipse
    head: Ellipse
    landmarks: Floats


def draw_scene(rng: np.random.Generator) -> Scene:
    """Drawn again until the symphysis lies close above the head, the landmarks in the sector."""
    machine = MACHINES[int(rng.random() < 0.25)]
    turns = np.linspace(0, 2 * np.pi, 64)
    circle = np.column_stack([np.cos(turns), np.sin(turns)])
    while True:
        opening = float(np.radians(rng.uniform(*machine.opening_deg)))
        ps1, axes, centre, head_axes = (
            np.array([rng.uniform(*span) for span in spans])
            for spans in (machine.ps1, machine.symphysis_axes, machine.head, machine.head_axes)
        )
        angle = rng.uniform(*machine.symphysis_deg)
        way = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
        symphysis = Ellipse(ps1 + axes[0] * way, axes, angle)
        head = Ellipse(centre, head_axes, rng.uniform(75, 115))
        if not 0.015 < head.distance(symphysis.from_circle(circle)).min() < 0.09:
            continue
        ps2 = ps1 + 2 * axes[0] * way
        landmarks = np.array([ps1, ps2, tangent_point(head, ps1, ps2)])
        x, y = (landmarks - machine.apex).T
        seen = (np.abs(np.arctan2(x, y)) < opening - 0.02).all()
        if seen and not implausibilities(landmarks * 1000, (1000, 1000)):
            return Scene(machine, opening, symphysis, head, landmarks)


def smooth_noise(rng: np.random.Generator, rays: float, samples: float) -> Floats:
    """(RAYS, SAMPLES) Gaussian noise of unit variance, smoothed by so many rays and samples."""
    noise = rng.standard_normal((RAYS, SAMPLES))
    noise = cv2.GaussianBlur(noise, (0, 0), max(samples, 0.1), sigmaY=rays)
    return np.asarray(noise / noise.std())


def ridge(distance: Floats, width: float) -> Floats:
    """1 on an outline, falling to 0 over the width."""
    return np.asarray(np.exp(-((distance / width) ** 2)))


def tissue_echo(scene: Scene, points: Floats, rng: np.random.Generator) -> Floats:
    """Muscle and fat: layers along the probe's face, brighter near it and on the head's right."""
    x, y = np.moveaxis((points - scene.head.centre) / (0.05, 0.04), -1, 0)
    right, above = 1 / (1 + np.exp(-x)), 1 / (1 + np.exp(y))
    fibres = 0.5 * smooth_noise(rng, 14, 2) + 0.65 * smooth_noise(rng, 16, 12)
    beside = ridge(scene.head.distance(points) - 0.05, rng.uniform(0.06, 0.14))
    base = rng.uniform(0.15, 0.5) + 0.7 * ridge(np.linspace(-0.1, 0.9, SAMPLES), 0.3)
    light = base * (0.35 + 0.65 * np.maximum(right, above)) + rng.uniform(0.4, 2) * right * beside
    return np.asarray(scene.machine.tissue * np.exp(fibres) * light)


def head_echo(rng: np.random.Generator) -> Floats:
    """Inside of the head: dark, with a few bright lines."""
    brain = np.exp(0.8 * smooth_noise(rng, 12, 3) + 0.6 * smooth_noise(rng, 12, 30))
    return rng.uniform(0.006, 0.025) * brain + 0.0006 * np.exp(2.2 * smooth_noise(rng, 8, 2))


def symphysis_echo(scene: Scene, points: Floats, rng: np.random.Generator) -> Floats:
    """Inside of the symphysis: brighter towards its middle."""
    middle = np.exp(-2.5 * np.linalg.norm(scene.symphysis.to_circle(points), axis=-1) ** 2)
    light = rng.uniform(0.03, 0.08) + rng.uniform(0.1, 0.25) * middle
    return np.asarray(light * np.exp(0.9 * smooth_noise(rng, 6, 3)))


def echoes(scene: Scene, points: Floats, beam: Floats, rng: np.random.Generator) -> Floats:
    """(RAYS, SAMPLES) amplitude that comes back from the points (RAYS, SAMPLES, 2).

    The nearer half of the skull and the symphysis cast shadows; rays on the left, and some
    others, have poor contact and fade with depth.
    """
    to_head, to_bone = scene.head.distance(points), scene.symphysis.distance(points)
    echo = np.where(to_head < 0, head_echo(rng), tissue_echo(scene, points, rng))
    echo = np.where(to_bone < 0, symphysis_echo(scene, points, rng), echo)

    facing = np.abs((scene.head.normal(points) * beam).sum(-1)) ** rng.uniform(1.5, 4)
    far = 1 / (1 + np.exp((scene.head.centre[1] - points[..., 1]) / 0.04))
    strength = (1 - far) * rng.uniform(1.2, 2.5) + far * rng.uniform(0.1, 0.9)
    skull = facing * ridge(to_head - 0.004, rng.uniform(0.009, 0.014))
    echo += skull * strength * np.exp(0.7 * smooth_noise(rng, 9, 30))

    echo *= 1 - rng.uniform(0.4, 0.8) * ridge(to_bone - 0.014, 0.012)
    capsule = (scene.symphysis.normal(points) * beam).sum(-1) ** 2 * ridge(to_bone, 0.007)
    echo += rng.uniform(0.1, 0.35) * capsule * np.exp(0.9 * smooth_noise(rng, 7, 9))

    loss = 1.0 + rng.uniform(15, 35) * (1 - far) * facing * ridge(to_head, 0.012)
    loss += rng.uniform(2, 9) * (to_bone < 0)
    contact = smooth_noise(rng, 14, 0)[:, :1] + np.linspace(1.2, -0.6, RAYS)[:, None]
    loss += rng.uniform(0.5, 2.5) * np.clip(contact, 0, None)
    through = np.exp(-np.cumsum(loss, axis=1) / SAMPLES)
    depth = np.linspace(0, 1, SAMPLES)
    return np.asarray(echo * through * (1 + 0.8 * depth) + scene.machine.haze * depth)


def probe_lines(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """(RAYS, SAMPLES) grey values 0..255 along the rays, with speckle, log-compressed."""
    angles = np.linspace(-scene.opening, scene.opening, RAYS)
    beam = np.stack([np.sin(angles), np.cos(angles)], axis=-1)[:, None]
    reach = np.linspace(*scene.machine.depths, SAMPLES)[:, None]
    amplitude = echoes(scene, np.array(scene.machine.apex) + reach * beam, beam, rng)
    speckle = np.mean([smooth_noise(rng, 1.2, 0.7) ** 2 for _ in range(4)], axis=0)
    decibels = 10 * np.log10(np.maximum(amplitude**2 * speckle, 1e-6))
    return np.clip(255 * (1 - decibels / scene.machine.black_db), 0, 255).astype(np.float32)


def phantom(seed: int, width: int = 256, height: int = 256) -> Phantom:
    """One synthetic image; the same seed shows the same scene at every size, centred.

    Landmarks are the exact ones of the ellipses, in px (integer coordinates at pixel centres).
    """
    rng = np.random.default_rng(seed)
    scene = draw_scene(rng)
    lines = probe_lines(scene, rng)

    unit = min(width, height)
    corner = np.array([width - unit, height - unit]) / 2 - 0.5
    rows, columns = np.indices((height, width))
    points = (np.stack([columns, rows], axis=-1) - corner) / unit
    x, y = np.moveaxis(points - scene.machine.apex, -1, 0)
    near, deep = scene.machine.depths
    ray = (np.arctan2(x, y) / scene.opening + 1) / 2 * (RAYS - 1)
    sample = (np.hypot(x, y) - near) / (deep - near) * (SAMPLES - 1)
    image = cv2.remap(lines, np.float32(sample), np.float32(ray), cv2.INTER_LINEAR, borderValue=0)
    mask = np.zeros((height, width), np.uint8)
    mask[scene.head.distance(points) <= 0] = 2
    mask[scene.symphysis.distance(points) <= 0] = 1
    landmarks_px = scene.landmarks * unit + corner
    aop_deg = float(angle_of_progression(landmarks_px))
    return Phantom(np.rint(image).astype(np.uint8), mask, landmarks_px, aop_deg, scene.machine.name)


def main(arguments: list[str] | None = None) -> int:
    """Write a folder of phantoms; returns the exit status."""
    from training.data.case_table import Case, write_cases

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=8, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first image")
    args = parser.parse_args(arguments)
    for folder in ("images", "masks"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    cases = []
    for seed in range(args.seed, args.seed + args.count):
        made, name = phantom(seed), f"phantom-{seed:04d}.png"
        for folder, picture in (("images", made.image), ("masks", made.mask)):
            if not cv2.imwrite(str(args.output / folder / name), picture):
                raise SystemExit(f"{args.output / folder / name} cannot be written")
        cases.append(Case(name, made.landmarks_px, made.aop_deg, device=made.machine))
    write_cases(args.output / "cases.csv", cases)
    print(f"{len(cases)} phantoms written to {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
