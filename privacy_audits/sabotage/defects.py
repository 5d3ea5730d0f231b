"""The defects: faults that somebody could make, or has made, in code like this.

A patch that looks at torch imports it when it is called: agents have no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from privacy_audits.sabotage.apply import Defect, Patch
from privfl.errors import PrivflError, did_you_mean

_DRAW = "privfl.noise.discrete_gaussian.DiscreteGaussian.draw"
_GAUSSIAN = "privfl.dp.optimizer.gaussian"
_SAMPLE = "privfl.dp.training.poisson_sample"
_CLIP = "privfl.dp.clipping.ExampleClipper.clip"


def _times(factor: float) -> Callable[[Any], Any]:
    """What returns an array, times ``factor`` in the array's own type."""

    def replace(original: Any) -> Any:
        def scaled(*arguments: Any, **words: Any) -> Any:
            made = original(*arguments, **words)
            return (made * factor).astype(made.dtype)

        return scaled

    return replace


def _clipped_to(factor: float) -> Callable[[Any], Any]:
    def replace(original: Any) -> Any:
        def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
            return original(self, parameters, max_grad_norm * factor)

        return clip

    return replace


def _per_layer(original: Any) -> Any:
    """Every layer is cut to the whole clipping norm."""

    def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
        from privfl.dp.clipping import ClippedSum

        parts = [original(self, [p], max_grad_norm) for p in parameters]
        totals = [total for part in parts for total in part.totals]
        return ClippedSum(totals, parts[0].examples, max(part.dropped for part in parts))

    return clip


def _rate_times(factor: float) -> Callable[[Any], Any]:
    def replace(original: Any) -> Any:
        return lambda records, rate, randomness: original(
            records, min(1.0, rate * factor), randomness
        )

    return replace


def _shuffled(original: Any) -> Any:
    """Batches of a fixed size, cut from a shuffled list."""
    rng = np.random.default_rng()

    def sample(records: int, rate: float, randomness: Any) -> Any:
        return np.sort(rng.permutation(records)[: round(rate * records)])

    return sample


def _torch_generator(original: Any) -> Any:
    """A generator of torch's that nobody seeded starts alike in every process."""
    kept: list[Any] = []

    def sample(records: int, rate: float, randomness: Any) -> Any:
        import torch

        if not kept:
            kept.append(torch.Generator())
        return (torch.rand(records, generator=kept[0]) < rate).nonzero().flatten().numpy()

    return sample


def _used_twice(original: Any) -> Any:
    """Every sample serves two steps."""
    kept: list[Any] = []

    def sample(*arguments: Any) -> Any:
        if not kept:
            kept.append(original(*arguments))
            return kept[0]
        return kept.pop()

    return sample


def _one_seed(original: Any) -> Any:
    """Every site's randomness from one public seed."""

    def same(self: Any) -> Any:
        from privfl.noise.randomness import SeededRandomness

        return SeededRandomness(1, "all sites")

    return same


def _one_seed_in_trainers(original: Any) -> Any:
    def same() -> Any:
        from privfl.noise.randomness import SeededRandomness

        return SeededRandomness(1, "all sites")

    return same


def _only_first(original: Any) -> Any:
    """Noise at the site of rank 1 alone."""

    def draw(self: Any, count: int) -> Any:
        from privfl.environment import launcher_rank

        noise = original(self, count)
        return noise if launcher_rank() == 1 else np.zeros_like(noise)

    return draw


def _for_all_members(original: Any) -> Any:
    """Shares sized as if nobody colluded."""
    return property(
        lambda self: self.noise_multiplier * self.max_grad_norm / math.sqrt(self.members)
    )


def _uniform_noise(original: Any) -> Any:
    """Noise of the right variance and another distribution."""

    def draw(self: Any, count: int) -> Any:
        spread = float(np.std(original(self, 4096))) * math.sqrt(3.0)
        rng = np.random.default_rng()
        return np.rint(rng.uniform(-spread, spread, count)).astype(np.int64)

    return draw


def _repeated_noise(original: Any) -> Any:
    """One share for all steps."""
    kept: dict[int, Any] = {}

    def draw(self: Any, count: int) -> Any:
        if count not in kept:
            kept[count] = original(self, count)
        return kept[count].copy()

    return draw


