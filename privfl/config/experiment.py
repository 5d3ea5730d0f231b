"""The experiment file: what the consortium proposes to train.

Field for field the keys of the YAML file.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from privfl.config.values import (
    Below1,
    Count,
    FunctionName,
    MetricName,
    Noise,
    NotNegative,
    Options,
    Positive,
    Probability,
    Rate,
    Section,
    SiteName,
)


class Optimizer(Section):
    """The optimizer of the local steps; its state starts anew each round."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: Positive
    momentum: Below1 = 0.0
    weight_decay: NotNegative = 0.0

    @model_validator(mode="after")
    def _momentum_needs_sgd(self) -> Optimizer:
        if self.momentum and self.name != "sgd":
            raise ValueError(
                f"has momentum, which only sgd takes; remove it or set name: sgd instead of "
                f"{self.name}"
            )
        return self

    def options(self) -> dict[str, float]:
        """Keyword arguments for the torch optimizer of this name."""
        options = {"lr": self.lr, "weight_decay": self.weight_decay}
        return options | {"momentum": self.momentum} if self.name == "sgd" else options


class Evaluation(Section):
    """Held-out metrics. They leave a site only inside an encrypted sum.

    Those of ``private`` records get noise, of which every release costs: ``target_epsilon`` is for
    all of them together, and by default that of ``privacy``. So ``every`` is by default each round
    for public records, and the last round only for private ones.
    """

    records: Literal["private", "public"] = "private"
    every: Count | None = None
    target_epsilon: Positive | None = None
    metrics: dict[MetricName, FunctionName] = {}

    @model_validator(mode="after")
    def _public_records_cost_nothing(self) -> Evaluation:
        if self.records == "public" and self.target_epsilon is not None:
            raise ValueError(
                "has a target_epsilon, but metrics of public records get no noise; remove it, or "
                "say records: private"
            )
        return self


class Privacy(Section):
    """The guarantee: (epsilon, delta) per record at each site, by clipping and noise in every step.

    ``noise``: ``site``, each site adds all of its noise itself, or ``distributed``, each adds a
    share and the sum of all has the noise; then the guarantee holds as long as at most
    ``collusion`` sites pool what they see.
    """

    noise: Literal["site", "distributed"] = "site"
    target_epsilon: Positive | None = None
    noise_multiplier: Noise | None = None
    delta: Probability
    max_grad_norm: Positive
    collusion: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Privacy:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs exactly one of target_epsilon and noise_multiplier")
        return self


class SecureAggregation(Section):
    """How updates become integers and sums of ciphertexts.

    ``value_bits``: bits of a value on the wire (12 to 28; by default as many as two values can
    share a word with). ``range``: the largest size of an update's element, or ``agreed``: a power
    of two over the sites' maxima, agreed on between them every round (the default of fedavg); for
    fedsgd the largest size of an element of the sum, by default ``derived`` from sampling rates,
    records, clipping norm and noise. ``path``: ``star`` sends contributions to rank 0, ``reduce``
    lets the MPI library add them.
    """

    value_bits: Count | None = None
    range: Positive | Literal["agreed", "derived"] | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    path: Literal["star", "reduce"] = "star"


