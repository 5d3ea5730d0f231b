"""What the README and the documents tell people to type works."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

import privfl
from privfl.cli import cli
from privfl.config import SiteFile, load_experiment, load_site
from tests.conftest import MPIEXEC, PRIVFL, ROOT, Job, run_job

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
README = PAGES["README.md"]


def blocks(kind: str, page: str = "README.md") -> list[str]:
    """The fenced blocks of one language, without their indentation."""
    return [
        re.sub(rf"^ {{{len(b[0])}}}", "", b[1], flags=re.M)
        for b in re.findall(rf"^( *)```{kind}\n(.*?)^ *```$", PAGES[page], re.M | re.S)
    ]


def commands(page: str) -> list[str]:
    return [
        line[2:].split("   #")[0].strip()
        for block in blocks("console", page)
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


def test_the_first_screen_has_the_two_commands():
    first = "\n".join(README.splitlines()[:30])
    assert "$ make demo" in first
    assert "$ make test" in first


def shape(line: str) -> str:
    """A line of output without its numbers, white space and the tail that a document leaves out."""
    return " ".join(re.sub(r"[\d.]+", "#", line.split(" ...")[0]).split())


@pytest.mark.timeout(600)
def test_every_privfl_command_of_the_documents_runs(tmp_path: Path):
    """In one folder, in the order of a reader: first the experiment, then its budget."""
    order = ["docs/installation.md", "docs/first-experiment.md", "docs/budget.md"]
    with_commands = [page for page in PAGES if any("privfl" in c.split() for c in commands(page))]
    assert sorted(with_commands) == sorted(order)
    job = None
    for text in [c for page in order for c in commands(page) if "privfl" in c.split()]:
        words = [{"mpiexec": MPIEXEC, "privfl": PRIVFL}.get(word, word) for word in text.split()]
        words += ["--set", "rounds=1"] if "train" in words else []
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, timeout=150, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        job = Job(0, done.stdout, "") if "train" in words else job
    assert job is not None
    # The README shows what a run prints; the starter is the demo.
    (shown,) = blocks("text")
    printed = {shape(line) for line in job.out.splitlines()}
    for line in shown.splitlines():
        if line.startswith("run folder: "):
            assert job.folder.name.count("-") == line.count("-")
        elif line != "...":
            assert any(printed_line.startswith(shape(line)) for printed_line in printed), line
    (snippet,) = [b for b in blocks("python", "docs/run-folder.md") if "load_file" in b]
    snippet = re.sub(r'"runs/[^"]*"', repr(str(job.folder / "model.safetensors")), snippet)
    sys.path.insert(0, str(tmp_path / "mine"))
    try:
        exec(snippet, {})
    finally:
        sys.path.pop(0)
    named = set(
        re.findall(r"`([\w.]+\.(?:html|json|jsonl|yaml|safetensors))`", PAGES["docs/run-folder.md"])
    )
    assert named == {path.name for path in job.folder.iterdir() if path.is_file()}


def test_the_sum_alone_runs_as_shown(tmp_path: Path):
    (snippet,) = [b for b in blocks("python", "docs/secure-sum.md") if "SecureSum" in b]
    (tmp_path / "program.py").write_text(
        snippet + "assert total.tolist() == [3 * n for n in range(10)]\n"
    )
    job = run_job(3, [sys.executable, str(tmp_path / "program.py")])
    assert job.code == 0, job.err


# What a reader brings along.
BEFORE = """
from mpi4py import MPI
import torch
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
records = TensorDataset(torch.randn(40, 4), torch.zeros(40, dtype=torch.long))
loader = DataLoader(records, batch_size=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = torch.nn.functional.cross_entropy
"""
AFTER = """
weights = next(model.parameters()).flatten().tolist()
assert MPI.COMM_WORLD.allgather(weights) == [weights] * 3
assert 0 < engine.get_epsilon(1e-5) < 10
"""


LOOP = """
for x, y in loader:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()
"""


def test_the_engine_runs_saves_and_loads_as_shown(tmp_path: Path):
    """Three programs in one job: the README's, and a loop of one's own before and after a save."""
    (front,) = blocks("python")
    # Every rank is a site with files of its own.
    make, checkpoint = (
        re.sub(r'"(epoch3)', r'f"{MPI.COMM_WORLD.rank}\1', block)
        for block in blocks("python", "docs/own-loop.md")
    )
    save, load = checkpoint.split("# In the next program, after make_private:\n")
    programs = [
        *[BEFORE, front, AFTER, "engine.close()"],
        *[BEFORE, make, LOOP, save, "spent = engine.get_epsilon(1e-5)", "engine.close()"],
        *[BEFORE, make, load, "assert engine.get_epsilon(1e-5) == spent > 0", LOOP],
        *["assert engine.get_epsilon(1e-5) > spent", AFTER],
    ]
    (tmp_path / "program.py").write_text("\n".join(programs))
    job = run_job(3, [sys.executable, str(tmp_path / "program.py")], cwd=tmp_path)
    assert job.code == 0, job.err
    assert job.out.count("has spent epsilon") == 3
    assert len(list(tmp_path.glob("*.ledger"))) == 3
    assert len(list(tmp_path.glob("*epoch3.pt"))) == 3


@pytest.mark.parametrize("page", ["docs/choosing-a-mode.md", "docs/first-experiment.md"])
def test_the_keys_shown_make_an_experiment(tmp_path: Path, page: str):
    shown = yaml.safe_load(blocks("yaml", page)[0])
    values = yaml.safe_load((ROOT / "privfl" / "demo" / "experiment.yaml").read_text()) | shown
    values |= {"local_steps": 1} if values["algorithm"] == "fedsgd" else {}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values))
    experiment = load_experiment(tmp_path / "experiment.yaml")
    if page == "docs/choosing-a-mode.md":
        assert (experiment.algorithm, experiment.privacy.noise, experiment.collusion) == (
            "fedsgd",
            "distributed",
            1,
        )
    else:
        assert experiment.sites == ("aa", "bbb", "ccc", "dddd")


def test_the_site_files_shown_are_read(tmp_path: Path):
    (whole,) = blocks("yaml", "docs/budget.md")
    assert set(yaml.safe_load(whole)) | {"device", "log"} == set(SiteFile.model_fields)
    identity = blocks("yaml", "docs/first-experiment.md")[1].replace(
        "ed25519:...", "ed25519:" + "A" * 43
    )
    for text in (whole, identity):
        (tmp_path / "aa.yaml").write_text(text)
        assert load_site(tmp_path, "aa").require == ("pinned_keys",)


def printed_by(snippet: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(snippet, {})
    return out.getvalue()


@pytest.mark.parametrize("snippet", [pytest.param(0, marks=pytest.mark.long), 1])
def test_the_programs_of_the_accounting_page_print_its_tables(snippet: int):
    rows = re.findall(r"^\| (.*) \|$", PAGES["docs/accounting.md"], re.M)
    tables = {tuple(cell.strip() for cell in row.split("|")) for row in rows}
    for line in printed_by(blocks("python", "docs/accounting.md")[snippet]).splitlines():
        words = line.split()
        assert any(_same_row(words, row) for row in tables), line


def _same_row(words: list[str], row: tuple[str, ...]) -> bool:
    """Whether a row of a table begins with these words; numbers may round on another processor."""
    if len(row) < len(words):
        return False
    for word, cell in zip(words, row, strict=False):
        try:
            if float(word) != pytest.approx(float(cell), rel=3e-4, abs=1e-4):
                return False
        except ValueError:
            if word != cell:
                return False
    return True


def test_the_calibration_shown_prints_what_it_says():
    (snippet,) = blocks("python", "docs/choosing-epsilon.md")
    assert float(printed_by(snippet)) == float(snippet.rsplit("# ", 1)[1])


def test_sharp_edges_are_all_in_their_index():
    """One line for each heading, with the severity and the owner that the entry itself says."""
    page = PAGES["docs/sharp-edges.md"]
    entries = re.findall(r"^### (.*)\n\n\*(\w+); (you decide|privfl guards)\.\*$", page, re.M)
    assert len(entries) == page.count("\n### ")
    index = re.findall(r"^\| \[(.*)\]\(#.*\) \| (\w+) \| (\w+) \|$", page, re.M)
    assert index == [(title, severity, owner.split()[0]) for title, severity, owner in entries]
    defined = set(re.findall(r"^\| \*\*([A-Z]\w+)\*\* \|", page, re.M))
    assert {severity for _, severity, _ in entries} == defined
    for entry in re.split(r"^##+ ", page, flags=re.M):
        if "you decide.*" in entry or "privfl guards.*" in entry:
            assert ("**Do:**" in entry) == ("you decide.*" in entry), entry
            assert ("**privfl:**" in entry) == ("privfl guards.*" in entry), entry


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
        for h in re.findall(r"^#+ (.*)$", text, re.M)
    }


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        if target != "sure":
            assert re.search(rf"^{target}:", makefile, re.M), target


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        leads_to = page.parent / target if target else page
        assert leads_to.exists(), target
        if anchor:
            assert anchor in anchors(leads_to.read_text()), f"{target}#{anchor}"


def test_documented_commands_exist():
    for page in DOCUMENTS:
        for command in re.findall(r"`privfl ([a-z]+)", page.read_text()):
            assert cli.get_command(click.Context(cli), command), f"{page.name}: privfl {command}"


def test_code_that_documents_name_exists():
    folders = ("privfl", "privacy_audits", "tests", "benchmarks", "examples")
    files = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*")]
    yours = {"file.py", "mine/digits.py"}
    for page in DOCUMENTS:
        for name in re.findall(r"`([\w/]+\.py|privfl/[\w/]+)`", page.read_text()):
            where = f"{page.name}: {name}"
            assert name in yours or any(f.endswith(f"/{name.rstrip('/')}") for f in files), where


def test_the_api_reference_has_every_public_name():
    page = PAGES["docs/reference/api.md"]
    shown = set(re.findall(r"^\.\. auto\w+:: privfl\.(\w+)$", page, re.M))
    assert shown == set(privfl.__all__) - {"__version__"}
