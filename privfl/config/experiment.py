"""The experiment file: what the consortium proposes to train, key for key as in the YAML file.

Docstrings of sections and descriptions of fields are the reference of the keys, from which
docs/reference/experiment-keys.md is generated.
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
    Range,
    Rate,
    Section,
    SiteName,
    ValueBits,
)


class Optimizer(Section):
    """The optimizer that moves the model along noisy gradients.

    With `fedavg` it takes the local steps of a site, and its state (momentum, moments of Adam)
    starts anew in every round.
    With `fedsgd` it follows the sum of gradients, and its state goes on from step to step, the
    same at every site.
    """

    name: Literal["sgd", "adam", "adamw"] = Field(
        default="sgd", description="The optimizer of torch: SGD, Adam or AdamW."
    )
    lr: Positive = Field(
        description="Learning rate. "
        "It multiplies the sum of clipped, noisy gradients divided by the expected batch size, "
        "that of the site with `fedavg` and that of all sites together with `fedsgd`. "
        "Tune it anew when `algorithm` or `privacy.max_grad_norm` changes."
    )
    momentum: Below1 = Field(
        default=0.0,
        description="Momentum, which only `sgd` takes. The default means none.",
    )
    weight_decay: NotNegative = Field(
        default=0.0,
        description="Weight decay, as the optimizer of torch takes it. The default means none.",
    )

    @model_validator(mode="after")
    def _momentum_needs_sgd(self) -> Optimizer:
        if self.momentum and self.name != "sgd":
            raise ValueError(
                "has momentum, which only sgd takes; remove it or set name: sgd instead of "
                f"{self.name}"
            )
        return self

    def options(self) -> dict[str, float]:
        """Keyword arguments for the torch optimizer of this name."""
        options = {"lr": self.lr, "weight_decay": self.weight_decay}
        return options | {"momentum": self.momentum} if self.name == "sgd" else options


class Evaluation(Section):
    """Metrics on the evaluation records, which `data` returns beside the training records.

    They leave a site only inside an encrypted sum over all sites.
    """

    records: Literal["private", "public"] = Field(
        default="private",
        description="Whose records the evaluation records are. "
        "Metrics of `private` records get noise, and every release of them costs these records "
        "an epsilon of their own. "
        "Metrics of `public` records are exact and cost nothing; "
        "say so only of a public benchmark.",
    )
    every: Count | None = Field(
        default=None,
        description="Metrics leave the sites after every so many rounds, and after the last one. "
        "By default they leave after each round for public records, "
        "and only after the last round for private records, because every release costs.",
    )
    target_epsilon: Positive | None = Field(
        default=None,
        description="Upper bound on the epsilon of a private evaluation record, "
        "for all releases of metrics together, at `privacy.delta`. "
        "By default it is `privacy.target_epsilon`. "
        "It is refused for public records, whose metrics get no noise.",
    )
    metrics: dict[MetricName, FunctionName] = Field(
        default={},
        description="For each metric the name that is shown and the function that computes it. "
        "The function gets `(output, target)` of evaluation records and returns "
        "`(sums, counts)`, as in (number correct, number). "
        "For private records it must add up record by record. "
        "By default nothing is evaluated.",
    )

    @model_validator(mode="after")
    def _public_records_cost_nothing(self) -> Evaluation:
        if self.records == "public" and self.target_epsilon is not None:
            raise ValueError(
                "has a target_epsilon, but metrics of public records get no noise; remove it, or "
                "say records: private"
            )
        return self


class Privacy(Section):
    """The guarantee: (epsilon, delta) per training record at each site.

    It comes from clipping and noise in every step.
    """

    noise: Literal["site", "distributed"] = Field(
        default="site",
        description="Who adds the noise. "
        "With `site`, which goes with `fedavg`, each site adds all of its noise itself, "
        "and its guarantee rests on no other site. "
        "With `distributed`, which goes with `fedsgd`, each site adds a share and the sum over "
        "all sites has the noise; the guarantee then holds as long as at most `collusion` sites "
        "pool what they see.",
    )
    target_epsilon: Positive | None = Field(
        default=None,
        description="Upper bound on the epsilon of every training record for the whole run. "
        "Every site gets the least noise that meets it; "
        "with distributed noise the site that needs most decides for all. "
        "Give either this or `noise_multiplier`.",
    )
    noise_multiplier: Noise | None = Field(
        default=None,
        description="Standard deviation of the noise of a step, in units of `max_grad_norm`; "
        "epsilon follows from it. "
        "With distributed noise it is the noise that `collusion` sites cannot subtract. "
        "Give either this or `target_epsilon`.",
    )
    delta: Probability = Field(
        description="Slack in the guarantee: roughly the probability that epsilon does not hold "
        "for a given record. "
        "Every epsilon of the run is given at this delta. "
        "Keep it well below one divided by the number of records of a site."
    )
    max_grad_norm: Positive = Field(
        description="Clipping norm: the gradient of each record is scaled down to at most this "
        "Euclidean length before gradients are added. "
        "If you change it, tune `optimizer.lr` as well."
    )
    collusion: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="With distributed noise, how many sites may pool what they see while the "
        "epsilon that is charged still holds: from 1 to two fewer than there are sites. "
        "By default it is 1. "
        "It is refused with `noise: site`, where any number of sites may collude.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Privacy:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs exactly one of target_epsilon and noise_multiplier")
        return self


class SecureAggregation(Section):
    """How updates become integers that add up under masks and encryption."""

    value_bits: ValueBits | None = Field(
        default=None,
        description="Bits of one value in a contribution. "
        "More bits make a finer grid. "
        "By default it is as many as let two values share a word (16 to 24, fewer with more "
        "sites); beyond that every contribution has twice the bytes.",
    )
    range: Range | Literal["agreed", "derived"] | None = Field(
        default=None,
        description="Bound on the absolute value of an element; a larger one ends the run. "
        "With `fedavg` it bounds each element of a site's update: a public number, or `agreed` "
        "(the default), a power of two over the sites' maxima on which the sites agree in every "
        "round, so that each learns the others' maxima to a power of two. "
        "With `fedsgd` it bounds each element of the sum over all sites: a public number, or "
        "`derived` (the default), computed once from sampling rates, numbers of records, "
        "clipping norm and noise.",
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest",
        description="How an element is rounded to the grid. "
        "The error of `stochastic` rounding has mean zero and may be twice as large. "
        "`fedsgd` takes `nearest` only.",
    )
    path: Literal["star", "reduce"] = Field(
        default="star",
        description="With `star` the sites send contributions to the coordinator, which adds "
        "them. "
        "With `reduce` the MPI library adds them on the way, "
        "which suits many sites on a reliable cluster. "
        "The sums are the same.",
    )


class Experiment(Section):
    """One experiment, on which all sites of a run must agree."""

    sites: tuple[SiteName, ...] = Field(
        description="The sites, each once; at least two, and three with `fedsgd`. "
        "Each is one process beside that of the coordinator: rank 1 is the first of them. "
        "`data` gets the name of its site."
    )
    rounds: Count = Field(
        description="Number of rounds. In every round all sites train, and one sum over all of "
        "them moves the model."
    )
    local_steps: Count = Field(
        default=1,
        description="DP-SGD steps of each site in a round, before the updates are averaged. "
        "Every step is charged: the more in all, the more noise each needs for the same epsilon. "
        "It must be 1 with `fedsgd`, where every round is one step.",
    )
    sampling_rate: Rate | dict[SiteName, Rate] = Field(
        description="Probability with which each training record enters the batch of a step, "
        "independently of all others (Poisson sampling). "
        "Give one number, or a mapping from every site to its own. It is public."
    )
    algorithm: Literal["fedavg", "fedsgd"] = Field(
        default="fedavg",
        description="`fedavg` averages the sites' updates after `local_steps` steps with noise "
        "of their own. "
        "In `fedsgd` every round is one step, whose gradient is the sum over all sites, with "
        "distributed noise.",
    )
    weights: Literal["uniform", "records"] = Field(
        default="uniform",
        description="Weights of the sites in the average of `fedavg`: all the same, or in "
        "proportion to their numbers of training records. "
        "`fedsgd`, where every record counts the same, takes `uniform` only.",
    )
    model: FunctionName = Field(
        description="Function without arguments that returns the `torch.nn.Module`. "
        "It must be the same at all sites; torch's random numbers are seeded alike. "
        "A file is looked for from the folder of the experiment file."
    )
    data: FunctionName = Field(
        description="Function that gets the name of the site, and `data_options` as keyword "
        "arguments, and returns two map-style data sets of `(input, target)`: the training and "
        "the evaluation records of that site."
    )
    data_options: Options = Field(
        default={},
        description="Keyword arguments of `data` at all sites; values are what JSON can hold. "
        "Those of a site's own file override them, key by key.",
    )
    loss: FunctionName = Field(
        description="Function that gets `(output, target)` of a batch and returns the mean of "
        "the records' losses as a single number. "
        "The loss of a record may depend on no other record."
    )
    optimizer: Optimizer
    evaluation: Evaluation = Evaluation()
    privacy: Privacy
    secure_aggregation: SecureAggregation = SecureAggregation()
    output: str = Field(
        default="runs",
        description="Folder in which every run makes a folder of its own; a relative path starts "
        "where the command is typed. "
        "`--output` overrides it, and sites need not agree on it.",
    )
    insecure_test_seed: int | None = Field(
        default=None,
        description="For tests only: noise and samples are computed from this seed, so that a "
        "run can be repeated and nothing is private, which every output of the run says. "
        "By default they come from the operating system.",
    )

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
        rates = self.sampling_rate
        return rates[site] if isinstance(rates, dict) else rates

    @model_validator(mode="after")
    def _noise_fits_the_algorithm(self) -> Experiment:
        distributed = self.privacy.noise == "distributed"
        if distributed != (self.algorithm == "fedsgd"):
            needed = "site" if distributed else "distributed"
            raise ValueError(
                f"privacy.noise is {self.privacy.noise}, but algorithm {self.algorithm} needs "
                f"{needed}: fedavg goes with noise: site, fedsgd with distributed"
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
        """Check what only holds if every step is a sum."""
        if self.local_steps != 1:
            raise ValueError(
                f"local_steps is {self.local_steps}, but in fedsgd every step is a sum over all "
                "sites; set local_steps: 1 and raise rounds instead"
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
                "other's gradients, the sum less its own; use fedavg"
            )
        if len(self.sites) < self.collusion + 2:
            raise ValueError(
                f"privacy.collusion is {self.collusion} of {len(self.sites)} sites: so many could "
                f"see another site's gradients alone; at most {len(self.sites) - 2} can be "
                "withstood"
            )
        if self.secure_aggregation.rounding != "nearest":
            raise ValueError(
                "secure_aggregation.rounding is for fedavg; in fedsgd values are rounded to the "
                "nearest, remove it"
            )

    @property
    def collusion(self) -> int:
        """How many sites may pool what they see with distributed noise; 0 with `noise: site`."""
        if self.privacy.noise == "site":
            return 0
        return 1 if self.privacy.collusion is None else self.privacy.collusion

    @property
    def aggregation_range(self) -> float | Literal["agreed", "derived"]:
        """The range of values in the sums, or where it comes from."""
        default: Literal["agreed", "derived"] = (
            "derived" if self.algorithm == "fedsgd" else "agreed"
        )
        return self.secure_aggregation.range or default

    @model_validator(mode="after")
    def _private_metrics_need_a_target(self) -> Experiment:
        evaluation = self.evaluation
        private = bool(evaluation.metrics) and evaluation.records == "private"
        if private and self.metrics_target is None:
            raise ValueError(
                "evaluation.target_epsilon is missing: metrics of private records get noise for an "
                "epsilon of their own, and privacy has no target_epsilon to take it from; set it, "
                "remove evaluation.metrics, or say evaluation.records: public if the evaluation "
                "records are public"
            )
        return self

    @property
    def metrics_target(self) -> float | None:
        """The epsilon for all releases of metrics of private records."""
        return self.evaluation.target_epsilon or self.privacy.target_epsilon

    @property
    def evaluate_every(self) -> int:
        """After how many rounds metrics leave the sites; 0 means never, as none are asked for."""
        if not self.evaluation.metrics:
            return 0
        default = 1 if self.evaluation.records == "public" else self.rounds
        return self.evaluation.every or default

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
        """SHA-256 over all that the sites must agree on (all keys but `output`), in hexadecimal."""
        return hashlib.sha256(self.model_dump_json(exclude={"output"}).encode()).hexdigest()