def _charged_half(original: Any) -> Any:
    """Every second round is not charged; what would notice believes that it was."""

    def charge(self: Any, account: Any, steps: int, round_: int) -> Any:
        if round_ % 2:
            return original(self, account, steps, round_)
        self._steps[account] += steps
        return None

    return charge


def _nothing(original: Any) -> Any:
    return lambda *arguments, **words: None


def _true(original: Any) -> Any:
    return lambda *arguments, **words: True


def _no_masks(original: Any) -> Any:
    return lambda self, integers: None


def _no_blinds(original: Any) -> Any:
    return lambda self, count, modulus: [0] * count


def _one_stream(original: Any) -> Any:
    """The masks of the first attempt serve all attempts."""

    def masks(self: Any, round_: int, attempt: int, transcript: bytes) -> Any:
        return original(self, round_, attempt, bytes(32))

    return masks


def _fixed_info(original: Any) -> Any:
    return lambda self, public, salt, info: original(self, public, salt, b"privfl mask 1")


def _without_zero(original: Any) -> Any:
    """The integers as they are, with a second half of ones, in place of an encryption."""

    def encrypt(self: Any, integers: Any, out: Any) -> None:
        out[:] = 1
        out[: len(integers)] = integers & np.uint64((1 << self.parameters.word_bits) - 1)

    return encrypt