class Experiment(Section):
    """One experiment.

    ``algorithm``: ``fedavg`` averages the sites' updates after ``local_steps`` steps with noise of
    their own; in ``fedsgd`` every round is one step, whose gradient is the sum over all sites with
    distributed noise.
    """

    sites: tuple[SiteName, ...]
    rounds: Count
    local_steps: Count = 1
    sampling_rate: Rate | dict[SiteName, Rate]
    algorithm: Literal["fedavg", "fedsgd"] = "fedavg"
    weights: Literal["uniform", "records"] = "uniform"
    model: FunctionName
    data: FunctionName
    data_options: Options = {}
    loss: FunctionName
    optimizer: Optimizer
    evaluation: Evaluation = Evaluation()
    privacy: Privacy
    secure_aggregation: SecureAggregation = SecureAggregation()
    output: str = "runs"
    insecure_test_seed: int | None = None

    @field_validator("sites")
    @classmethod
    def _two_or_more_and_none_twice(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if len(sites) < 2:
            raise ValueError("must name at least two sites: the sum of one site is its own update")
        twice = sorted({site for site in sites if sites.count(site) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} more than once")
        return sites

    @model_validator(mode="after")
    def _a_rate_for_every_site(self) -> Experiment:
        if isinstance(self.sampling_rate, dict) and set(self.sampling_rate) != set(self.sites):
            wrong = sorted(set(self.sampling_rate) ^ set(self.sites))
            raise ValueError(
                f"sampling_rate must name each of the sites once; check {', '.join(wrong)}"
            )
        return self

    def rate(self, site: str) -> float:
        """The public sampling rate q of a site."""
        return (
            self.sampling_rate[site] if isinstance(self.sampling_rate, dict) else self.sampling_rate
        )

    @model_validator(mode="after")
    def _noise_fits_the_algorithm(self) -> Experiment:
        distributed = self.privacy.noise == "distributed"
        if distributed != (self.algorithm == "fedsgd"):
            given, needed = ("fedavg", "site") if distributed else ("fedsgd", "distributed")
            raise ValueError(
                f"privacy.noise is {self.privacy.noise}, but algorithm {given} needs {needed}: "
                f"fedavg goes with noise: site, fedsgd with distributed"
            )
        if distributed:
            self._check_steps()
        elif self.privacy.collusion is not None:
            raise ValueError(
                "privacy.collusion is for noise: distributed; with noise: site any number of sites "
                "may collude, remove it"
            )
        if self.secure_aggregation.range == ("agreed" if distributed else "derived"):
            raise ValueError(
                f"secure_aggregation.range {self.secure_aggregation.range} does not fit algorithm "
                f"{self.algorithm}; remove it, or give a number"
            )
        return self

    def _check_steps(self) -> None:
        """What only holds if every step is a sum."""
        if self.local_steps != 1:
            raise ValueError(
                f"local_steps is {self.local_steps}, but in fedsgd every step is a sum over all "
                f"sites; set local_steps: 1 and raise rounds instead"
            )
        if self.weights != "uniform":
            raise ValueError(
                "weights: records is for fedavg; in fedsgd every record counts the same, remove it"
            )
        if self.privacy.collusion == 0:
            raise ValueError(
                "privacy.collusion is 0, but each site could subtract its own share of the noise; "
                "set it to 1 or more"
            )
        if len(self.sites) < 3:
            raise ValueError(
                f"sites are {len(self.sites)}, but fedsgd needs 3: of two, each would see the "
                f"other's gradients, the sum less its own; use fedavg"
            )
        if len(self.sites) < self.collusion + 2:
            raise ValueError(
                f"privacy.collusion is {self.collusion} of {len(self.sites)} sites: so many could "
                f"see another site's gradients alone; at most "
                f"{len(self.sites) - 2} can be withstood"
            )
        if self.secure_aggregation.rounding != "nearest":
            raise ValueError(
                "secure_aggregation.rounding is for fedavg; in fedsgd values are rounded to the "
                "nearest, remove it"
            )

    @property
    def collusion(self) -> int:
        """How many sites may pool what they see, with distributed noise; 0 with noise of each
        site's own, where it does not matter.
        """
        if self.privacy.noise == "site":
            return 0
        return 1 if self.privacy.collusion is None else self.privacy.collusion

    @property
    def aggregation_range(self) -> float | Literal["agreed", "derived"]:
        """The range of values in the sums, or where it comes from."""
        return self.secure_aggregation.range or (
            "derived" if self.algorithm == "fedsgd" else "agreed"
        )

    @model_validator(mode="after")
    def _private_metrics_need_a_target(self) -> Experiment:
        evaluation = self.evaluation
        if evaluation.metrics and evaluation.records == "private" and self.metrics_target is None:
            raise ValueError(
                "evaluation.target_epsilon is missing: metrics of private records get noise for an "
                "epsilon of their own, and privacy has no "
                "target_epsilon to take it from; set it, remove evaluation.metrics, or say "
                "evaluation.records: public if the held-out records are"
            )
        return self

    @property
    def metrics_target(self) -> float | None:
        """The epsilon for all releases of metrics of private records."""
        return self.evaluation.target_epsilon or self.privacy.target_epsilon

    @property
    def evaluate_every(self) -> int:
        """After how many rounds metrics leave the sites; 0: never, because none are asked for."""
        if not self.evaluation.metrics:
            return 0
        return self.evaluation.every or (1 if self.evaluation.records == "public" else self.rounds)

    @property
    def metric_releases(self) -> int:
        """How often metrics leave the sites in the whole run."""
        every = self.evaluate_every
        return -(-self.rounds // every) if every else 0

    @property
    def steps(self) -> int:
        """DP-SGD steps of each site over the whole run."""
        return self.rounds * self.local_steps

    @property
    def private(self) -> bool:
        """False if the noise can be recomputed from a seed."""
        return self.insecure_test_seed is None

    def digest(self) -> str:
        """SHA-256 over everything the sites must agree on (all but where outputs go), in
        hexadecimal.
        """
        return hashlib.sha256(self.model_dump_json(exclude={"output"}).encode()).hexdigest()
