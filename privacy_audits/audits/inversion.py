"""Can a picture be read back from what each party sees? (Zhu, Liu, Han 2019, arXiv:1906.08935.)

Two attacks. The quotient of a first layer's gradients is exact and needs no optimisation: the
gradient of a weight is the gradient of its bias times the input, so the two give the input (Phong
et al. 2018). Deep leakage from gradients (DLG) asks nothing of the layers: it looks for the picture
whose gradient is the one that was seen.

They are tried on what the parties of a federation see: a plain update, the plain sum of four sites
without noise, a site's update as privfl makes it, and the words of its contribution on the wire.
"""

from __future__ import annotations

import base64
import io
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

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
# A plain update's picture comes back in about 25 iterations of L-BFGS.
DLG_TRIED, DLG_ITERATIONS = 8, 50
# A picture of which this much comes back is the picture, in decibels.
RECOVERED = 30.0


def _pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits between 0 and 1, and which they are; shapes (count, 64) and (count,)."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rows = np.random.default_rng().permutation(len(digits))[:count]
    return torch.from_numpy(images[rows]).float() / 16, torch.from_numpy(digits[rows])


def _model(activation: nn.Module) -> nn.Module:
    """The public model that all sites start from, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the model is public; noise never comes from torch
        return nn.Sequential(nn.Linear(SIDE**2, HIDDEN), activation, nn.Linear(HIDDEN, CLASSES))


def _update(
    images: torch.Tensor, digits: torch.Tensor, activation: nn.Module, sigma: float, clip: float
) -> Image:
    """What one step of a site on these pictures changes in the model; shape (parameters,)."""
    local = training.local(
        _model(activation),
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


def dlg(update: Image, clip: float) -> Image:
    """The picture whose gradient explains an update of the sigmoid model best; shape (64,).

    The label is inferred first (iDLG, Zhao et al. 2020, arXiv:2001.02610): of cross-entropy's
    gradients of the last biases only that of the right label is negative. The picture is then
    sought with L-BFGS, from a random one.

    Args:
        update: of one step on one picture; shape (parameters,).
        clip: the clipping norm of the step, which is public.
    """
    seen = -torch.from_numpy(update)
    model = _model(nn.Sigmoid()).double()
    parameters = list(model.parameters())
    digit = seen[-CLASSES:].argmin().unsqueeze(0)
    picture = torch.from_numpy(np.random.default_rng().random((1, SIDE**2))).requires_grad_()
    # The default tolerances end the search before the picture is there.
    search = torch.optim.LBFGS(
        [picture],
        max_iter=DLG_ITERATIONS,
        tolerance_grad=0.0,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def mismatch() -> float:
        search.zero_grad()
        loss = nn.functional.cross_entropy(model(picture), digit)
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        gradient = torch.cat([part.reshape(-1) for part in gradients])
        clipped = gradient * (clip / gradient.norm()).clamp(max=1.0)
        error = (clipped - seen).square().sum() / seen.square().sum()
        error.backward(inputs=[picture])
        return float(error.detach())

    search.step(mismatch)  # type: ignore[no-untyped-call]
    # A search that left the finite numbers has found nothing.
    found: Image = picture.detach()[0].nan_to_num(0.0).clamp(0.0, 1.0).numpy()
    return found


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


@dataclass(frozen=True)
class _ReadBack:
    """What one attack read back from what each party saw.

    Attributes:
        attack: which it was, in a sentence about pictures that are read back.
        plain: from plain updates; shape (pictures, 64), as the others.
        ours: from updates as privfl makes them.
        wire: from the words of contributions.
        seconds: how long it took.
    """

    attack: str
    plain: Image
    ours: Image
    wire: Image
    seconds: float


def _quotient(images: torch.Tensor, digits: torch.Tensor) -> tuple[_ReadBack, Image]:
    """The quotient attack on the first ``TRIED`` pictures, and what it makes of a plain sum of
    sites; that has shape (TRIED, 64).
    """
    began = time.perf_counter()
    plain, summed, ours, wire = [], [], [], []
    for row in range(TRIED):
        updates = [
            _update(
                images[of_site : of_site + 1],
                digits[of_site : of_site + 1],
                nn.ReLU(),
                training.NO_NOISE,
                training.NO_CLIPPING,
            )
            for of_site in range(row, TRIED * SITES, TRIED)
        ]
        own = _update(images[row : row + 1], digits[row : row + 1], nn.ReLU(), SIGMA, CLIP)
        plain.append(invert(updates[0]))
        summed.append(invert(np.sum(updates, axis=0)))
        ours.append(invert(own))
        wire.append(invert(_on_the_wire(own)))
    seconds = time.perf_counter() - began
    attack = "by the quotient of a first layer's gradients"
    return (
        _ReadBack(attack, np.stack(plain), np.stack(ours), np.stack(wire), seconds),
        np.stack(summed),
    )


def _deep_leakage(images: torch.Tensor, digits: torch.Tensor) -> _ReadBack:
    """DLG on the first ``DLG_TRIED`` pictures."""
    began = time.perf_counter()
    plain, ours, wire = [], [], []
    for image, digit in zip(images[:DLG_TRIED, None], digits[:DLG_TRIED, None], strict=True):
        unprotected = _update(image, digit, nn.Sigmoid(), training.NO_NOISE, training.NO_CLIPPING)
        own = _update(image, digit, nn.Sigmoid(), SIGMA, CLIP)
        plain.append(dlg(unprotected, training.NO_CLIPPING))
        ours.append(dlg(own, CLIP))
        wire.append(dlg(_on_the_wire(own), CLIP))
    seconds = time.perf_counter() - began
    attack = "by DLG, the search for a picture with that gradient"
    return _ReadBack(attack, np.stack(plain), np.stack(ours), np.stack(wire), seconds)


def _mean_psnr(pictures: Image, truth: Image) -> float:
    """The mean over pictures of what came back; both of shape (pictures, 64)."""
    return float(np.mean([psnr(a, b) for a, b in zip(pictures, truth, strict=True)]))


def results() -> Iterator[AuditResult]:
    """One result for each attack and each thing that a party sees."""
    images, digits = _pictures(TRIED * SITES)
    records = images.numpy().astype(np.float64)
    quotient, summed = _quotient(images, digits)
    yield from _judged("inversion/", quotient, records, ())
    leakage = _deep_leakage(images, digits)
    rows = [
        ("record", records),
        ("from a plain update", quotient.plain),
        ("from a plain sum of 4 sites", summed),
        ("from an update as privfl makes it", quotient.ours),
        ("from a contribution on the wire", quotient.wire),
        ("from a plain update, by DLG", leakage.plain),
        ("from an update as privfl makes it, by DLG", leakage.ours),
        ("from a contribution on the wire, by DLG", leakage.wire),
    ]
    yield from _judged("inversion/DLG, ", leakage, records, (_picture(rows),))


def _judged(
    name: str, read: _ReadBack, records: Image, pictures: tuple[Picture, ...]
) -> Iterator[AuditResult]:
    """What follows from ``read``; the first records are those that were attacked.

    Args:
        name: of the results, before what was attacked.
        read: what an attack read back.
        records: all records, of which the mean picture is one; shape (records, 64).
        pictures: shown with the last result.
    """
    truth = records[: len(read.plain)]
    by_mean = _mean_psnr(np.broadcast_to(records.mean(axis=0), truth.shape), truth)
    control = _mean_psnr(read.plain, truth)
    event = PoissonGaussian(sampling_rate=1.0, noise_multiplier=SIGMA)
    coordinator = Adversary("the coordinator", 0, SITES, 1.0, "every message that reaches rank 0")
    for what, seen, claim in (
        (
            "an update as privfl makes it",
            read.ours,
            Claim(
                statement="A site's update shows no record better than the mean of all records.",
                adversary=adversaries("site", SITES)[-1],
                mechanism=(event,),
                delta=DELTA,
            ),
        ),
        (
            "a contribution on the wire",
            read.wire,
            Claim(
                statement="The coordinator reads no record from what reaches it.",
                adversary=coordinator,
            ),
        ),
    ):
        reached = _mean_psnr(seen, truth)
        yield AuditResult(
            name=f"{name}{what}",
            claim=claim,
            attack=f"reads {len(truth)} pictures back from {what}, {read.attack}, which gives a "
            f"plain update's back at {control:.0f} dB",
            statistic=Statistic.exact(
                "recovered, in dB",
                reached,
                f"not above the mean picture's {by_mean:.1f} dB",
                holds=reached <= by_mean,
            ),
            confidence=1.0 - LEVEL,
            power=1.0 if control > RECOVERED else 0.0,
            power_against="an update that is sent as it is",
            # Both were attacked together.
            seconds=read.seconds if seen is read.ours else 0.0,
            pictures=pictures if seen is read.wire else (),
        )


def _picture(rows: list[tuple[str, Image]]) -> Picture:
    """Eight records, and below each what was read back of it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, len(rows) * 1.2))
    # By hand: a computed layout makes the first column as wide as the names above it.
    figure.subplots_adjust(0.01, 0.01, 0.99, 1.0 - 0.2 / len(rows), wspace=0.1, hspace=0.3)
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
