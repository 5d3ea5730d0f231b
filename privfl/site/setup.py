"""What one site brings to a run, decided before anything is sent: noise, encryption parameters,
identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privfl.admission.admit import admit
from privfl.admission.plan import RunPlan, parameters_of
from privfl.config import Experiment, SiteFile
from privfl.errors import PrivflError
from privfl.federation import messages
from privfl.identity import Identity, load_identity
from privfl.noise.randomness import Randomness, randomness
from privfl.secagg import Parameters
from privfl.trainer.requests import Facts, Prepare


@dataclass(frozen=True)
class SiteSetup:
    """What one site brings to a run.

    Attributes:
        site: its name.
        experiment: what the sites of the run have agreed to do.
        folder: the folder that user functions are relative to.
        file: the site's own file, with its policy.
        plan: what the run will need and cost here.
        parameters: those of the run's encrypted sums.
        identity: the key that this site signs with.
        rules: the path of the site file, as it is shown; None without one.
    """

    site: str
    experiment: Experiment
    folder: Path
    file: SiteFile
    plan: RunPlan
    parameters: Parameters
    identity: Identity
    rules: str | None

    @property
    def noise_multiplier(self) -> float:
        """Of the training steps."""
        return self.plan.training.noise_multiplier

    @property
    def pinned(self) -> bool:
        """Whether this site knows beforehand who the others are."""
        return bool(self.file.peers)

    @property
    def noise_in_sums(self) -> bool:
        """Whether the agent adds this site's share of one noise, and the trainer none."""
        return self.experiment.privacy.noise == "distributed"

    def randomness(self) -> Randomness:
        """Where the agent's own noise comes from: the operating system, but for tests with a
        seed.
        """
        return randomness(self.experiment.insecure_test_seed, f"{self.site} agent")

    def for_trainer(self, run: str, threads: int, log: str) -> Prepare:
        """What the trainer is told first; nothing of it is secret."""
        return Prepare(
            experiment=self.experiment.model_dump_json(),
            folder=str(self.folder),
            data_options=self.experiment.data_options | self.file.data_options,
            device=self.file.device,
            threads=threads,
            log=log,
            noise_multiplier=None if self.noise_in_sums else self.noise_multiplier,
            run=run,
        )

    def prepared(self, facts: Facts, tag: str, words_add: bool) -> messages.Prepared:
        """What the others are told once the trainer has reported its ``facts``."""
        plan, release = self.plan, self.plan.metrics
        return messages.Prepared(
            records=facts.records,
            parameters=facts.parameters,
            layout=facts.layout if self.experiment.evaluate_every else {},
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.experiment.rate(self.site),
            planned_epsilon=plan.planned_epsilon,
            evaluation_epsilon=0.0 if release is None else plan.epsilon("evaluation", [release]),
            metrics_noise=0.0 if release is None else release.noise_multiplier,
            accountant=plan.accountant,
            ledger="none" if not plan.kept else "new" if plan.new else "kept",
            rules=self.rules,
            tag=tag,
            pinned=self.pinned,
            words_add=words_add,
            outside=facts.outside,
        )


def prepare_site(
    site: str, experiment: Experiment, folder: Path, file: SiteFile, rules: str | None = None
) -> SiteSetup:
    """Everything a site can decide by itself before the run.

    Above all that is how much noise its records need, and whether its policy lets the run happen.

    Raises:
        PrivflError: If the policy or the budget refuses, the target epsilon cannot be reached, or
            keys that are asked for are missing.
    """
    plan = admit(site, experiment, file)
    return SiteSetup(
        site,
        experiment,
        folder,
        file,
        plan,
        parameters_of(experiment),
        _identity_of(site, experiment, file),
        rules,
    )


def _identity_of(site: str, experiment: Experiment, file: SiteFile) -> Identity:
    """The site's own identity, or one for this run only where no other site is told to expect a
    certain one.
    """
    missing = [name for name in experiment.sites if name != site and name not in file.peers]
    if missing and (file.peers or "pinned_keys" in file.require):
        raise PrivflError(
            f"the file of site {site} pins no key for {', '.join(missing)}: add what `privfl keys "
            "show` prints there to peers, or leave out peers and require"
        )
    return Identity() if file.identity is None else load_identity(file.identity)
