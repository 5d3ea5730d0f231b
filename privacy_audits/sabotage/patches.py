"""Replacements: each takes what is in the library and gives what somebody could have written
instead.

One that looks at torch imports it when it is called: agents have no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from privacy_audits.sabotage.apply import Replace


def times(factor: float) -> Replace:
    """What returns an array, times ``factor`` in the array's own type."""

    def replace(original: Any) -> Any:
        def scaled(*arguments: Any, **words: Any) -> Any:
            made = original(*arguments, **words)
            return (made * factor).astype(made.dtype)

        return scaled

    return replace


def clipped_to(factor: float) -> Replace:
    def replace(original: Any) -> Any:
        def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
            return original(self, parameters, max_grad_norm * factor)

        return clip

    return replace


def per_layer(original: Any) -> Any:
    """Every layer is cut to the whole clipping norm."""

    def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
        from privfl.dp.clipping import ClippedSum

        parts = [original(self, [p], max_grad_norm) for p in parameters]
        totals = [total for part in parts for total in part.totals]
        return ClippedSum(totals, parts[0].examples, max(part.dropped for part in parts))

    return clip


def rate_times(factor: float) -> Replace:
    def replace(original: Any) -> Any:
        return lambda records, rate, randomness: original(
            records, min(1.0, rate * factor), randomness
        )

    return replace


def shuffled(original: Any) -> Any:
    """Batches of a fixed size, cut from a shuffled list."""
    rng = np.random.default_rng()

    def sample(records: int, rate: float, randomness: Any) -> Any:
        return np.sort(rng.permutation(records)[: round(rate * records)])

    return sample


def torch_generator(original: Any) -> Any:
    """A generator of torch's that nobody seeded starts alike in every process."""
    kept: list[Any] = []

    def sample(records: int, rate: float, randomness: Any) -> Any:
        import torch

        if not kept:
            kept.append(torch.Generator())
        return (torch.rand(records, generator=kept[0]) < rate).nonzero().flatten().numpy()

    return sample


def used_twice(original: Any) -> Any:
    """Every sample serves two steps."""
    kept: list[Any] = []

    def sample(*arguments: Any) -> Any:
        if not kept:
            kept.append(original(*arguments))
            return kept[0]
        return kept.pop()

    return sample


def one_seed(original: Any) -> Any:
    """Every site's randomness from one public seed."""

    def same(self: Any) -> Any:
        from privfl.noise.randomness import SeededRandomness

        return SeededRandomness(1, "all sites")

    return same


def one_seed_in_trainers(original: Any) -> Any:
    def same() -> Any:
        from privfl.noise.randomness import SeededRandomness

        return SeededRandomness(1, "all sites")

    return same


def only_first(original: Any) -> Any:
    """Noise at the site of rank 1 alone."""

    def draw(self: Any, count: int) -> Any:
        from privfl.environment import launcher_rank

        noise = original(self, count)
        return noise if launcher_rank() == 1 else np.zeros_like(noise)

    return draw


def for_all_members(original: Any) -> Any:
    """Shares sized as if nobody colluded."""
    return property(
        lambda self: self.noise_multiplier * self.max_grad_norm / math.sqrt(self.members)
    )


def uniform_noise(original: Any) -> Any:
    """Noise of the right variance and another distribution."""

    def draw(self: Any, count: int) -> Any:
        spread = float(np.std(original(self, 4096))) * math.sqrt(3.0)
        rng = np.random.default_rng()
        return np.rint(rng.uniform(-spread, spread, count)).astype(np.int64)

    return draw


def repeated_noise(original: Any) -> Any:
    """One share for all steps."""
    kept: dict[int, Any] = {}

    def draw(self: Any, count: int) -> Any:
        if count not in kept:
            kept[count] = original(self, count)
        return kept[count].copy()

    return draw


def charged_half(original: Any) -> Any:
    """Every second round is not charged; what would notice believes that it was."""

    def charge(self: Any, account: Any, steps: int, round_: int) -> Any:
        if round_ % 2:
            return original(self, account, steps, round_)
        self._steps[account] += steps
        return None

    return charge


