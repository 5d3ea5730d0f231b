"""A site's book during one run: every round is charged before the trainer starts, and looked at again before anything leaves."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from privfl.accounting import Account, Event, NonPrivate
from privfl.admission.plan import check_members
from privfl.errors import InternalError, PrivflError, ProtocolError
from privfl.federation.messages import SignedHead
from privfl.identity import verify
from privfl.ledger import Head, Ledger, Row, head_bytes
from privfl.secagg.session.roster import Agreement
from privfl.site.artifacts import open_log
from privfl.site.setup import SiteSetup


class Book:
    """The ledger as one run sees it.

    Raises (from the constructor):
        PrivflError: the ledger cannot be used, or no longer admits the run.
    """

    def __init__(self, setup: SiteSetup, agreement: Agreement, run: str, output: Path) -> None:
        self._setup, self._agreement, self._run, self._output = setup, agreement, run, output
        self._allowance = setup.allowance
        self._plans = self._allowance.plans()
        self._steps: dict[Account, int] = dict.fromkeys(self._plans, 0)
        self._open: dict[Account, Row] = {}
        self._contributions: dict[tuple[int, str], int] = {}
        # The last head that each site ever showed here, by site and ledger, and which ledger each site has in this run.
        self._heads = _heads_before(output / "heads.jsonl")
        self._ledgers: dict[str, str] = {}
        file = setup.file.ledger
        if file is not None:
            path, network = Path(file.file), file.network_file_system
        else:
            # The book of this run alone goes where the run's results go, whatever disk that is.
            path, network = output / f"run-{run[:8]}.ledger", True
        self._ledger = Ledger.write(path, setup.site, setup.allowance.filters, network=network)
        try:
            self._check_unchanged()
        except BaseException:
            self._ledger.close()
            raise

    def _check_unchanged(self) -> None:
        allowance = self._allowance
        expected = allowance.head
        changed = allowance.kept and (len(self._ledger.rows) > 1 if expected is None else self._ledger.head != expected)
        if changed or self._ledger.filters != allowance.filters:
            raise PrivflError(
                f"the ledger {self._ledger.path} was changed or replaced while this run started; look at it, and start again"
            )

    def begin(self, noise_multiplier: float, outside: Sequence[str]) -> None:
        """Write down what this run is going to do, with the noise that the sites agreed on; before that nothing can be charged.

        Args:
            outside: what data() says that no epsilon covers.

        Raises:
            ProtocolError: it is less than this site needs.
        """
        self._allowance = self._allowance.with_noise(noise_multiplier)
        self._plans = self._allowance.plans()
        allowance, experiment = self._allowance, self._setup.experiment
        facts = {
            "experiment": experiment.digest(),
            "model": experiment.model,
            "data": experiment.data,
            "rounds": experiment.rounds,
            "noise": experiment.privacy.noise,
            "collusion": experiment.collusion,
            "delta": allowance.delta,
            "target_epsilon": experiment.privacy.target_epsilon,
            "private": experiment.private,
            "plans": {account: event.to_dict() for account, event in self._plans.items()},
            "exact_metrics": sorted(experiment.evaluation.metrics) if experiment.evaluation.records == "public" else [],
            "outside": list(outside),
            "records_per_person": self._setup.file.records_per_person,
            "identity": self._setup.identity.public,
            "pinned": self._setup.pinned,
            "kept": allowance.kept,
            "members": {party.site: party.identity for party in self._agreement.members},
        }
        self._ledger.begin_run(self._run, facts)
        if not experiment.private:
            for account in self._plans:
                self._ledger.charge(account, NonPrivate(what="insecure_test_seed"), self._run, 0)

    # -- charges -------------------------------------------------------------------------------------------------

    def charge_round(self, round_: int) -> None:
        """Debit the local steps of a round: one that dies half way was spent.

        Raises:
            BudgetError: the budget does not admit it.
        """
        self._charge("training", self._setup.experiment.local_steps, round_)

    def charge_metrics(self, round_: int) -> None:
        """Debit one release of held-out metrics.

        Raises:
            BudgetError: the budget does not admit it.
        """
        self._charge("evaluation", 1, round_)

    def _charge(self, account: Account, steps: int, round_: int) -> None:
        self._open[account] = self._ledger.charge(account, self.event(account, steps), self._run, round_)
        self._steps[account] += steps

    def steps(self, account: Account) -> int:
        """Steps of this run so far."""
        return self._steps.get(account, 0)

    def event(self, account: Account, steps: int) -> Event:
        """So many steps of what this run does to an account's records."""
        return self._plans[account].times(steps)

    def epsilon(self, account: Account) -> float:
        """What this run has cost the account's records so far, in the accountant that admits the run."""
        if account not in self._plans:
            return 0.0
        return self._allowance.epsilon(account, [self.event(account, self._steps[account])])

    # -- releases ------------------------------------------------------------------------------------------------

    def check_release(
        self, account: Account, round_: int, members: Sequence[str], active: Mapping[str, bool], *, costs: bool
    ) -> None:
        """The policy and the book once more, before a contribution to a sum is made.

        Args:
            active: the protections, and whether they are in place.
            costs: whether it must have been charged; metrics of public records, or of none, are not.

        Raises:
            PrivflError: the policy does not allow this sum.
            InternalError: it was not charged.
        """
        policy, due = self._setup.file, self._setup.experiment.local_steps if account == "training" else 1
        missing = [name for name in ("encryption", "masks", *policy.require) if not active.get(name, False)]
        if missing:
            raise InternalError(f"{missing[0]} is not active at site {self._setup.site}; nothing was sent")
        check_members(self._setup.site, self._setup.experiment, policy, len(members))
        attempts = self._contributions[round_, account] = self._contributions.get((round_, account), 0) + 1
        if attempts > policy.attempts:
            raise PrivflError(
                f"the policy of site {self._setup.site} allows {policy.attempts} attempts at one sum (attempts in its site file)"
            )
        if costs and self._ledger.charged(account, self._run, round_) != due:
            raise InternalError(f"round {round_} was not charged to the {account} records; nothing was sent")

    def leaves(self, account: Account) -> None:
        """Something that depends on what was last charged is about to leave: the charge stays."""
        row = self._open.pop(account, None)
        if row is not None:
            self._ledger.leaves(row)

    def refund_unsent(self) -> None:
        """Take back what was charged and never left, because others ended the run; the trainer is dead and its results are gone."""
        for account, row in self._open.items():
            self._ledger.refund(row, "peer")
            self._steps[account] -= row.steps
        self._open.clear()

    # -- heads ---------------------------------------------------------------------------------------------------

    def head(self, round_: int, attempt: int) -> SignedHead:
        """The head of the ledger, signed for this round after so many sums."""
        head = self._ledger.head
        signature = self._setup.identity.sign(head_bytes(head, self._run, round_, attempt)).hex()
        return SignedHead(attempt=attempt, ledger=head.ledger, rows=head.rows, hash=head.hash, signature=signature)

    def keep_heads(self, round_: int, attempt: int, heads: Mapping[str, SignedHead]) -> None:
        """Check what the other sites show of their books, and write it down where it outlives the run.

        Raises:
            ProtocolError: a head is missing, forged, or behind an earlier one.
        """
        identities = {party.site: party.identity for party in self._agreement.members}
        if set(heads) != set(identities):
            raise ProtocolError("the coordinator relays heads of other ledgers than those of this run's members")
        for site, shown in heads.items():
            head = Head(shown.ledger, shown.rows, shown.hash)
            try:
                verify(identities[site], bytes.fromhex(shown.signature), head_bytes(head, self._run, round_, attempt))
            except (ProtocolError, ValueError) as error:
                raise ProtocolError(f"the head of the ledger of site {site} is not signed by it") from error
            before = self._heads.get((site, head.ledger), head)
            back = head.rows < before.rows or (head.rows == before.rows and head.hash != before.hash)
            if back or self._ledgers.setdefault(site, head.ledger) != head.ledger:
                raise ProtocolError(f"the ledger of site {site} went back: rows that it had shown to this site are gone")
            self._heads[site, head.ledger] = head
        record = {"run": self._run, "round": round_, "heads": {site: shown.model_dump() for site, shown in heads.items()}}
        self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        path = self._output / "heads.jsonl"
        try:
            with open_log(path) as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PrivflError(f"cannot write {path}: {error.strerror}") from error

    def close(self) -> None:
        self._ledger.close()


def _heads_before(path: Path) -> dict[tuple[str, str], Head]:
    """What earlier runs wrote down in ``path``, if anything; a line that a crash cut off is passed over, and ended so that the next one is whole."""
    found: dict[tuple[str, str], Head] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):
        with open_log(path) as file:
            file.write("\n")
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            for site, shown in json.loads(line)["heads"].items():
                head = Head.from_dict(shown)
                if (site, head.ledger) not in found or head.rows >= found[site, head.ledger].rows:
                    found[site, head.ledger] = head
    return found
