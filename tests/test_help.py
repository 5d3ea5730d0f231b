"""What a person reads who types --help: what a command is for, an example, and what comes next."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from privfl.cli import cli


def commands(group: click.Group, *path: str) -> list[tuple[str, ...]]:
    """The words of every command, with and without sub-commands."""
    words = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        words += (
            commands(command, *path, name) if isinstance(command, click.Group) else [(*path, name)]
        )
    return words


@pytest.mark.parametrize("words", commands(cli), ids=" ".join)
def test_help_begins_with_its_purpose_and_ends_with_an_example_and_what_comes_next(
    words: tuple[str, ...],
):
    result = CliRunner().invoke(cli, [*words, "--help"], prog_name="privfl")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines() if line.strip()]
    assert lines[0].startswith("Usage: privfl")
    assert lines[1][0].isupper()
    assert [line.split(":")[0] for line in lines[-2:]] == ["Example", "Next"], "each on one line"
    assert "privfl" in lines[-2]
    assert "..." not in result.output.replace("...]", "").replace("]...", "").replace("S...", ""), (
        "no short help is cut"
    )


def test_the_list_of_commands_says_what_the_commands_say_of_themselves():
    context = click.Context(cli)
    listed = " ".join(CliRunner().invoke(cli, ["--help"], prog_name="privfl").output.split())
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        assert command.short_help is not None
        assert command.short_help.endswith(".")
        assert f"{name} {command.short_help}" in listed
