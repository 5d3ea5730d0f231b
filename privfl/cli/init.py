"""`privfl init DIR`: the built-in demo as a starter of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from privfl.cli.help import example
from privfl.errors import PrivflError


@click.command(
    name="init",
    short_help="Write a commented starter experiment that runs as it stands.",
    epilog=example(
        "privfl init mine",
        "try it: mpiexec -n 5 privfl train mine/experiment.yaml",
    ),
)
@click.argument("directory", type=click.Path(path_type=Path))
def command(directory: Path) -> None:
    """Write a commented starter experiment into DIRECTORY.

    It is the built-in demo: the experiment, its Python functions, and one file per site. It runs as
    it stands; change one thing after another.
    """
    from privfl.config import demo_path, load_experiment

    source = demo_path().parent
    files = {Path(name): (source / name).read_bytes() for name in ("experiment.yaml", "digits.py")}
    for site in load_experiment(demo_path()).sites:
        files[Path("sites") / f"{site}.yaml"] = (source / "site.yaml").read_bytes()
    existing = [name for name in files if (directory / name).exists()]
    if existing:
        raise PrivflError(
            f"{directory / existing[0]} exists already; nothing was written, choose another "
            "directory"
        )
    try:
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
    except OSError as error:
        raise PrivflError(f"cannot write {error.filename}: {error.strerror}") from error
    for name in files:
        click.echo(f"wrote {directory / name}")
    click.echo(f"try it:  mpiexec -n 5 privfl train {directory / 'experiment.yaml'}")
