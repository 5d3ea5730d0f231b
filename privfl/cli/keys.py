"""`privfl keys`: the identity by which the other sites of a consortium know this one."""

from __future__ import annotations

import os
from pathlib import Path

import click

from privfl.cli.help import example
from privfl.errors import PrivflError


@click.group(
    name="keys",
    short_help="Make a site's identity, or show its public key.",
    epilog=example(
        "privfl keys generate mine/sites/aa.key",
        "name the file as identity in mine/sites/aa.yaml, and pin the other sites' keys as peers",
    ),
)
def command() -> None:
    """Make a site's identity, an Ed25519 key pair, or show its public key.

    With pinned identities no coordinator can put itself between the sites.
    """


@command.command(
    short_help="Write a new private key, and print the public one.",
    epilog=example(
        "privfl keys generate mine/sites/aa.key",
        "send the printed line to the other sites over a channel you trust, for their peers",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
def generate(file: Path) -> None:
    """Write a new private key to FILE, readable for its owner only, and print the public key.

    Name FILE as `identity` in this site's file. Give the public key to the other sites, over a
    channel you trust, for their `peers`.
    """
    from privfl.identity import Identity

    identity = Identity()
    try:
        # Only a new file, and never readable for others, not even for a moment.
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as private:
            private.write(identity.pem())
    except FileExistsError as error:
        raise PrivflError(
            f"{file} exists already; nothing was written, choose another file"
        ) from error
    except OSError as error:
        raise PrivflError(f"cannot write {file}: {error.strerror}") from error
    click.echo(identity.public)


@command.command(
    short_help="Print the public key of a private key.",
    epilog=example(
        "privfl keys show mine/sites/aa.key",
        "compare the line with what the other sites have pinned as peers",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print the public key of the private key in FILE."""
    from privfl.identity import load_identity

    click.echo(load_identity(str(file)).public)
