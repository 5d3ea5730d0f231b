"""Run under mpiexec: `privfl train`, with two changes for the test that searches memories.

The site that makes the run's keys leaves all of them in a file; rank 0 stops (SIGSTOP) after each
thing it does, until the test has looked at it. Arguments: the file for the keys, then those of
`privfl train`.
"""

import os
import signal
import sys

from privfl.cli import main
from privfl.coordinator import driver
from privfl.secagg.session import keys

target = sys.argv[1]
make = keys.RunKeys.make.__func__


def spying(cls: type[keys.RunKeys], parameters: object) -> keys.RunKeys:
    made = make(cls, parameters)
    with open(target + ".part", "wb") as file:
        file.write(made.secret_bytes())
    os.replace(target + ".part", target)
    return made


perform = driver._Driver._perform


def stopping(self: driver._Driver, output: driver.coordinator.Output) -> None:
    perform(self, output)
    if os.path.exists(target):
        os.kill(os.getpid(), signal.SIGSTOP)


keys.RunKeys.make = classmethod(spying)
driver._Driver._perform = stopping
main(sys.argv[2:])
