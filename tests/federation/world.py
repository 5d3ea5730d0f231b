"""A coordinator and its members in one thread, without MPI, encryption or torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from privfl.federation import coordinator as lead
from privfl.federation import member, messages
from privfl.federation.messages import Kind, Message, decode
from privfl.federation.news import News

RUN = bytes(range(16))
SITES = ("a", "b", "c")
BLOCKS = 2


def plan(**changes: Any) -> lead.Plan:
    fields: dict[str, Any] = {
        "run": RUN,
        "folder": "/f",
        "digest": "d",
        "versions": {"privfl": "1"},
        "sites": SITES,
        "rounds": 2,
        "evaluate_every": 1,
        "weights": "uniform",
        "shared_noise": False,
        "blocks": lambda vector, numbers: BLOCKS,
    }
    return lead.Plan(**fields | changes)


def hello(site: str, **changes: Any) -> Message:
    return Message.of(
        messages.Hello(
            **{
                "site": site,
                "digest": "d",
                "versions": {"privfl": "1"},
                "exchange_key": site * 8,
                "identity": f"id {site}",
            }
            | changes
        )
    )


def prepared(**changes: Any) -> messages.Prepared:
    fields: dict[str, Any] = {
        "records": 10,
        "parameters": 7,
        "layout": {"accuracy": 1},
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "planned_epsilon": 1.0,
        "evaluation_epsilon": 0.0,
        "metrics_noise": 0.0,
        "accountant": "rdp",
        "ledger": "none",
        "rules": None,
        "tag": "t",
        "pinned": False,
        "words_add": True,
        "outside": (),
    }
    return messages.Prepared(**fields | changes)


HEAD = messages.SignedHead(attempt=0, ledger="l", rows=1, hash="h", signature="s")
TRAINED = messages.Trained(event={"kind": "x"}, steps=3, epsilon=0.5, head=HEAD, sealed_range="s")


class World:
    """A coordinator and members that exchange encoded bytes; the heavy work is replaced by fixed
    answers.
    """

    def __init__(self, p: lead.Plan) -> None:
        self.plan = p
        self.state = lead.State()
        self.members = {
            rank: member.State(site, "d", p.sites, p.rounds, p.evaluate_every)
            for rank, site in enumerate(p.sites, 1)
        }
        self.news: list[News] = []
        self.folded: list[int] = []
        self.wire: list[tuple[int, int, Message]] = []
        self.code: int | None = None

    def to_lead(self, rank: int, message: Message) -> None:
        self.wire.append((rank, 0, message))
        self.state, outputs = lead.step(self.plan, self.state, rank, decode(*message.encode()))
        self.perform(outputs)

    def perform(self, outputs: tuple[lead.Output, ...]) -> None:
        for output in outputs:
            match output:
                case lead.Send():
                    self.to_member(output.rank, output.message)
                case lead.Fold():
                    self.folded.append(output.part)
                case lead.Release():
                    for rank in output.ranks:
                        for part in range(output.blocks):
                            self.to_member(
                                rank,
                                replace(
                                    output.message, part=part, parts=output.blocks, bulk=b"sum"
                                ),
                            )
                case lead.Tell():
                    self.news.append(output.news)
                case lead.Dismiss():
                    self.code = output.exit_code

    def to_member(self, rank: int, message: Message) -> None:
        self.wire.append((0, rank, message))
        blocks = {"update": BLOCKS, "metrics": BLOCKS}
        self.members[rank], actions = member.step(
            self.members[rank], decode(*message.encode()), blocks.__getitem__
        )
        for action in actions:
            self.act(rank, action)

    def answer(self, rank: int, body: messages.Body) -> None:
        self.members[rank], message = member.done(self.members[rank], body)
        self.queue.append((rank, message))

    def act(self, rank: int, action: member.Action) -> None:
        state = self.members[rank]
        match action:
            case member.Prepare():
                self.answer(rank, messages.Signed(signature=f"s{rank}"))
            case member.Verify():
                if action.make_key:
                    self.queue += [
                        (rank, Message(Kind.SEALED_KEY, RUN, part=i, parts=len(SITES), bulk=b"key"))
                        for i in (1, 2)
                    ]
                    self.answer(rank, prepared())
            case member.Unseal():
                self.answer(rank, prepared())
            case member.Train():
                self.answer(rank, TRAINED)
            case member.Contribute():
                parts = BLOCKS if self.plan.path == "star" else 1
                for part in range(parts):
                    message = Message(
                        Kind.CONTRIBUTION, RUN, state.round, state.attempt, part, parts, bulk=b"c"
                    )
                    self.queue.append((rank, message))
                self.members[rank] = member.contributed(state)
            case member.Combine(vector="update"):
                self.answer(rank, messages.Applied(tag=f"t{state.round}"))
            case member.Combine(vector="metrics"):
                self.answer(
                    rank,
                    messages.Measured(
                        metrics={"accuracy": 0.5}, event=None, epsilon=0.0, head=HEAD
                    ),
                )
            case member.Write():
                self.answer(rank, messages.Finished(model="m", log="l"))

    def run(self, choose: Any = lambda n: 0) -> None:
        self.queue: list[tuple[int, Message]] = []
        for rank, site in enumerate(self.plan.sites, 1):
            self.to_lead(rank, hello(site))
        while self.queue:
            # Any order between sites is possible, but not between the messages of one site.
            ranks = sorted({rank for rank, _ in self.queue})
            rank = ranks[choose(len(ranks))]
            index = next(i for i, (r, _) in enumerate(self.queue) if r == rank)
            self.to_lead(*self.queue.pop(index))
