"""A recorded run: real ranks under mpiexec, real trainers, real ciphertexts, on the records of
:mod:`privacy_audits.targets.orthogonal`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privacy_audits.targets import orthogonal, truth
from privfl.accounting import Adversary, Event, adversaries, event_from_dict
from privfl.cli.launcher import mpiexec_command
from privfl.config import Experiment, load_experiment
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
privacy: {{{noise}, delta: {delta}, max_grad_norm: 1.0}}
"""
_NOISE = {"fedsgd": f"noise: distributed, collusion: {COLLUSION}", "fedavg": "noise: site"}


@dataclass(frozen=True)
class Launch:
    """What each rank of a recorded run runs.

    Attributes:
        program: a module and its first arguments; the folder, the experiment and its settings
            follow.
        through: a module and its arguments, which runs ``program`` in turn.
        seconds: after how many the run is given up.
    """

    program: tuple[str, ...] = ("privacy_audits.targets.observed",)
    through: tuple[str, ...] = ()
    seconds: float = 150.0

    @property
    def command(self) -> tuple[str, ...]:
        """Both."""
        return (*self.through, *self.program)


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
        experiment: what the sites agreed to do.
        folder: where it left its files.
        exit_code: of mpiexec.
        screen: what the job printed.
    """

    experiment: Experiment
    folder: Path
    exit_code: int
    screen: str

    @property
    def mode(self) -> Mode:
        """The experiment's algorithm."""
        return self.experiment.algorithm

    @cached_property
    def ranks(self) -> list[Rank]:
        """The recordings, rank 0 first; empty if a rank left none."""
        ranks = range(len(self.experiment.sites) + 1)
        paths = [self.folder / f"rank-{rank}.npz" for rank in ranks]
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
        rounds = self.experiment.rounds
        return (
            self.exit_code == 0
            and bool(self.ranks)
            and all(len(site.happened("contributed")) == rounds for site in self.sites)
        )

    @property
    def problem(self) -> str:
        """What the job said when it did not end well, for a sentence."""
        said = [line for line in self.screen.splitlines() if line.startswith("privfl: ")]
        where = said[0].removeprefix("privfl: ") if said else f"see {self.folder}"
        return f"ended with exit code {self.exit_code}: {where}"

    @property
    def ledgers(self) -> list[Path]:
        """The ledgers that the run left."""
        return sorted(self.folder.rglob("*.ledger"))

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """What site 1 charged to its training records, in order."""
        return tuple(
            event_from_dict(e["event"])
            for e in self.sites[0].happened("charged")
            if e["account"] == "training"
        )

    @cached_property
    def adversaries(self) -> tuple[Adversary, ...]:
        """The adversaries of the run's report, by the number of colluders."""
        noise = self.experiment.privacy.noise
        return adversaries(noise, len(self.experiment.sites), self.experiment.collusion)

    @cached_property
    def truth(self) -> list[NDArray[np.bool_]]:
        """For every site, which canaries took part; shape (canaries,) each."""
        return [truth.read(self.folder, site) for site in self.experiment.sites]


def _load(path: Path) -> Rank:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    facts = json.loads(arrays.pop("facts").tobytes())
    return Rank(facts, arrays)


def record(mode: Mode, folder: Path, launch: Launch = Launch()) -> RecordedRun:
    """Run the audits' own experiment and record it; some 10 seconds.

    Args:
        mode: the algorithm.
        folder: an existing empty folder for everything that the run leaves.
        launch: what each rank runs.

    Raises:
        PrivflError: If no mpiexec is there, or the run does not end.
    """
    noise = f"{_NOISE[mode]}, target_epsilon: {EPSILON}"
    return start(write_experiment(mode, folder, ROUNDS[mode], noise), folder, launch)


def write_experiment(mode: Mode, folder: Path, rounds: int, noise: str) -> Path:
    """Write an experiment on the records of :mod:`privacy_audits.targets.orthogonal`, and draw
    which canaries take part.

    Args:
        mode: the algorithm.
        folder: where the experiment goes.
        rounds: how many.
        noise: keys and values of the section ``privacy``.

    Returns:
        The path of the experiment file.
    """
    truth.draw(folder, orthogonal.SITES, orthogonal.CANARIES)
    text = _EXPERIMENT.format(
        sites=", ".join(orthogonal.SITES),
        rounds=rounds,
        mode=mode,
        local_steps=LOCAL_STEPS[mode],
        rate=SAMPLING_RATE,
        folder=json.dumps(str(folder)),
        lr=LEARNING_RATE,
        noise=noise,
        delta=DELTA,
    )
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def start(
    experiment: Path, folder: Path, launch: Launch = Launch(), settings: Sequence[str] = ()
) -> RecordedRun:
    """Run an experiment and record it.

    Args:
        experiment: the experiment file.
        folder: an existing folder for everything that the run leaves; site files are taken from
            its folder ``sites``, where there is one.
        launch: what each rank runs.
        settings: values that replace some of the experiment, as "key.path=value".

    Raises:
        PrivflError: If the experiment is not valid, no mpiexec is there, or the run does not end.
    """
    loaded = load_experiment(experiment, settings)
    command = [*mpiexec_command(len(loaded.sites) + 1), sys.executable, "-m", *launch.command]
    try:
        done = subprocess.run(
            [*command, str(folder), str(experiment), *settings],
            capture_output=True,
            text=True,
            timeout=launch.seconds,
            check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise PrivflError(f"the audited run did not end within {launch.seconds:g} s") from None
    return RecordedRun(loaded, folder, done.returncode, done.stdout + done.stderr)
