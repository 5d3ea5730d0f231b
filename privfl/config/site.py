"""The site file: what one site keeps to itself. Every site has its own paths from the first day."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from privfl.config.values import Device, Options, PublicKey, Section, SiteName


class SiteFile(Section):
    """``DIR/<site>.yaml`` of ``--sites DIR``. Relative paths count from the folder of the file.

    ``data_options`` go over those of the experiment, key by key; ``output`` is the folder for this site's model, ``log`` its log file.
    ``identity`` is the file with this site's private key (`privfl keys generate`), ``peers`` are the public keys of the other sites, without
    which one of them could be somebody else; ``require: [pinned_keys]`` refuses a run for which this file does not have them.
    """

    data_options: Options = {}
    device: Device = "cpu"
    output: str | None = None
    log: str | None = None
    identity: str | None = None
    peers: dict[SiteName, PublicKey] = {}
    require: tuple[Literal["pinned_keys"], ...] = ()

    @model_validator(mode="after")
    def _peers_need_more(self) -> SiteFile:
        if self.peers and self.identity is None:
            raise ValueError(
                "has peers but no identity, by which they would know this site; make one with `privfl keys generate`"
            )
        if self.peers and self.output is None:
            raise ValueError(
                "has peers but no output: model and log would go into the folder of a coordinator that need not be trusted"
            )
        return self
