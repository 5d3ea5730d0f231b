"""Can a picture be read back from what each party sees? (Zhu, Liu, Han 2019, arXiv:1906.08935.)

The attack on a first layer is exact and needs no optimisation: the gradient of a weight is the
gradient of its bias times the input, so a quotient of the two gives the input (Phong et al. 2018).
It is tried on what the parties of a federation see: a plain update, the plain sum of four sites
without noise, a site's update as privfl makes it, and the words of its contribution on the wire.
"""

from __future__ import annotations

import base64
import io
import math
import os
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from privacy_audits.levels import LEVEL
from privacy_audits.result import AuditResult, Claim, Picture, Statistic
from privacy_audits.targets import training
from privfl.accounting import Adversary, PoissonGaussian, adversaries
from privfl.secagg import Checksum, ExchangeKey, FixedPoint, SumKey, derive
from privfl.secagg.codec import encrypt
from privfl.secagg.masks import Pairs
from privfl.secagg.parameters import usual_value_bits

Image = NDArray[np.float64]

SIDE, HIDDEN, CLASSES, SITES, TRIED = 8, 64, 10, 4, 40
CLIP, SIGMA, DELTA = 1.0, 2.0, 1e-5
# A picture of which this much comes back is the picture, in decibels.
RECOVERED = 30.0


def _pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits between 0 and 1, and which they are; shapes (count, 64) and (count,)."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rows = np.random.default_rng().permutation(len(digits))[:count]
    return torch.from_numpy(images[rows]).float() / 16, torch.from_numpy(digits[rows])


def _update(images: torch.Tensor, digits: torch.Tensor, sigma: float, clip: float) -> Image:
    """What one step of a site on these pictures changes in the model; shape (parameters,)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the model is public; noise never comes from torch
        model = nn.Sequential(nn.Linear(SIDE**2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))
    local = training.local(
        model,
        nn.functional.cross_entropy,
        TensorDataset(images, digits),
        sampling_rate=1.0,
        noise_multiplier=sigma,
        max_grad_norm=clip,
        steps=1,
        lr=1.0,
    )
    update: Image = training.updates(local, 1)[0]
    return update


def invert(update: Image) -> Image:
    """The picture that the first layer's gradients give; shape (64,).

    Of all hidden units the one whose bias has moved most is taken.
    """
    weights = update[: HIDDEN * SIDE**2].reshape(HIDDEN, SIDE**2)
    biases = update[HIDDEN * SIDE**2 : HIDDEN * SIDE**2 + HIDDEN]
    unit = int(np.argmax(np.abs(biases)))
    if biases[unit] == 0.0:
        return np.zeros(SIDE**2)
    picture: Image = np.clip(weights[unit] / biases[unit], 0.0, 1.0)
    return picture


def psnr(picture: Image, other: Image) -> float:
    """The peak signal-to-noise ratio of pictures between 0 and 1, in decibels; 100 at most."""
    error = float(np.square(picture - other).mean())
    return 100.0 if error < 1e-10 else -10.0 * math.log10(error)


def _on_the_wire(update: Image) -> Image:
    """The words of a contribution with this update, read as numbers between -1 and 1."""
    parameters = derive(SITES, usual_value_bits(SITES))
    members = [ExchangeKey() for _ in range(SITES)]
    blocks = encrypt(
        update,
        FixedPoint(parameters, float(np.abs(update).max()), "nearest"),
        Checksum(os.urandom(32), parameters),
        Pairs(members[0], [member.public for member in members]).masks(1, 1, os.urandom(32)),
        SumKey(parameters),
    )
    words = np.concatenate(list(blocks)) / parameters.prime
    return 2.0 * words[: len(update)] - 1.0


def results() -> Iterator[AuditResult]:
    """One result for each thing that a party sees."""
    images, digits = _pictures(TRIED * SITES)
    mean = images.numpy().mean(axis=0)
    truth = images.numpy()[:TRIED].astype(np.float64)
    by_mean = float(np.mean([psnr(image, mean) for image in truth]))
    plain, summed, ours, wire = [], [], [], []
    began = time.perf_counter()
    for site in range(TRIED):
        of_sites = [site + TRIED * other for other in range(SITES)]
        every = [
            _update(
                images[row : row + 1],
                digits[row : row + 1],
                training.NO_NOISE,
                training.NO_CLIPPING,
            )
            for row in of_sites
        ]
        own = _update(images[site : site + 1], digits[site : site + 1], SIGMA, CLIP)
        plain.append(invert(every[0]))
        summed.append(invert(np.sum(every, axis=0)))
        ours.append(invert(own))
        wire.append(invert(_on_the_wire(own)))
    seconds = time.perf_counter() - began
    event = PoissonGaussian(sampling_rate=1.0, noise_multiplier=SIGMA)
    last = adversaries("site", SITES)[-1]
    coordinator = Adversary("the coordinator", 0, SITES, 1.0, "every message that reaches rank 0")
    control = float(np.mean([psnr(a, b) for a, b in zip(plain, truth, strict=True)]))
    able = 1.0 if control > RECOVERED else 0.0
    rows = [
        ("record", truth),
        ("from a plain update", np.stack(plain)),
        ("from a plain sum of 4 sites", np.stack(summed)),
        ("from an update as privfl makes it", np.stack(ours)),
        ("from a contribution on the wire", np.stack(wire)),
    ]
    for what, seen, claim in (
        (
            "an update as privfl makes it",
            ours,
            Claim(
                statement="A site's update shows no record better than the mean of all records.",
                adversary=last,
                mechanism=(event,),
                delta=DELTA,
            ),
        ),
        (
            "a contribution on the wire",
            wire,
            Claim(
                statement="The coordinator reads no record from what reaches it.",
                adversary=coordinator,
            ),
        ),
    ):
        reached = float(np.mean([psnr(a, b) for a, b in zip(seen, truth, strict=True)]))
        yield AuditResult(
            name=f"inversion/{what}",
            claim=claim,
            attack=f"reads {TRIED} pictures back from {what}, by the quotient of a first layer's "
            f"gradients, which gives a plain update's back at {control:.0f} dB",
            statistic=Statistic.exact(
                "recovered, in dB",
                reached,
                f"not above the mean picture's {by_mean:.1f} dB",
                holds=reached <= by_mean,
            ),
            confidence=1.0 - LEVEL,
            power=able,
            power_against="an update that is sent as it is",
            seconds=seconds,
            # One picture, by the last result.
            pictures=(_picture(rows),) if seen is wire else (),
        )
        seconds = 0.0


def _picture(rows: list[tuple[str, Image]]) -> Picture:
    """Eight records, and below each what was read back of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, len(rows) * 1.15), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 8)
    for line, (name, images) in zip(axes, rows, strict=True):
        for place, image in zip(line, images, strict=False):
            place.imshow(image.reshape(SIDE, SIDE), cmap="gray_r", vmin=0, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        line[0].set_title(name, loc="left", fontsize=9)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    caption = "Records, and what was read back: " + "; ".join(name for name, _ in rows[1:]) + "."
    return Picture(caption=caption, png=base64.b64encode(buffer.getvalue()).decode())
