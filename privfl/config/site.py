"""The site file: what one site keeps to itself. Every site has its own paths from the first day."""

from __future__ import annotations

from privfl.config.values import Device, Options, Section


class SiteFile(Section):
    """``DIR/<site>.yaml`` of ``--sites DIR``. Relative paths count from the folder of the file.

    ``data_options`` go over those of the experiment, key by key; ``output`` is the folder for this site's model, ``log`` its log file.
    """

    data_options: Options = {}
    device: Device = "cpu"
    output: str | None = None
    log: str | None = None
