"""The pages that these tests look at, each made once."""

from __future__ import annotations

import pytest

from privfl.reporting.html import to_html
from tests.reporting.pages import VARIANTS


@pytest.fixture(scope="session")
def pages() -> dict[str, str]:
    return {name: to_html(found) for name, found in VARIANTS.items()}
