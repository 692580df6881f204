"""claims.yml is complete: each claim has evidence that exists and passes, each test its claim."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import yaml

from tools import book_claims

ROOT = Path(__file__).resolve().parent.parent
LEDGER = yaml.safe_load((ROOT / "claims.yml").read_text(encoding="utf-8"))
CLAIMS = LEDGER["claims"]
TESTS = {
    f"{path.relative_to(ROOT).as_posix()}::{name}"
    for path in (ROOT / "tests/claims").glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def test_every_claim_stands_once() -> None:
    """The ids are those that the header counts, none twice."""
    ids = [claim["id"] for claim in CLAIMS]
    assert len(ids) == len(set(ids))
    assert Counter(claim["topic"] for claim in CLAIMS) == LEDGER["counts"]


def test_verdicts_are_known() -> None:
    """Four verdicts; all but "right" are corrected or explained."""
    for claim in CLAIMS:
        assert claim["verdict"] in {"right", "wrong", "imprecise", "unverifiable"}, claim["id"]
        assert claim["verdict"] == "right" or claim["correction"], claim["id"]


def test_evidence_exists_and_every_claim_test_is_evidence() -> None:
    """No claim without a test unless nothing could decide it, and no test without a claim."""
    for claim in CLAIMS:
        assert claim["evidence"] or claim["verdict"] == "unverifiable", claim["id"]
    assert {node for claim in CLAIMS for node in claim["evidence"]} == TESTS


def test_citation_keys_exist() -> None:
    """Each primary source is an entry of references.bib."""
    text = (ROOT / "references.bib").read_text(encoding="utf-8")
    keys = set(re.findall(r"^@\w+\{([^,]+),", text, re.MULTILINE))
    for claim in CLAIMS:
        assert set(claim["sources"]) <= keys, claim["id"]


def run(nodes: list[str], folder: Path) -> dict[str, set[str]]:
    """Run tests in a process of their own and return their outcomes."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run([*command, f"--junitxml={report}", *nodes], cwd=ROOT, capture_output=True)
    found: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        path = case.get("classname", "").replace(".", "/") + ".py"
        name = f"{path}::{case.get('name', '').partition('[')[0]}"
        state = case[0].tag if len(case) and case[0].tag != "properties" else "passed"
        found.setdefault(name, set()).add(state)
    return found


def test_the_evidence_passes(outcomes: dict[str, set[str]], tmp_path: Path) -> None:
    """Every test that decides a claim has run and passed; one that is skipped decides nothing."""
    evidence = sorted({node for claim in CLAIMS for node in claim["evidence"]})
    if missing := [node for node in evidence if node not in outcomes]:
        outcomes = outcomes | run(missing, tmp_path)
    assert {node: outcomes.get(node) for node in evidence} == {
        node: {"passed"} for node in evidence
    }


def test_cells_name_claims_of_the_ledger_and_show_something() -> None:
    """A cell that decides a claim asserts or prints, and is compared with what it printed."""
    ids = {claim["id"] for claim in CLAIMS}
    assert set(book_claims.evidence_cells(ROOT)) <= ids
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            marks = [tag for tag in cell.metadata.get("tags", ()) if tag.startswith("claim")]
            if marks:
                assert len(book_claims.tags(cell)) == len(marks), f"{path.name}: {marks}"
                assert cell.cell_type == "code", f"{path.name}: {marks} on a cell of text"
                assert "assert" in cell.source or cell.outputs, f"{path.name}: {marks}"
