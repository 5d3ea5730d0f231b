"""What one site brings to a run, decided before anything is sent: noise, encryption parameters, identity."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from privfl import __version__
from privfl.admission.plan import Allowance, allow
from privfl.config import Experiment, SiteFile
from privfl.errors import PrivflError
from privfl.federation import messages
from privfl.secagg import Grid, Identity, Parameters
from privfl.secagg.session.roster import load_identity
from privfl.secagg.session.sums import parameters_for


def versions() -> dict[str, str]:
    """What must be the same at all ranks: ciphertexts and messages do not travel between versions."""
    return {"privfl": __version__, "tenseal": version("tenseal")}


def account() -> str:
    """The account this process runs under, by its number alone: one user has the same on all machines of a cluster."""
    return str(os.getuid())


@dataclass(frozen=True)
class SiteSetup:
    """What one site brings to a run. ``folder`` is the one user functions are relative to."""

    site: str
    experiment: Experiment
    folder: Path
    file: SiteFile
    allowance: Allowance
    parameters: Parameters
    identity: Identity

    @property
    def noise_multiplier(self) -> float:
        """Of the training steps."""
        return self.allowance.training.noise_multiplier

    def for_trainer(self, run: str, threads: int, log: str) -> dict[str, Any]:
        """What the trainer is told first; nothing of it is secret."""
        return {
            "experiment": self.experiment.model_dump_json(),
            "folder": str(self.folder),
            "data_options": self.experiment.data_options | self.file.data_options,
            "device": self.file.device,
            "threads": threads,
            "log": log,
            # With distributed noise the agent adds this site's share.
            "noise_multiplier": None if self.experiment.privacy.noise == "distributed" else self.noise_multiplier,
            "run": run,
        }

    def prepared(self, facts: dict[str, Any], tag: str, words_add: bool) -> messages.Prepared:
        """What the others are told once the trainer has reported its ``facts``."""
        allowance, release = self.allowance, self.allowance.metrics
        return messages.Prepared(
            records=facts["records"],
            parameters=facts["parameters"],
            layout=facts["layout"] if self.experiment.evaluate_every else {},
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.experiment.rate(self.site),
            planned_epsilon=allowance.planned_epsilon,
            evaluation_epsilon=0.0 if release is None else allowance.epsilon("evaluation", [release]),
            metrics_noise=0.0 if release is None else release.noise_multiplier,
            accountant=allowance.accountant,
            book="none" if not allowance.kept else "new" if allowance.new else "kept",
            tag=tag,
            pinned=self.pinned,
            words_add=words_add,
            outside=tuple(facts["outside"]),
        )

    @property
    def pinned(self) -> bool:
        """Whether this site knows beforehand who the others are."""
        return bool(self.file.peers)


def parameters_of(experiment: Experiment) -> Parameters:
    """The parameters of the experiment's encrypted sums.

    Raises:
        PrivflError: so many bits do not fit so many sites.
    """
    chosen = experiment.secure_aggregation
    try:
        parameters = parameters_for(len(experiment.sites), chosen.value_bits, chosen.path)
        if isinstance(chosen.range, float) and experiment.algorithm == "fedavg":
            Grid(parameters, chosen.range)
    except PrivflError as error:
        raise PrivflError(f"secure_aggregation: {error}") from error
    return parameters


def _identity_of(site: str, experiment: Experiment, file: SiteFile) -> Identity:
    """The site's own identity, or one for this run only where no other site is told to expect a certain one.

    Raises:
        PrivflError: the identity cannot be loaded, or peers are missing.
    """
    missing = [name for name in experiment.sites if name != site and name not in file.peers]
    if missing and (file.peers or "pinned_keys" in file.require):
        raise PrivflError(
            f"the file of site {site} pins no key for {', '.join(missing)}: add what `privfl keys show` prints there to peers, or leave out peers "
            "and require"
        )
    return Identity() if file.identity is None else load_identity(file.identity)


def prepare_site(site: str, experiment: Experiment, folder: Path, file: SiteFile) -> SiteSetup:
    """Everything a site can decide by itself before the run, above all how much noise its records need and whether its policy lets it happen.

    Raises:
        PrivflError: the policy or the budget refuses, the target epsilon cannot be reached, or keys that are asked for are not there.
    """
    allowance = allow(site, experiment, file)
    return SiteSetup(site, experiment, folder, file, allowance, parameters_of(experiment), _identity_of(site, experiment, file))
