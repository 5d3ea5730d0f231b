"""The defects: faults that somebody could make, or has made, in code like this."""

from __future__ import annotations

from privacy_audits.sabotage import patches
from privacy_audits.sabotage.apply import Defect, Patch, Replace
from privfl.errors import PrivflError, did_you_mean

_DRAW = "privfl.noise.discrete_gaussian.DiscreteGaussian.draw"
_GAUSSIAN = "privfl.dp.optimizer.gaussian"
_SAMPLE = "privfl.dp.training.poisson_sample"
_CLIP = "privfl.dp.clipping.ExampleClipper.clip"


def _agent(target: str, replace: Replace) -> Patch:
    return Patch("agent", target, replace)


def _trainer(target: str, replace: Replace) -> Patch:
    return Patch("trainer", target, replace)


_NO_PROBE = _agent("privfl.site.agent.prove", patches.always_true)

DEFECTS = (
    Defect(
        "noise-forgotten",
        "The sums carry no noise at all.",
        ("conformance", "canaries"),
        "fedsgd",
        (_agent(_DRAW, patches.times(0.0)),),
    ),
    Defect(
        "noise-forgotten-fedavg",
        "The steps of a site carry no noise at all.",
        ("conformance", "canaries"),
        "fedavg",
        (_trainer(_GAUSSIAN, patches.times(0.0)),),
    ),
    Defect(
        "noise-halved",
        "The noise has half the deviation that is charged.",
        ("conformance", "canaries"),
        "fedsgd",
        (_agent(_DRAW, patches.times(0.5)),),
        chance=True,
    ),
    Defect(
        "noise-halved-fedavg",
        "The noise has half the deviation that is charged.",
        ("conformance",),
        "fedavg",
        (_trainer(_GAUSSIAN, patches.times(0.5)),),
        chance=True,
    ),
    Defect(
        "shares-for-all",
        "Shares are sized 1 / sqrt(n) instead of 1 / sqrt(n - t): colluders leave too little.",
        ("conformance",),
        "fedsgd",
        (
            _agent(
                "privfl.noise.distributed.DistributedNoise.share_deviation", patches.for_all_members
            ),
        ),
        chance=True,
    ),
    Defect(
        "same-seed",
        "All sites draw the same noise, so that each can subtract the others'.",
        ("conformance",),
        "fedsgd",
        (_agent("privfl.site.setup.SiteSetup.randomness", patches.one_seed),),
    ),
    Defect(
        "same-seed-fedavg",
        "All trainers draw the same noise and samples.",
        ("conformance",),
        "fedavg",
        (_trainer("privfl.noise.randomness.SystemRandomness", patches.one_seed_in_trainers),),
    ),
    Defect(
        "torch-generator",
        "Samples come from a torch.Generator that nobody seeded: all sites choose alike.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, patches.torch_generator),),
    ),
    Defect(
        "noise-at-one-site",
        "Only one site adds noise, and that site can subtract it.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, patches.only_first),),
    ),
    Defect(
        "noise-uniform",
        "The noise has the right variance and is not Gaussian.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, patches.uniform_noise),),
        chance=True,
    ),
    Defect(
        "noise-repeated",
        "Every step gets the same noise, which two sums subtract.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, patches.repeated_noise),),
    ),
    Defect(
        "clipping-off",
        "A record changes a sum by as much as its gradient is long.",
        ("conformance", "canaries"),
        "fedsgd",
        (_trainer(_CLIP, patches.clipped_to(1e9)),),
    ),
    Defect(
        "clip-times-ten",
        "Gradients are cut to ten times the clipping norm.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, patches.clipped_to(10.0)),),
    ),
    Defect(
        "clip-times-ten-fedavg",
        "Gradients are cut to ten times the clipping norm.",
        ("conformance",),
        "fedavg",
        (_trainer(_CLIP, patches.clipped_to(10.0)),),
    ),
    Defect(
        "clip-per-layer",
        "Every layer is cut to the whole clipping norm, so two layers make sqrt(2) of it.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, patches.per_layer),),
    ),
    Defect(
        "rate-times-four",
        "Records take part four times as often as is charged.",
        ("conformance", "canaries"),
        "fedsgd",
        (_trainer(_SAMPLE, patches.rate_times(4.0)),),
        chance=True,
    ),
    Defect(
        "shuffled-batches",
        "Batches of a fixed size are charged as Poisson samples.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, patches.shuffled),),
    ),
    Defect(
        "batch-twice",
        "One sample serves two steps.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, patches.used_twice),),
    ),
    Defect(
        "rounds-uncharged",
        "Every second round is released without a charge.",
        ("conformance",),
        "fedsgd",
        (
            _agent("privfl.site.run_ledger.RunLedger._charge", patches.charged_half),
            _agent("privfl.site.run_ledger.RunLedger.check_release", patches.nothing),
        ),
    ),
    Defect(
        "masks-off",
        "Contributions are encrypted and not masked: a site's key opens each alone.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.masks.Masks.apply", patches.no_masks),
            _agent("privfl.secagg.masks.Masks.blinds", patches.no_blinds),
            _NO_PROBE,
        ),
    ),
    Defect(
        "masks-reused",
        "The same masks serve every round: two contributions reveal their difference.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.masks.Pairs.masks", patches.one_stream),
            _agent("privfl.secagg.key_exchange.ExchangeKey.pair_key", patches.fixed_info),
        ),
    ),
    Defect(
        "encryption-off",
        "The configuration says encrypted, and the integers travel masked only.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.ckks.SumKey.encrypt", patches.without_zero),
            _agent("privfl.secagg.ckks.SumKey.decrypt", patches.without_decryption),
            _NO_PROBE,
        ),
    ),
    Defect(
        "key-to-coordinator",
        "The key travels to the other sites in the clear, through the coordinator.",
        ("transcript",),
        "fedsgd",
        (
            _agent("privfl.secagg.session.handshake.seal_keys", patches.unsealed),
            _agent("privfl.secagg.session.handshake.open_keys", patches.opened),
        ),
    ),
    Defect(
        "sum-in-a-message",
        "A site's sum of gradients travels in a message, for debugging.",
        ("transcript",),
        "fedsgd",
        (_agent("privfl.site.active_run.ActiveRun._trained", patches.in_the_clear),),
    ),
    Defect(
        "padding-unclipped",
        "Batches are padded with a copy of their first record, which is not clipped.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, patches.padded),),
    ),
    Defect(
        "debit-after-release",
        "A round is charged when its sum is there: a crash in between is free.",
        ("conformance",),
        "fedsgd",
        (
            _agent("privfl.site.run_ledger.RunLedger._charge", patches.charged_later),
            _agent("privfl.site.run_ledger.RunLedger.check_release", patches.nothing),
            _agent("privfl.site.active_run.ActiveRun.combine", patches.charged_now),
        ),
    ),
    Defect(
        "reset-at-restart",
        "What earlier runs spent is forgotten when a ledger is opened again.",
        ("restarts",),
        "fedsgd",
        (_agent("privfl.ledger.ledger.Ledger.__init__", patches.starts_at_nothing),),
    ),
    Defect(
        "ledger-cut",
        "A site may go on with an old copy of its ledger, and the others do not mind.",
        ("restarts",),
        "fedsgd",
        (_agent("privfl.site.peer_heads.PeerHeads.keep", patches.nothing),),
    ),
    Defect(
        "refund-after-release",
        "A round that left the site is refunded when another site ends the run.",
        ("protocol",),
        "fedsgd",
        (_agent("privfl.site.run_ledger.RunLedger.make_final", patches.nothing),),
    ),
    Defect(
        "retry-uncharged",
        "A second attempt at a sum gets new noise and no charge: two looks for the price of one.",
        ("protocol",),
        "fedsgd",
        (
            _agent("privfl.federation.member._open_sum", patches.opened_again),
            _agent("privfl.site.active_run.ActiveRun._trained", patches.answer_kept),
            _agent("privfl.site.active_run.ActiveRun.contribute", patches.made_again),
        ),
    ),
    Defect(
        "key-substitution",
        "Signatures under the roster are not checked: the coordinator can stand between sites.",
        ("protocol",),
        "fedsgd",
        (
            _agent(
                "privfl.secagg.session.roster.Roster.check_signatures",
                patches.nothing,
            ),
        ),
    ),
    Defect(
        "masks-on-words",
        "Masks are added to the words of ciphertexts: their sum also tells how often values wrap.",
        ("transcript",),
        "fedsgd",
        (_agent("privfl.secagg.session.sums.encrypt", patches.masked_words), _NO_PROBE),
    ),
    Defect(
        "surplus-noise-kept",
        "One number of the noise in sixteen was used in the step before.",
        ("conformance",),
        "fedsgd",
        (_agent(_DRAW, patches.surplus_kept),),
    ),
    Defect(
        "biases-outside-norm",
        "The norm of a gradient leaves out biases, which are then as long as they are.",
        ("conformance",),
        "fedsgd",
        (_trainer(_CLIP, patches.without_biases),),
    ),
    Defect(
        "with-replacement",
        "A record can be in a batch several times, each time with a whole clipping norm.",
        ("conformance",),
        "fedsgd",
        (_trainer(_SAMPLE, patches.with_replacement),),
    ),
    Defect(
        "masks-of-the-run",
        "Masks come from the secret of the run: every site can take off those of two others.",
        ("conformance",),
        "fedsgd",
        (_agent("privfl.secagg.session.sums.SumSession.open", patches.masks_of_the_run),),
    ),
    Defect(
        "charges-in-memory",
        "A charge reaches the disk with the next one: a crash in between is free.",
        ("conformance",),
        "fedavg",
        (
            _agent("privfl.ledger.storage.Storage.add", patches.added_later),
            _agent("privfl.ledger.storage.Storage.close", patches.closed_later),
        ),
    ),
)
_BY_NAME = {defect.name: defect for defect in DEFECTS}


def named(name: str) -> Defect:
    """The defect of this name.

    Raises:
        PrivflError: If there is none.
    """
    if name not in _BY_NAME:
        raise PrivflError(f"there is no defect {name!r}{did_you_mean(name, list(_BY_NAME))}")
    return _BY_NAME[name]
