"""Pinned identities: a site knows beforehand who the other sites are, or the run says that it does
not.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from privfl.errors import PrivflError, ProtocolError
from privfl.identity import Identity, load_identity, public_bytes, verify
from privfl.secagg import ExchangeKey, derive
from privfl.secagg.session.roster import Member, Roster
from privfl.site.artifacts import share_model
from tests.conftest import Job, run_cli, run_twin, train

SITES = ("aa", "bbb")


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    """Site files in which each site has pinned the key of the other, made as a user would."""
    folder = tmp_path / "sites"
    folder.mkdir()
    public = {
        site: run_cli("keys", "generate", folder / f"{site}.key").out.strip() for site in SITES
    }
    for site, other in (SITES, SITES[::-1]):
        (folder / f"{site}.yaml").write_text(
            f"identity: {site}.key\npeers: {{{other}: '{public[other]}'}}\nrequire: "
            f"[pinned_keys]\noutput: ../of_{site}\n"
        )
    return folder


def one_sentence(job: Job, *parts: str) -> None:
    sentences = [line for line in job.err.splitlines() if line.startswith("privfl: ")]
    assert (job.code, len(sentences)) == (2, 1), job.err
    assert all(part in sentences[0] for part in parts), sentences


def test_keys_are_made_once_readable_for_their_owner_and_shown(tmp_path: Path):
    file = tmp_path / "site.key"
    made = run_cli("keys", "generate", file)
    assert made.code == 0, made.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run_cli("keys", "show", file).out == made.out
    assert len(public_bytes(made.out.strip())) == 32
    one_sentence(run_cli("keys", "generate", file), "exists already; nothing was written")
    one_sentence(run_cli("keys", "generate", tmp_path / "no" / "x"), "cannot write")
    one_sentence(
        run_cli("keys", "show", tmp_path / "none"),
        "cannot read the identity",
        "privfl keys generate",
    )
    file.chmod(0o640)
    one_sentence(run_cli("keys", "show", file), "chmod 600")
    file.chmod(0o600)
    file.write_text("no key")
    one_sentence(run_cli("keys", "show", file), "holds no private key", "privfl keys generate")


@pytest.fixture
def accounts_of_their_own(trainers_as_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank of a twin runs as if under an account of its own.

    With processes one user cannot show that.
    """
    own = os.getuid()

    def account() -> int:
        kind, _, number = threading.current_thread().name.partition(" ")
        return int(number) if kind == "rank" else own

    monkeypatch.setattr(os, "getuid", account)


@pytest.mark.usefixtures("accounts_of_their_own")
def test_a_run_with_pinned_keys_says_so(small: Path, sites: Path, tmp_path: Path):
    job = run_twin(small, output=tmp_path / "o", ranks=3, sites=sites)
    assert job.codes == [0] * 3, job.err
    assert (
        "trust: pinned keys: every site knows the keys of all others, and each runs under an "
        "account of its own" in job.out
    )
    assert json.loads((job.folder / "summary.json").read_text())["trust"] == "pinned keys"


def test_one_account_is_a_single_trust_domain_whatever_is_pinned(
    small: Path, sites: Path, tmp_path: Path
):
    job = train(3, small, "--sites", sites, "--output", tmp_path / "o")
    assert job.code == 0, job.err
    assert (
        "trust: single trust domain: every site has pinned the keys of the others, but several "
        "parties run under one account" in job.out
    )
    assert json.loads((job.folder / "summary.json").read_text())["trust"] == "single trust domain"
    # A site that pins keeps model and log out of the coordinator's folder all the same.
    reports = {"report.html", "report.json"}
    assert {path.name for path in job.folder.iterdir()} == {
        "experiment.yaml",
        "rounds.jsonl",
        "summary.json",
        *reports,
    }
    names = {path.name for path in (tmp_path / "of_aa").iterdir()}
    (ledger,) = {name for name in names if name.endswith(".ledger")}
    assert names == {"model.safetensors", "site.log", "heads.jsonl", ledger, f"{ledger}.lock"}
    for file in (tmp_path / "of_aa").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, (
            "logs quote what user code says of records"
        )


def test_a_model_is_shared_in_a_new_file_of_its_owner_only(tmp_path: Path):
    (tmp_path / "experiment.yaml").write_text("# run 17")
    model = tmp_path / "of_site"
    model.write_bytes(b"weights")
    share_model(model, tmp_path, "17", "aa")
    shared = tmp_path / "model.safetensors"
    assert (shared.read_bytes(), stat.S_IMODE(shared.stat().st_mode)) == (b"weights", 0o600)
    share_model(model, tmp_path, "other run", "bbb")
    # What somebody put in the way, to read along or to lead elsewhere, is not written to.
    trap = tmp_path / ".model.aa"
    for lay in (lambda: trap.touch(0o666), lambda: trap.symlink_to(tmp_path / "elsewhere")):
        lay()
        with pytest.raises(OSError, match="exists"):
            share_model(model, tmp_path, "17", "aa")
        assert not (tmp_path / "elsewhere").exists()
        assert trap.is_symlink() or trap.read_bytes() == b""
        trap.unlink()


