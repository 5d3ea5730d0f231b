"""How a run begins at the coordinator: the sites greet, sign, get the keys and prepare, until
they have agreed on what they will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from privfl.errors import PrivflError, ProtocolError
from privfl.federation.coordinator_state import (
    Phase,
    Plan,
    Result,
    Send,
    SetAdder,
    State,
    Tell,
    expect,
    fail,
    rank_of,
    ranks,
    to_all,
)
from privfl.federation.messages import (
    Agreed,
    Begin,
    Hello,
    Member,
    Message,
    Prepared,
    Signed,
    Welcome,
    weights_of,
)
from privfl.federation.news import Greeted, ReadySite, Started


def greet(plan: Plan, state: State, rank: int, hello: Hello) -> Result:
    expect(state, rank, Phase.GREETING, "a greeting")
    if rank in state.hellos:
        raise ProtocolError(f"rank {rank} greeted twice")
    state = replace(state, hellos={**state.hellos, rank: hello})
    if hello.error is not None:
        return fail(state, f"site {state.site(rank)}: {hello.error}", hello.exit_code)
    if hello.site not in plan.sites:
        raise PrivflError(
            f"rank {rank} calls itself {hello.site!r}, which is not one of the experiment's sites: "
            f"{', '.join(plan.sites)}"
        )
    for other, earlier in state.hellos.items():
        if other != rank and earlier.site == hello.site:
            raise PrivflError(
                f"ranks {min(rank, other)} and {max(rank, other)} both are site {hello.site!r}; "
                "give every rank its own PRIVFL_SITE, or none"
            )
    if hello.digest != plan.digest:
        raise PrivflError(
            f"site {hello.site} reads another experiment than the coordinator; give every rank the "
            "same file and --set options"
        )
    if dict(hello.versions) != dict(plan.versions):
        raise PrivflError(
            f"site {hello.site} runs {_versions(hello.versions)}, the coordinator "
            f"{_versions(plan.versions)}; install the same versions"
        )
    if len(state.hellos) < len(plan.sites):
        return state, ()
    members = tuple(_member(state, site) for site in plan.sites)
    state = replace(state, phase=Phase.SIGNING)
    welcome = Welcome(run=plan.run.hex(), folder=plan.folder, digest=plan.digest, members=members)
    return state, (Tell(Greeted()), *to_all(plan, state, welcome))


def _member(state: State, site: str) -> Member:
    rank = rank_of(state, site)
    hello = state.hellos[rank]
    return Member(site=site, rank=rank, exchange_key=hello.exchange_key, identity=hello.identity)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def take_signature(plan: Plan, state: State, rank: int, body: Signed) -> Result:
    expect(state, rank, Phase.SIGNING, "a signature")
    if rank in state.signed:
        raise ProtocolError(f"site {state.site(rank)} signed twice")
    state = replace(state, signed={**state.signed, rank: body})
    if len(state.signed) < len(plan.sites):
        return state, ()
    state = replace(state, phase=Phase.PREPARING)
    agreed = Agreed(
        signatures={state.site(r): signed.signature for r, signed in state.signed.items()}
    )
    return state, to_all(plan, state, agreed)


def relay_key(plan: Plan, state: State, rank: int, message: Message) -> Result:
    expect(state, rank, Phase.PREPARING, "a sealed key")
    if state.site(rank) != plan.sites[0] or not 0 < message.part < len(plan.sites):
        raise ProtocolError(f"site {state.site(rank)} sent a sealed key that is not its to send")
    return state, (Send(rank_of(state, plan.sites[message.part]), message),)


def prepare(plan: Plan, state: State, rank: int, body: Prepared) -> Result:
    expect(state, rank, Phase.PREPARING, "its preparation")
    if rank in state.prepared:
        raise ProtocolError(f"site {state.site(rank)} prepared twice")
    state = replace(state, prepared={**state.prepared, rank: body})
    if len(state.prepared) < len(plan.sites):
        return state, ()
    everybody = list(state.prepared.values())
    if len({p.parameters for p in everybody}) > 1:
        counts = ", ".join(
            f"{state.site(r)} {p.parameters}" for r, p in sorted(state.prepared.items())
        )
        raise PrivflError(
            f"model() has another number of trainable parameters at some sites ({counts}); give "
            "every site the same model"
        )
    if len({p.tag for p in everybody}) > 1:
        raise PrivflError(
            "model() gives different initial parameters at different sites; let it use torch's "
            "random numbers only, which are seeded alike"
        )
    layouts = [p.layout for p in everybody if p.layout]
    if any(layout != layouts[0] for layout in layouts):
        raise PrivflError(
            "a metric returns another number of ratios at some sites; return the same number "
            "everywhere, also for classes a site lacks"
        )
    records = {state.site(r): p.records for r, p in state.prepared.items()}
    begin = Begin(
        parameters=everybody[0].parameters,
        layout=layouts[0] if layouts else {},
        records={site: records[site] for site in plan.sites},
        noise_multiplier=max(p.noise_multiplier for p in everybody) if plan.shared_noise else 0.0,
    )
    shares = weights_of(plan.weights, begin)
    by_site = {site: state.prepared[rank_of(state, site)] for site in plan.sites}
    users = [plan.user, *(state.hellos[rank].user for rank in ranks(plan))]
    started = Started(
        parameters=begin.parameters,
        sites={site: _ready(prepared, shares[site], begin) for site, prepared in by_site.items()},
        words_add=all(prepared.words_add for prepared in everybody),
        pinned=tuple(site for site, prepared in by_site.items() if prepared.pinned),
        separate_users=len(set(users)) == len(users),
    )
    return replace(state, begin=begin), (
        Tell(started),
        SetAdder(started.words_add),
        *to_all(plan, state, begin),
    )


def _ready(prepared: Prepared, weight: float, begin: Begin) -> ReadySite:
    return ReadySite(
        records=prepared.records,
        weight=weight,
        noise_multiplier=begin.noise_multiplier or prepared.noise_multiplier,
        sampling_rate=prepared.sampling_rate,
        planned_epsilon=prepared.planned_epsilon,
        evaluation_epsilon=prepared.evaluation_epsilon,
        metrics_noise=prepared.metrics_noise,
        accountant=prepared.accountant,
        ledger=prepared.ledger,
        rules=prepared.rules,
        outside=prepared.outside,
    )
