"""The workflows of the public repository run what anyone runs by hand, and publish that."""

import re
from pathlib import Path

import yaml

from tools import book_pages, tasks

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def steps(name: str, job: str) -> list[dict]:
    workflow = yaml.safe_load((WORKFLOWS / name).read_text(encoding="utf-8"))
    return workflow["jobs"][job]["steps"]


def test_every_change_runs_the_whole_check():
    workflow = yaml.safe_load((WORKFLOWS / "check.yml").read_text(encoding="utf-8"))
    when = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert "pull_request" in when and when["push"]["branches"] == [book_pages.BRANCH]
    assert "bash .ci/run" in [step.get("run") for step in steps("check.yml", "check")]


def test_the_pages_published_are_those_that_make_book_builds():
    build = steps("publish.yml", "build")
    assert "make book" in [step.get("run") for step in build]
    upload = next(step for step in build if "upload-pages" in step.get("uses", ""))
    assert ROOT / upload["with"]["path"] == tasks.HTML


def test_only_what_was_checked_is_published():
    workflow = yaml.safe_load((WORKFLOWS / "publish.yml").read_text(encoding="utf-8"))
    when = workflow[True]["workflow_run"]
    assert when["workflows"] == [
        yaml.safe_load((WORKFLOWS / "check.yml").read_text(encoding="utf-8"))["name"]
    ]
    assert "conclusion == 'success'" in workflow["jobs"]["build"]["if"]
    assert steps("publish.yml", "build")[0]["with"]["ref"].endswith("head_sha }}")


def test_ci_runs_every_command_that_can_turn_red():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    stages = re.findall(r'^stage ".*" make (\w+)$', script, re.MULTILINE)
    assert set(stages) >= {"test", "book", "mutants", "canaries"}
