"""A version has one name: in the package, in its metadata, in the changelog and on the tag."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

import bitfuse

ROOT = Path(__file__).parents[1]


def test_the_installed_version_is_the_package_s():
    assert importlib.metadata.version("bitfuse") == bitfuse.__version__


def test_the_changelog_begins_with_what_is_not_released_or_with_this_version():
    first = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert first == "Unreleased" or first.startswith(bitfuse.__version__)


def test_a_tag_on_this_commit_names_this_version():
    done = subprocess.run(
        ["git", "tag", "--points-at", "HEAD", "--list", "v*"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode or not done.stdout.strip():
        pytest.skip("this commit is no release")
    assert done.stdout.split() == [f"v{bitfuse.__version__}"]
