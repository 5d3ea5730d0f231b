"""The reference of all keys: generated, complete and up to date."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generate_reference import FOLDER, pages
from privfl.config import Experiment, SiteFile


def sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All keys with dots, nested ones too."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        for section in sections(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_the_pages_are_those_that_the_models_give(page):
    assert page.read_text(encoding="utf-8") == pages()[page], (
        "run `python docs/generate_reference.py`"
    )


@pytest.mark.parametrize(
    ("name", "model", "some"),
    [
        ("experiment-keys.md", Experiment, {"sites", "privacy.delta", "evaluation.metrics"}),
        ("site-keys.md", SiteFile, {"peers", "ledger.file", "budget.epsilon"}),
    ],
)
def test_every_key_has_its_place(name: str, model: type[BaseModel], some: set[str]):
    headings = [
        line.split("`")[1]
        for line in (FOLDER / name).read_text().splitlines()
        if line.startswith(("## ", "### "))
    ]
    assert headings == [key for key, _ in keys(model)]
    assert some < set(headings)


@pytest.mark.parametrize("model", [Experiment, SiteFile])
def test_every_key_is_described(model: type[BaseModel]):
    for key, field in keys(model):
        texts = [field.description, *(section.__doc__ for section in sections(field.annotation))]
        assert any(texts), key
        for text in filter(None, texts):
            assert text.strip().endswith("."), key
