"""Whether a site's policy allows an experiment: everything that can be decided without an
accountant.
"""

from __future__ import annotations

from privfl.config import Experiment, SiteFile
from privfl.errors import PrivflError

# A site that sets one of these wants protection, which a known seed takes away.
_POLICY = {
    "attempts",
    "budget",
    "exact_metrics",
    "least_collusion",
    "least_noise_multiplier",
    "least_sites",
    "ledger",
    "metrics",
    "peers",
    "records_per_person",
    "require",
}
# A site that sets one of these wants no metrics without noise, unless it names them.
_NOISE_RULES = {"budget", "least_noise_multiplier", "ledger", "metrics"}


def refusal(site: str, key: str, what: str) -> PrivflError:
    """The error with which a site's policy refuses an experiment.

    Args:
        site: the site.
        key: the key of its site file that refuses.
        what: what is wrong, and what would pass.
    """
    return PrivflError(
        f"the policy of site {site} refuses this experiment ({key} in its site file): {what}"
    )


def check_members(site: str, experiment: Experiment, file: SiteFile, members: int) -> None:
    """Check that a sum over ``members`` sites is large enough for the policy, and that its noise
    stands against the coalitions that the policy expects.

    Raises:
        PrivflError: If the policy refuses the sum; the sentence says how many sites, or how many
            colluders, would pass.
    """
    if members < file.least_sites:
        raise refusal(
            site, "least_sites", f"it has {members} sites, at least {file.least_sites} would pass"
        )
    if experiment.privacy.noise == "distributed" and file.least_collusion > experiment.collusion:
        raise refusal(
            site,
            "least_collusion",
            f"privacy.collusion is {experiment.collusion}, but {file.least_collusion} sites that "
            "pool what they see could subtract more of the noise than that allows for; "
            f"privacy.collusion {file.least_collusion} would pass",
        )
    if file.least_collusion and members < file.least_collusion + 2:
        raise refusal(
            site,
            "least_collusion",
            f"with {members} sites, {file.least_collusion} that pool what they see would see this "
            f"site's updates alone; at least {file.least_collusion + 2} sites would pass",
        )


def check_policy(site: str, experiment: Experiment, file: SiteFile) -> None:
    """Check the experiment against every rule of the site's policy that needs no accountant.

    Raises:
        PrivflError: If the experiment breaks a rule; the sentence names the first such rule and
            says what would pass.
    """

    def refuse(key: str, what: str) -> PrivflError:
        return refusal(site, key, what)

    check_members(site, experiment, file, len(experiment.sites))
    policy = sorted(file.model_fields_set & _POLICY)
    if experiment.evaluate_every:
        names = experiment.evaluation.metrics
        if file.metrics is not None and set(names) - set(file.metrics):
            others = ", ".join(sorted(set(names) - set(file.metrics)))
            raise refuse(
                "metrics",
                f"{others} would leave the site; allow it there, or take it out of "
                "evaluation.metrics",
            )
        exact = file.exact_metrics
        if exact is None:
            exact = () if file.model_fields_set & _NOISE_RULES else tuple(names)
        others = ", ".join(name for name in names if name not in exact)
        if experiment.evaluation.records == "public" and others:
            raise refuse(
                "exact_metrics",
                f"{others} would leave the site without noise (evaluation.records: public); allow "
                "it there, or set evaluation.records: private",
            )
    if file.budget is not None and experiment.privacy.delta > file.budget.delta:
        raise refuse(
            "budget",
            f"privacy.delta is {experiment.privacy.delta:g}, at most the budget's "
            f"{file.budget.delta:g} would pass",
        )
    if not experiment.private and policy:
        raise refuse(
            policy[0], "insecure_test_seed is set, with which nothing is private; remove it"
        )