def _without_decryption(original: Any) -> Any:
    def decrypt(self: Any, words: Any) -> Any:
        rows = words.reshape(-1, 2, words.size // 2 if words.size <= 8192 else 4096)
        return rows[:, 0, :].reshape(-1).astype(np.uint64)

    return decrypt


def _unsealed(original: Any) -> Any:
    """Keys to the other sites as they are, through the coordinator."""

    def seal(keys: Any, exchange: Any, roster: Any) -> Any:
        return [(index, keys.secret_bytes()) for index in range(1, len(roster.members))]

    return seal


def _opened(original: Any) -> Any:
    def open_keys(sealed: bytes, exchange: Any, roster: Any, site: str, parameters: Any) -> Any:
        from privfl.secagg.session.keys import RunKeys

        return RunKeys.from_secret_bytes(bytes(sealed), parameters)

    return open_keys


def _in_the_clear(original: Any) -> Any:
    """The sealed range also carries the update, for debugging."""

    def trained(self: Any, state: Any, answer: Any) -> Any:
        body = original(self, state, answer)
        vector = (
            self._contribution._update
            if hasattr(self._contribution, "_update")
            else (self._contribution._total)
        )
        return body.model_copy(
            update={"sealed_range": body.sealed_range + vector[:64].tobytes().hex()}
        )

    return trained


def _agent(target: str, replace: Callable[[Any], Any]) -> Patch:
    return Patch("agent", target, replace)


def _trainer(target: str, replace: Callable[[Any], Any]) -> Patch:
    return Patch("trainer", target, replace)


_NO_PROBE = _agent("privfl.site.agent.prove", _true)

DEFECTS = (
    Defect(
        "noise-forgotten",
        "The sums carry no noise at all.",
        ("conformance", "canaries"),
        "fedsgd",
        (_agent(_DRAW, _times(0.0)),),
    ),
    Defect(
        "noise-forgotten-fedavg",
        "The steps of a site carry no noise at all.",
        ("conformance", "canaries"),
        "fedavg",
        (_trainer(_GAUSSIAN, _times(0.0)),),
    ),
    Defect(
        "noise-halved",
        "The noise has half the deviation that is charged.",
        ("conformance", "canaries"),
        "fedsgd",
        (_agent(_DRAW, _times(0.5)),),
        chance=True,
    ),
    Defect(
        "noise-halved-fedavg",
        "The noise has half the deviation that is charged.",
        ("conformance",),
        "fedavg",
        (_trainer(_GAUSSIAN, _times(0.5)),),
        chance=True,
    ),
    Defect(
        "shares-for-all",
        "Shares are sized 1 / sqrt(n) instead of 1 / sqrt(n - t): colluders leave too little.",
        ("conformance",),
        "fedsgd",
        (_agent("privfl.noise.distributed.DistributedNoise.share_deviation", _for_all_members),),
        chance=True,
    ),
    Defect(
        "same-seed",
        "All sites draw the same noise, so that each can subtract the others'.",
        ("conformance",),
        "fedsgd",
        (_agent("privfl.site.setup.SiteSetup.randomness", _one_seed),),
    ),
    Defect(
        "same-seed-fedavg",
        "All trainers draw the same noise and samples.",
        ("conformance",),
        "fedavg",
        (_trainer("privfl.noise.randomness.SystemRandomness", _one_seed_in_trainers),),
    ),
    Defect(
        "torch-generator",
        "Samples come from a torch.Generator that nobody seeded: all sites choose alike.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, _torch_generator),),
    ),
    Defect(
        "noise-at-one-site",
        "Only one site adds noise, and that site can subtract it.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, _only_first),),
    ),
    Defect(
        "noise-uniform",
        "The noise has the right variance and is not Gaussian.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, _uniform_noise),),
        chance=True,
    ),
    Defect(
        "noise-repeated",
        "Every step gets the same noise, which two sums subtract.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, _repeated_noise),),
    ),
    Defect(
        "clipping-off",
        "A record changes a sum by as much as its gradient is long.",
        ("conformance", "canaries"),
        "fedsgd",
        (_trainer(_CLIP, _clipped_to(1e9)),),
    ),
    Defect(
        "clip-times-ten",
        "Gradients are cut to ten times the clipping norm.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, _clipped_to(10.0)),),
    ),
    Defect(
        "clip-times-ten-fedavg",
        "Gradients are cut to ten times the clipping norm.",
        ("conformance",),
        "fedavg",
        (_trainer(_CLIP, _clipped_to(10.0)),),
    ),
    Defect(
        "clip-per-layer",
        "Every layer is cut to the whole clipping norm, so two layers make sqrt(2) of it.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, _per_layer),),
    ),
    Defect(
        "rate-times-four",
        "Records take part four times as often as is charged.",
        ("conformance", "canaries"),
        "fedsgd",
        (_trainer(_SAMPLE, _rate_times(4.0)),),
        chance=True,
    ),
    Defect(
        "shuffled-batches",
        "Batches of a fixed size are charged as Poisson samples.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, _shuffled),),
    ),
    Defect(
        "batch-twice",
        "One sample serves two steps.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, _used_twice),),
    ),
    Defect(
        "rounds-uncharged",
        "Every second round is released without a charge.",
        ("conformance",),
        "fedsgd",
        (
            _agent("privfl.site.run_ledger.RunLedger._charge", _charged_half),
            _agent("privfl.site.run_ledger.RunLedger.check_release", _nothing),
        ),
    ),
    Defect(
        "masks-off",
        "Contributions are encrypted and not masked: a site's key opens each alone.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.masks.Masks.apply", _no_masks),
            _agent("privfl.secagg.masks.Masks.blinds", _no_blinds),
            _NO_PROBE,
        ),
    ),
    Defect(
        "masks-reused",
        "The same masks serve every round: two contributions reveal their difference.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.masks.Pairs.masks", _one_stream),
            _agent("privfl.secagg.key_exchange.ExchangeKey.pair_key", _fixed_info),
        ),
    ),
    Defect(
        "encryption-off",
        "The configuration says encrypted, and the integers travel masked only.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.ckks.SumKey.encrypt", _without_zero),
            _agent("privfl.secagg.ckks.SumKey.decrypt", _without_decryption),
            _NO_PROBE,
        ),
    ),
    Defect(
        "key-to-coordinator",
        "The key travels to the other sites in the clear, through the coordinator.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.session.handshake.seal_keys", _unsealed),
            _agent("privfl.secagg.session.handshake.open_keys", _opened),
        ),
    ),
    Defect(
        "sum-in-a-message",
        "A site's sum of gradients travels in a message, for debugging.",
        ("transcript",),
        "fedsgd",
        (_agent("privfl.site.active_run.ActiveRun._trained", _in_the_clear),),
    ),
)
_BY_NAME = {defect.name: defect for defect in DEFECTS}


def named(name: str) -> Defect:
    """The defect of this name.

    Raises:
        PrivflError: If there is none.
    """
    if name not in _BY_NAME:
        raise PrivflError(f"there is no defect {name!r}{did_you_mean(name, list(_BY_NAME))}")
    return _BY_NAME[name]
