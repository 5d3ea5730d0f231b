"""The round protocol as pure state machines: (state, message) -> (state, messages).

No MPI, no torch, no encryption.
"""
