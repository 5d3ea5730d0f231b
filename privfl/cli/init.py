"""`privfl init DIR`: the built-in demo as a starter of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from privfl.errors import PrivflError


@click.command(name="init")
@click.argument("directory", type=click.Path(path_type=Path))
def command(directory: Path) -> None:
    """Write a commented starter into DIRECTORY: the experiment, its Python functions, and one file per site."""
    from privfl.config import demo_path

    source = demo_path().parent
    names = [
        path.relative_to(source)
        for path in sorted(source.rglob("*"))
        if path.suffix in (".yaml", ".py") and path.name != "__init__.py"
    ]
    existing = [name for name in names if (directory / name).exists()]
    if existing:
        raise PrivflError(f"{directory / existing[0]} exists already; nothing was written, choose an empty directory")
    try:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes((source / name).read_bytes())
    except OSError as error:
        raise PrivflError(f"cannot write {error.filename}: {error.strerror}") from error
    for name in names:
        click.echo(f"wrote {directory / name}")
    click.echo(f"try it:  mpiexec -n 5 privfl train {directory / 'experiment.yaml'} --sites {directory / 'sites'}")
