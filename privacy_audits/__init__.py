"""Empirical audits: attacks on what privfl claims.

Installed with privfl, which never imports this package. It uses the library from outside, as an
attacker or a sceptical reviewer would; ``privfl audit`` runs it. Statistics (:mod:`.bounds`) know
nothing of attacks, attacks (:mod:`.audits`) nothing of how their target was run (:mod:`.targets`),
and a verdict is derived from numbers and never set (:mod:`.result`).

Nothing is imported here: every process of an audited run imports this package.
"""
