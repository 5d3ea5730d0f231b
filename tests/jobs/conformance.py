"""Run under mpiexec: the transport conformance suite over MPI."""

import json
import sys

from privfl.transport import conformance, mpi

transport = mpi.start()
passed = conformance.run(transport)
sys.stdout.write(json.dumps(passed) + "\n")
transport.close()
