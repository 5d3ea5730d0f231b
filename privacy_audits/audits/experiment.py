"""Canaries in the experiment of a user: a real run of their model, data code, loss and algorithm,
under mpiexec, seen by as many colluding sites as are charged for, with the coordinator.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from privacy_audits.audits import own
from privacy_audits.result import AuditResult, Claim
from privacy_audits.targets import inserted, truth
from privacy_audits.targets.job import Launch, RecordedRun, start
from privfl.config import Experiment, check_functions, load_experiment, load_function, load_site
from privfl.errors import PrivflError

# A one-run audit can refute no claim above about ln(canaries), nor one at a delta that is not far
# below 1 / canaries: so the claim is made small.
_EPSILON, _DELTA = 1.0, 1e-7
# Fewer canaries of a site are not worth a run.
_LEAST = 24
_SECONDS = 24 * 3600.0
# The same run with its noise forgotten shows what the attack can do.
_CONTROL = {
    "fedsgd": ("privacy_audits.sabotaged", "noise-forgotten", "--"),
    "fedavg": ("privacy_audits.sabotaged", "noise-forgotten-fedavg", "--"),
}


@dataclass(frozen=True)
class Target:
    """An experiment that may be audited.

    Attributes:
        path: the experiment file.
        settings: values that replace some of it, as "key.path=value".
        experiment: what both say.
        options: the arguments of data(), by site.
    """

    path: Path
    settings: tuple[str, ...]
    experiment: Experiment
    options: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Inserted(Target):
    """An experiment with canaries.

    Attributes:
        count: canaries of each site.
        seed: what makes them.
        drawn: the folder that says which of them take part.
    """

    count: int
    seed: int
    drawn: Path

    @property
    def changes(self) -> tuple[str, ...]:
        """The settings of a run with canaries: other data, and a small claim."""
        privacy = self.experiment.privacy
        wrapped = {
            "reference": self.experiment.data,
            "folder": str(self._folder),
            "options": self.options,
            "count": self.count,
            "seed": self.seed,
            "drawn": str(self.drawn),
        }
        return (
            *self.settings,
            "data=privacy_audits.targets.inserted:data",
            f"data_options={json.dumps(wrapped)}",
            "evaluation={}",
            "privacy.noise_multiplier=null",
            f"privacy.target_epsilon={min(_EPSILON, privacy.target_epsilon or _EPSILON)}",
            f"privacy.delta={min(_DELTA, privacy.delta)!r}",
        )

    @property
    def _folder(self) -> Path:
        """What paths of functions count from."""
        return self.path.parent.resolve()

    @property
    def colluders(self) -> int:
        """How many sites look, with the coordinator: as many as are charged for."""
        return max(1, self.experiment.collusion)

    @property
    def honest(self) -> tuple[str, ...]:
        """The other sites, whose canaries are guessed."""
        return self.experiment.sites[self.colluders :]

    @property
    def took_part(self) -> NDArray[np.bool_]:
        """Which canaries of the honest sites take part, one site after the other."""
        return np.concatenate([truth.read(self.drawn, site) for site in self.honest])

    def scores(self, run: RecordedRun) -> NDArray[np.float64]:
        """How surely each canary of the honest sites took part in a run, in the same order."""
        experiment = self.experiment
        gradients = own.Gradients(
            load_function("model", experiment.model, self._folder)(),
            load_function("loss", experiment.loss, self._folder),
        )
        records = [
            inserted.records_of(site, experiment.data, self._folder, self.options[site])
            for site in self.honest
        ]
        attack = own.Attack(
            gradients,
            ConcatDataset(records),
            ConcatDataset([inserted.MadeUp(one, self.count, self.seed) for one in records]),
            float(np.mean([experiment.rate(site) for site in self.honest])),
            experiment.privacy.max_grad_norm,
        )
        left = run.sites[-1].arrays["summed"].astype(np.float64)
        for site in run.sites[: self.colluders]:
            left = left - site.arrays["contributed"]
        for replica, moved in zip(run.sites[-1].arrays["replica"], left, strict=False):
            # Updates of fedavg go against the gradients.
            along = moved if experiment.algorithm == "fedsgd" else -moved
            attack.step(replica.astype(np.float64), along)
        return attack.scores


def target(path: Path, sites: Path | None, settings: tuple[str, ...]) -> Target:
    """Read an experiment, and check that it may be audited.

    Args:
        path: the experiment file.
        sites: the folder with site files, of which only ``data_options`` are used.
        settings: values that replace some of the experiment, as "key.path=value".

    Raises:
        PrivflError: If it cannot be read or is not private, or a site keeps a ledger.
    """
    experiment = load_experiment(path, settings)
    check_functions(experiment, path.parent)
    return Target(path, settings, experiment, _options(path, experiment, sites))


def results(
    chosen: Target, folder: Path, through: tuple[str, ...], say: Callable[[str], None]
) -> Iterator[AuditResult]:
    """Run the experiment with canaries, and guess which of them took part.

    Args:
        chosen: the experiment.
        folder: where the runs leave their files.
        through: a module and its arguments that run each rank.
        say: told what is happening.

    Raises:
        PrivflError: If the model is too small to tell canaries apart, or the run fails.
    """
    experiment, path = chosen.experiment, chosen.path
    count = _count(path, experiment)
    say(
        f"inserting {count} canaries at each of {len(experiment.sites)} sites; nothing is charged, "
        "so what data() returns must be public or made up"
    )
    where = Path(tempfile.mkdtemp(prefix="experiment-", dir=folder))
    truth.draw(where, experiment.sites, count)
    seed = secrets.randbits(63)
    audited = Inserted(path, chosen.settings, experiment, chosen.options, count, seed, where)
    began = time.perf_counter()
    say("running the experiment ...")
    run = _run(audited, where / "audited", through)
    say("running it without noise, as a control ...")
    control = _run(audited, where / "control", _CONTROL[experiment.algorithm])
    say("guessing ...")
    claim = Claim(
        statement="Whoever sees this learns of one record no more than epsilon at delta.",
        adversary=run.adversaries[audited.colluders],
        mechanism=run.events,
        delta=run.experiment.privacy.delta,
    )
    yield from own.results(
        f"canaries/{path.name}/{audited.colluders} colluders",
        claim,
        audited.scores(run),
        audited.scores(control),
        audited.took_part,
        time.perf_counter() - began,
    )


def _run(audited: Inserted, folder: Path, through: tuple[str, ...]) -> RecordedRun:
    folder.mkdir()
    launch = Launch(through=through, seconds=_SECONDS)
    run = start(audited.path, folder, launch, audited.changes)
    if not run.complete:
        raise PrivflError(f"the run that was to be audited {run.problem}")
    return run


def _options(path: Path, experiment: Experiment, sites: Path | None) -> dict[str, dict[str, Any]]:
    """The arguments of data() at every site."""
    if not experiment.private:
        raise PrivflError(
            f"{path}: insecure_test_seed makes noise that can be recomputed, so there is no claim "
            "to audit; remove it"
        )
    options = {}
    for site in experiment.sites:
        file = load_site(sites, site)
        if file.ledger is not None:
            raise PrivflError(
                f"{sites}/{site}.yaml: site {site} keeps a ledger, so its records are real, and an "
                "audit would show parts of them uncharged; audit with public or made-up records, "
                "and with --no-sites or with site files that have no ledger"
            )
        options[site] = experiment.data_options | file.data_options
    return options


def _count(path: Path, experiment: Experiment) -> int:
    """How many canaries each site gets."""
    model = load_function("model", experiment.model, path.parent)()
    count = own.canaries_for(model) // len(experiment.sites)
    if count < _LEAST:
        raise PrivflError(
            f"{path}: model() can tell {count} canaries at each of {len(experiment.sites)} sites "
            f"apart, and an audit needs {_LEAST}; audit a larger model, or fewer sites (--set "
            "'sites=[...]')"
        )
    return count
