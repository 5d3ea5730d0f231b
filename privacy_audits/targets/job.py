"""A recorded run: real ranks under mpiexec, real trainers, real ciphertexts, on the records of
:mod:`privacy_audits.targets.orthogonal`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privacy_audits.targets import orthogonal
from privfl.accounting import Adversary, Event, adversaries, event_from_dict
from privfl.cli.launcher import mpiexec_command
from privfl.errors import PrivflError

Mode = Literal["fedsgd", "fedavg"]

ROUNDS = {"fedsgd": 40, "fedavg": 12}
# Steps of a round under fedavg. Both modes make so many steps that a share of the canaries' power
# is left, and few enough for seconds.
LOCAL_STEPS = {"fedsgd": 1, "fedavg": 4}
SAMPLING_RATE = 0.25
COLLUSION = 1
# A one-run audit can refute no claim above about ln(canaries), and few above 2: the claim is made
# small instead (docs/audits.md).
EPSILON, DELTA = 2.0, 1e-6
LEARNING_RATE = 1.0

_EXPERIMENT = """\
sites: [{sites}]
rounds: {rounds}
algorithm: {mode}
local_steps: {local_steps}
sampling_rate: {rate}
model: privacy_audits.targets.orthogonal:model
data: privacy_audits.targets.orthogonal:data
data_options: {{folder: {folder}}}
loss: privacy_audits.targets.orthogonal:loss
optimizer: {{name: sgd, lr: {lr}}}
privacy: {{{noise}, target_epsilon: {epsilon}, delta: {delta}, max_grad_norm: 1.0}}
"""
_NOISE = {"fedsgd": f"noise: distributed, collusion: {COLLUSION}", "fedavg": "noise: site"}
_SECONDS = 150.0


@dataclass(frozen=True)
class Rank:
    """What one rank observed.

    Attributes:
        facts: its site, exit code, grid and what happened in which order.
        arrays: its vectors by name, one row for each time.
    """

    facts: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def happened(self, what: str) -> list[dict[str, Any]]:
        """All events of one kind, in order."""
        return [event for event in self.facts["happened"] if event["what"] == what]


@dataclass(frozen=True)
class RecordedRun:
    """A finished run, with all that its ranks observed.

    Attributes:
        mode: the experiment's algorithm.
        folder: where it left its files.
        exit_code: of mpiexec.
        screen: what the job printed.
    """

    mode: Mode
    folder: Path
    exit_code: int
    screen: str

    @cached_property
    def ranks(self) -> list[Rank]:
        """The recordings, rank 0 first; empty if a rank left none."""
        paths = [self.folder / f"rank-{rank}.npz" for rank in range(len(orthogonal.SITES) + 1)]
        if not all(path.exists() for path in paths):
            return []
        return [_load(path) for path in paths]

    @property
    def sites(self) -> list[Rank]:
        """The sites' recordings, in the order of the experiment."""
        return self.ranks[1:]

    @property
    def complete(self) -> bool:
        """Whether the run ended well and recorded all of its rounds."""
        return (
            self.exit_code == 0
            and len(self.ranks) == len(orthogonal.SITES) + 1
            and all(len(site.happened("contributed")) == ROUNDS[self.mode] for site in self.sites)
        )

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What site 1 charged to its training records, in order."""
        return tuple(event_from_dict(e["event"]) for e in self.sites[0].happened("charged"))

    @cached_property
    def adversaries(self) -> tuple[Adversary, ...]:
        """The adversaries of the run's report, by the number of colluders."""
        sites = len(orthogonal.SITES)
        if self.mode == "fedsgd":
            return adversaries("distributed", sites, COLLUSION)
        return adversaries("site", sites)

    @cached_property
    def truth(self) -> list[NDArray[np.bool_]]:
        """For every site, which canaries took part; shape (CANARIES,) each."""
        return [orthogonal.truth(self.folder, site) for site in orthogonal.SITES]


def _load(path: Path) -> Rank:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    return Rank(facts, arrays)


def record(mode: Mode, folder: Path, command: tuple[str, ...] = ()) -> RecordedRun:
    """Run the experiment of ``mode`` and record it; some 10 seconds.

    Args:
        mode: the algorithm.
        folder: an existing empty folder for everything that the run leaves.
        command: the module, and its first arguments, that runs each rank in place of
            :mod:`privacy_audits.targets.observed`, whose command line follows.

    Raises:
        PrivflError: If no mpiexec is there, or the run does not end.
    """
    orthogonal.draw_truth(folder, np.random.default_rng(secrets.randbits(128)))
    text = _EXPERIMENT.format(
        sites=", ".join(orthogonal.SITES),
        rounds=ROUNDS[mode],
        mode=mode,
        local_steps=LOCAL_STEPS[mode],
        rate=SAMPLING_RATE,
        folder=json.dumps(str(folder)),
        lr=LEARNING_RATE,
        noise=_NOISE[mode],
        epsilon=EPSILON,
        delta=DELTA,
    )
    (folder / "experiment.yaml").write_text(text, encoding="utf-8")
    module = command or ("privacy_audits.targets.observed",)
    arguments = [*mpiexec_command(len(orthogonal.SITES) + 1), sys.executable, "-m", *module]
    try:
        done = subprocess.run(
            [*arguments, str(folder)],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise PrivflError(f"the audited run did not end within {_SECONDS:g} s") from None
    return RecordedRun(mode, folder, done.returncode, done.stdout + done.stderr)
