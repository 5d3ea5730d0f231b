"""What one site brings to a run, decided before anything is sent: noise, encryption parameters, identity."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from privfl import __version__
from privfl.accounting import PoissonGaussian, epsilon_of, least_noise_multiplier
from privfl.config import Experiment, SiteFile
from privfl.errors import InternalError, PrivflError
from privfl.secagg import Grid, Identity, Parameters
from privfl.site.agreement import load_identity
from privfl.site.sums import parameters_for


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
    noise_multiplier: float
    planned_epsilon: float
    parameters: Parameters
    identity: Identity

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
        if chosen.range != "agreed":
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
    """Everything a site can decide by itself before the run, above all how much noise its records need.

    Raises:
        PrivflError: the target epsilon cannot be reached, the noise bounds nothing, or keys that are asked for are not there.
    """
    privacy, rate = experiment.privacy, experiment.rate(site)
    noise = privacy.noise_multiplier
    if noise is None:
        if privacy.target_epsilon is None:
            raise InternalError("an experiment without a target and without a noise multiplier passed validation")
        noise = least_noise_multiplier(privacy.target_epsilon, privacy.delta, rate, experiment.steps)
    planned = epsilon_of([PoissonGaussian(rate, noise, experiment.steps)], privacy.delta)
    if not math.isfinite(planned):
        raise PrivflError(f"privacy.noise_multiplier {noise:g} is too little for any finite epsilon; raise it")
    return SiteSetup(
        site, experiment, folder, file, noise, planned, parameters_of(experiment), _identity_of(site, experiment, file)
    )
