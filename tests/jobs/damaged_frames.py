"""Run under mpiexec with 2 ranks: rank 1 sends envelopes that rank 0 must refuse, each before it
allocates or uses anything.
"""

import json
import sys
import zlib

from privfl.errors import ProtocolError
from privfl.transport import CHUNK, mpi

transport = mpi.start()
MAGIC, ENVELOPE = mpi._MAGIC, mpi._ENVELOPE
DIGEST = zlib.crc32(b"headbody")
CASES = {
    "not a privfl message": ENVELOPE.pack(1, 4, 4, DIGEST) + b"headbody",
    "head too long": ENVELOPE.pack(MAGIC, 1 << 31, 4, DIGEST) + b"headbody",
    "payload too long": ENVELOPE.pack(MAGIC, 4, CHUNK + 1, DIGEST) + b"headbody",
    "damaged": ENVELOPE.pack(MAGIC, 4, 4, DIGEST) + b"headbodx",
}
refused = []
for name, envelope in CASES.items():
    if transport.rank == 1:
        transport._start(envelope, 0, mpi._TAG_ENVELOPE)
        assert transport.flush(10)
        assert transport.receive(10).head == b"next"
        continue
    try:
        transport.receive(10)
    except ProtocolError:
        refused.append(name)
    # The refusing side leaves no receive posted; a real job ends here, this test goes on with a new
    # one.
    transport._incoming = [mpi._Incoming(transport._comm, 1)]
    transport.send(1, b"next")
if transport.rank == 0:
    sys.stdout.write(json.dumps(refused) + "\n")
transport.flush(10)
transport.close()
