"""A process with defects: `python -m privacy_audits.sabotaged DEFECT,... -- MODULE [ARGUMENT]...`.

It plants the defects and calls ``MODULE.main(ARGUMENTS)``; trainers that the process starts have
them too. privfl has no switch for this: the patches live in these processes and nowhere else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from privacy_audits.sabotage.apply import plant
from privacy_audits.sabotage.defects import named
from privfl.errors import PrivflError

_TRAINER = "privfl.trainer.main"


def main(arguments: Sequence[str]) -> None:
    """Plant, and run."""
    names, separator, module, *rest = arguments
    assert separator == "--"
    if module != _TRAINER:
        from privfl.trainer import process

        process.COMMAND = (sys.executable, "-m", "privacy_audits.sabotaged", names, "--", _TRAINER)
    for name in names.split(","):
        plant(named(name), "trainer" if module == _TRAINER else "agent")
    importlib.import_module(module).main(rest)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PrivflError as error:
        sys.stderr.write(f"privfl: {error}\n")
        sys.exit(error.exit_code)
