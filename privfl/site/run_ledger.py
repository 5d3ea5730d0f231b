"""A site's ledger during one run: every round is charged before the trainer starts, and checked
again before anything leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from privfl.accounting import Account, Event, NonPrivate
from privfl.admission.plan import run_facts
from privfl.admission.policy import check_members
from privfl.errors import InternalError, PrivflError
from privfl.federation.messages import SignedHead
from privfl.ledger import Ledger, Row, head_bytes
from privfl.secagg.session.roster import Roster
from privfl.site.observer import Observer
from privfl.site.setup import SiteSetup


class RunLedger:
    """The ledger as one run sees it.

    Args:
        setup: what this site brings to the run.
        roster: the members of the run.
        run: the run, in hexadecimal.
        output: the site's folder for results, where the ledger of a run alone lies.
        observer: told of every charge.

    Raises:
        PrivflError: If the ledger cannot be used, or was changed since the run was admitted.
    """

    def __init__(
        self, setup: SiteSetup, roster: Roster, run: str, output: Path, observer: Observer
    ) -> None:
        self._setup, self._roster, self._run, self._observer = setup, roster, run, observer
        self._plan = setup.plan
        self._plans = self._plan.plans()
        self._steps: dict[Account, int] = dict.fromkeys(self._plans, 0)
        self._unreleased: dict[Account, Row] = {}
        self._contributions: dict[tuple[int, str], int] = {}
        file = setup.file.ledger
        if file is not None:
            path, network = Path(file.file), file.network_file_system
        else:
            # The ledger of this run alone goes where the run's results go, whatever disk that is.
            path, network = output / f"run-{run[:8]}.ledger", True
        self._ledger = Ledger.write(path, setup.site, setup.plan.filters, network=network)
        try:
            self._check_unchanged()
        except BaseException:
            self._ledger.close()
            raise

    def _check_unchanged(self) -> None:
        plan = self._plan
        changed = plan.kept and (
            len(self._ledger.rows) > 1 if plan.head is None else self._ledger.head != plan.head
        )
        if changed or self._ledger.filters != plan.filters:
            raise PrivflError(
                f"the ledger {self._ledger.path} was changed or replaced while this run started; "
                "look at it, and start again"
            )

    def begin(self, noise_multiplier: float, outside: Sequence[str]) -> None:
        """Write down what this run is going to do, with the noise that the sites agreed on;
        before that nothing can be charged.

        Args:
            noise_multiplier: of the training steps.
            outside: what data() says that no epsilon covers.

        Raises:
            ProtocolError: If ``noise_multiplier`` is less than this site needs.
        """
        self._plan = self._plan.with_noise(noise_multiplier)
        self._plans = self._plan.plans()
        facts = run_facts(
            self._setup.experiment,
            self._plans,
            kept=self._plan.kept,
            outside=outside,
            members={member.site: member.identity for member in self._roster.members},
            records_per_person=self._setup.file.records_per_person,
            identity=self._setup.identity.public,
            pinned=self._setup.pinned,
        )
        self._ledger.begin_run(self._run, facts.to_dict())
        if not self._setup.experiment.private:
            for account in self._plans:
                self._ledger.charge(account, NonPrivate(what="insecure_test_seed"), self._run, 0)

    # -- charges -----------------------------------------------------------------------------------

    def charge_round(self, round_: int) -> None:
        """Debit the local steps of a round: one that dies half way was spent.

        Raises:
            BudgetError: If the budget does not admit them.
        """
        self._charge("training", self._setup.experiment.local_steps, round_)

    def charge_metrics(self, round_: int) -> None:
        """Debit one release of metrics.

        Raises:
            BudgetError: If the budget does not admit it.
        """
        self._charge("evaluation", 1, round_)

    def _charge(self, account: Account, steps: int, round_: int) -> None:
        event = self.event(account, steps)
        self._unreleased[account] = self._ledger.charge(account, event, self._run, round_)
        self._steps[account] += steps
        self._observer.charged(self._setup.site, account, event, round_)

    def steps(self, account: Account) -> int:
        """Steps of this run so far."""
        return self._steps.get(account, 0)

    def event(self, account: Account, steps: int) -> Event:
        """So many steps of what this run does to an account's records."""
        return self._plans[account].times(steps)

    def epsilon(self, account: Account) -> float:
        """What this run has cost the account's records so far, in the accountant that admits the
        run.
        """
        if account not in self._plans:
            return 0.0
        return self._plan.epsilon(account, [self.event(account, self._steps[account])])

    # -- releases ----------------------------------------------------------------------------------

    def check_release(
        self,
        account: Account,
        round_: int,
        members: Sequence[str],
        active: Mapping[str, bool],
        *,
        costs: bool,
    ) -> None:
        """Check policy and ledger once more, before a contribution to a sum is made.

        Args:
            account: whose records the contribution depends on.
            round_: the round of the sum.
            members: the sites of the sum.
            active: the protections, and whether they are in place.
            costs: whether the contribution must have been charged; metrics of public records, or of
                none, are not.

        Raises:
            PrivflError: If the policy does not allow this sum.
            InternalError: If a protection is not active, or the contribution was not charged.
        """
        policy, due = (
            self._setup.file,
            self._setup.experiment.local_steps if account == "training" else 1,
        )
        missing = [
            name for name in ("encryption", "masks", *policy.require) if not active.get(name, False)
        ]
        if missing:
            raise InternalError(
                f"{missing[0]} is not active at site {self._setup.site}; nothing was sent"
            )
        check_members(self._setup.site, self._setup.experiment, policy, len(members))
        attempts = self._contributions[round_, account] = (
            self._contributions.get((round_, account), 0) + 1
        )
        if attempts > policy.attempts:
            raise PrivflError(
                f"the policy of site {self._setup.site} allows {policy.attempts} attempts at one "
                "sum (attempts in its site file)"
            )
        if costs and self._ledger.charged(account, self._run, round_) != due:
            raise InternalError(
                f"round {round_} was not charged to the {account} records; nothing was sent"
            )

    def make_final(self, account: Account) -> None:
        """The charge stays from now on: something that depends on what was last charged is about
        to leave.
        """
        row = self._unreleased.pop(account, None)
        if row is not None:
            self._ledger.make_final(row)

    def refund_unreleased(self) -> None:
        """Refund the charges of which nothing left because others ended the run; the trainer is
        dead and its results are gone.
        """
        for account, row in self._unreleased.items():
            self._ledger.refund(row, "peer")
            self._steps[account] -= row.steps
        self._unreleased.clear()

    def head(self, round_: int, attempt: int) -> SignedHead:
        """The head of the ledger, signed for this round after so many sums."""
        head = self._ledger.head
        signature = self._setup.identity.sign(head_bytes(head, self._run, round_, attempt)).hex()
        return SignedHead(
            attempt=attempt, ledger=head.ledger, rows=head.rows, hash=head.hash, signature=signature
        )

    def close(self) -> None:
        """Close the ledger, for another program to use."""
        self._ledger.close()