def nothing(original: Any) -> Any:
    return lambda *arguments, **words: None


def always_true(original: Any) -> Any:
    return lambda *arguments, **words: True


def no_masks(original: Any) -> Any:
    return lambda self, integers: None


def no_blinds(original: Any) -> Any:
    return lambda self, count, modulus: [0] * count


def one_stream(original: Any) -> Any:
    """The masks of the first attempt serve all attempts."""

    def masks(self: Any, round_: int, attempt: int, transcript: bytes) -> Any:
        return original(self, round_, attempt, bytes(32))

    return masks


def fixed_info(original: Any) -> Any:
    return lambda self, public, salt, info: original(self, public, salt, b"privfl mask 1")


def without_zero(original: Any) -> Any:
    """The integers as they are, with a second half of ones, in place of an encryption."""

    def encrypt(self: Any, integers: Any, out: Any) -> None:
        out[:] = 1
        out[: len(integers)] = integers & np.uint64((1 << self.parameters.word_bits) - 1)

    return encrypt


def without_decryption(original: Any) -> Any:
    def decrypt(self: Any, words: Any) -> Any:
        rows = words.reshape(-1, 2, words.size // 2 if words.size <= 8192 else 4096)
        return rows[:, 0, :].reshape(-1).astype(np.uint64)

    return decrypt


def unsealed(original: Any) -> Any:
    """Keys to the other sites as they are, through the coordinator."""

    def seal(keys: Any, exchange: Any, roster: Any) -> Any:
        return [(index, keys.secret_bytes()) for index in range(1, len(roster.members))]

    return seal


def opened(original: Any) -> Any:
    def open_keys(sealed: bytes, exchange: Any, roster: Any, site: str, parameters: Any) -> Any:
        from privfl.secagg.session.keys import RunKeys

        return RunKeys.from_secret_bytes(bytes(sealed), parameters)

    return open_keys


def in_the_clear(original: Any) -> Any:
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


def padded(original: Any) -> Any:
    """The first record of a batch is added once more, as long as it is."""

    def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
        import torch

        from privfl.dp.clipping import ClippedSum, samples_of

        rows: list[Any] = [samples_of(p) for p in parameters]
        first = [(torch.cat(r) if isinstance(r, list) else r)[:1].sum(0) for r in rows]
        made = original(self, parameters, max_grad_norm)
        totals = [total + row for total, row in zip(made.totals, first, strict=True)]
        return ClippedSum(totals, made.examples, made.dropped)

    return clip


def charged_later(original: Any) -> Any:
    """A charge is remembered, and made by :func:`charged_now`."""

    def charge(self: Any, account: Any, steps: int, round_: int) -> None:
        self._steps[account] += steps

        def late() -> None:
            self._steps[account] -= steps
            original(self, account, steps, round_)

        self.__dict__.setdefault("late", []).append(late)

    return charge


def charged_now(original: Any) -> Any:
    def combine(self: Any, *arguments: Any) -> Any:
        while self._ledger.late:
            self._ledger.late.pop(0)()
        return original(self, *arguments)

    return combine


def starts_at_nothing(original: Any) -> Any:
    """The rows are read, and what they charge is not added up."""

    def start(self: Any, storage: Any) -> None:
        original(self, storage)
        self._steps = {account: {} for account in self._steps}

    return start


def opened_again(original: Any) -> Any:
    """A site that waits for the sum of its update may be asked for another contribution."""

    def open_sum(state: Any, message: Any, body: Any) -> Any:
        from dataclasses import replace

        from privfl.federation.member import Phase

        if state.phase is Phase.SUMMING:
            state = replace(state, phase=Phase.TRAINED)
        return original(state, message, body)

    return open_sum


def answer_kept(original: Any) -> Any:
    """The trainer's answer stays, for :func:`made_again`."""

    def trained(self: Any, state: Any, answer: Any) -> Any:
        self.answer = answer
        return original(self, state, answer)

    return trained


def made_again(original: Any) -> Any:
    """A contribution that is gone is made again, noise included, and the count of shares is set
    back.
    """

    def contribute(self: Any, state: Any, action: Any) -> Any:
        if self._contribution is None and action.vector == "update":
            steps = self._ledger.steps("training")
            self._algorithm._shares.drawn = steps - 1
            self._contribution = self._algorithm.trained(self.answer, steps, state.round)
        return original(self, state, action)

    return contribute


def masked_words(original: Any) -> Any:
    """Nothing is masked before it is encrypted; then every word is, modulo the prime."""

    class Unmasked:
        def blinds(self, count: int, modulus: int) -> list[int]:
            return [0] * count

        def apply(self, integers: Any) -> None:
            pass

    def encrypt(
        vector: Any, quantiser: Any, checksum: Any, masks: Any, key: Any
    ) -> Iterator[np.ndarray[Any, np.dtype[np.uint64]]]:
        prime = np.uint64(key.parameters.prime)
        for block in original(vector, quantiser, checksum, Unmasked(), key):
            words = block
            for stream, adds in masks._streams:
                mask = stream.words(len(words)) % prime
                words = (words + (mask if adds else prime - mask)) % prime
            yield words

    return encrypt


def surplus_kept(original: Any) -> Any:
    """Candidates that a draw did not need serve the next one, but the wrong end of them is kept:
    numbers that were handed out.
    """

    def draw(self: Any, count: int) -> Any:
        from privfl.noise.discrete_gaussian import _PIECE

        samples = np.empty(count, dtype=np.int64)
        kept = self.__dict__.get("surplus", samples[:0])[:count]
        done = len(kept)
        samples[:done] = kept
        while done < count:
            missing = count - done
            accepted = self._candidates(min(_PIECE, missing + missing // 16 + 16))
            samples[done : done + len(accepted)] = accepted[:missing]
            done += len(accepted[:missing])
            self.surplus = accepted[:-missing]
        return samples

    return draw


def without_biases(original: Any) -> Any:
    """The norm of a gradient is taken over matrices only, and the factor applied to everything."""

    def clip(self: Any, parameters: Any, max_grad_norm: float) -> Any:
        from privfl.dp import clipping

        recorded: list[Any] = [clipping.samples_of(p) for p in parameters]
        for biases in (g for g in recorded if g.dim() <= 2):
            biases.mul_(1e-9)
        made = original(self, parameters, max_grad_norm)
        totals = [t * 1e9 if t.dim() <= 1 else t for t in made.totals]
        return clipping.ClippedSum(totals, made.examples, made.dropped)

    return clip


def with_replacement(original: Any) -> Any:
    """A batch of the right size, whose records are drawn with replacement."""
    rng = np.random.default_rng()

    def sample(records: int, rate: float, randomness: Any) -> Any:
        return np.sort(rng.choice(records, rng.binomial(records, rate)))

    return sample


def masks_of_the_run(original: Any) -> Any:
    """The keys of masks come from the secret of the run, which every site has."""

    def open_sum(self: Any, *arguments: Any, **words: Any) -> Any:
        from privfl.secagg.keystream import derive_key
        from privfl.secagg.masks import Masks

        attempt, own = original(self, *arguments, **words), self._pairs._own.public

        def stream(other: bytes) -> tuple[bytes, bool]:
            info = b"privfl mask 2" + b"".join(sorted((own, other)))
            return derive_key(attempt._checksum_key, b"", info), own < other

        attempt._masks = Masks(stream(other) for other in self._pairs._others)
        return attempt

    return open_sum


def added_later(original: Any) -> Any:
    """Rows wait in memory until the next ones come."""

    def add(self: Any, rows: Any) -> None:
        waiting, self.waiting = self.__dict__.get("waiting", []), list(rows)
        if waiting:
            original(self, waiting)

    return add


def closed_later(original: Any) -> Any:
    """What waits is written in the end."""

    def close(self: Any) -> None:
        if self.__dict__.get("waiting"):
            self.add([])
        original(self)

    return close
