"""claims.yml is complete: each claim has evidence that exists, each claim test has its claim."""

import re
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
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
