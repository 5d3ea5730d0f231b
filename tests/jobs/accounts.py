"""Run under mpiexec: `privfl train` as if every rank ran under an account of its own, which one
mpiexec of one user cannot show.
"""

import os
import sys

from privfl.cli import main
from privfl.site import setup

setup.account = lambda: os.environ["PMI_RANK"]
main(sys.argv[1:])