@pytest.mark.usefixtures("accounts_of_their_own")
def test_one_site_that_pins_nothing_makes_it_a_single_trust_domain(
    small: Path, sites: Path, tmp_path: Path
):
    (sites / "bbb.yaml").write_text("identity: bbb.key\n")
    job = run_twin(small, output=tmp_path / "o", ranks=3, sites=sites)
    assert job.codes == [0] * 3, job.err
    assert (
        "trust: single trust domain: only aa has pinned the keys of the others; all must" in job.out
    )
    assert json.loads((job.folder / "summary.json").read_text())["secure_aggregation"][
        "keys_pinned_by"
    ] == ["aa"]
    assert json.loads((job.folder / "summary.json").read_text())["trust"] == "single trust domain"


def test_another_key_than_the_pinned_one_is_refused_before_a_record_is_read(
    small: Path, sites: Path, tmp_path: Path
):
    (sites / "bbb.key").unlink()
    other = run_cli("keys", "generate", sites / "bbb.key").out.strip()
    job = train(3, small, "--sites", sites, "--output", tmp_path / "o")
    one_sentence(
        job,
        "site aa: site bbb shows the key " + other,
        "is pinned for it",
        "peers in the file of site aa",
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("require: [pinned_keys]\n", ("pins no key for bbb", "privfl keys show")),
        ("identity: aa.key\nrequire: [pinned_keys]\n", ("pins no key for bbb",)),
        (
            "output: x\nidentity: aa.key\npeers: {ccc: 'ed25519:" + 43 * "A" + "'}\n",
            ("pins no key for bbb",),
        ),
        (
            "identity: aa.key\npeers: {bbb: 'ed25519:" + 43 * "A" + "'}\n",
            ("has peers but no output", "aa.yaml"),
        ),
        ("peers: {bbb: 'ed25519:" + 43 * "A" + "'}\n", ("has peers but no identity", "aa.yaml")),
        (
            "identity: aa.key\npeers: {bbb: ssh-ed25519 AAAA}\n",
            ("peers.bbb", "must be 'ed25519:' and 43 characters", "aa.yaml"),
        ),
        ("identity: nowhere.key\n", ("cannot read the identity", "sites/nowhere.key")),
        ("require: [everything]\n", ("require", "pinned_keys", "aa.yaml")),
    ],
)
def test_site_files_that_do_not_fit(
    small: Path, sites: Path, tmp_path: Path, text: str, parts: tuple[str, ...]
):
    (sites / "aa.yaml").write_text(text)
    twin = run_twin(small, output=tmp_path / "o", ranks=3, sites=sites)
    assert twin.codes == [2] * 3
    one_sentence(Job(2, twin.out, twin.err), *parts)
    assert not list(tmp_path.rglob("site.log")), "before a record is read"


# -- signatures ------------------------------------------------------------------------------------


def test_a_signature_fits_one_message_of_one_key():
    one, two = Identity(), Identity.from_pem(Identity().pem())
    signature = one.sign(b"message")
    verify(one.public, signature, b"message")
    for public, signed, message in (
        (two.public, signature, b"message"),
        (one.public, signature, b"massage"),
        (one.public, signature[:-1], b"message"),
    ):
        with pytest.raises(ProtocolError, match="does not fit"):
            verify(public, signed, message)
    with pytest.raises(ProtocolError, match="does not fit"):
        verify("ed25519:short", signature, b"message")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        "A" * 43,
        "ed25519:" + "A" * 42,
        "ed25519:" + "A" * 42 + "B",
        "ed25519:" + "*" * 43,
        "rsa:" + "A" * 43,
    ],
)
def test_what_is_no_public_key(text: str):
    with pytest.raises(ValueError, match=r"must be|is no public key"):
        public_bytes(text)


def test_everything_that_is_agreed_on_is_in_the_digest():
    def member(site: str) -> Member:
        return Member(site, ExchangeKey().public, Identity().public)

    members = (member("a"), member("b"))
    base = Roster.of("run", "digest", derive(2, 20), members)
    assert base.digest == Roster.of("run", "digest", derive(2, 20), members).digest
    others = [
        Roster.of("other", "digest", derive(2, 20), members),
        Roster.of("run", "other", derive(2, 20), members),
        Roster.of("run", "digest", derive(2, 21), members),
        Roster.of("run", "digest", derive(2, 20), members[::-1]),
        Roster.of("run", "digest", derive(2, 20), (members[0], member("b"))),
        Roster.of(
            "run",
            "digest",
            derive(2, 20),
            (members[0], Member("b", members[1].exchange_key, Identity().public)),
        ),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 7


def test_an_identity_of_another_kind_is_refused(tmp_path: Path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "ec.key"
    file.touch(0o600)
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(PrivflError, match="another kind than Ed25519"):
        load_identity(str(file))
