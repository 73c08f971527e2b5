"""The proof document: what `bitfuse verify` found, as JSON to keep and share and as a page to read.

A document is a record. It is compared with a machine and its code on request (`compare`), and nothing that is read
from one ever lets a kernel run: each process proves its kernels anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import bitfuse
from bitfuse.hosts.registry import HOSTS
from bitfuse.tools import files, packages, page, text
from bitfuse.tools.machine import machine
from bitfuse.tools.packages import CannotRun
from bitfuse.tools.prove import sweeps
from bitfuse.tools.prove.verify import Result, exit_code

FORMAT, VERSION = "bitfuse proof", 1
_PACKAGE = Path(bitfuse.__file__).parent
_SOURCES = ("core", "ops", "tools/prove")  # what decides what is computed, and how it is judged
_FOUND = ("checks", "tiers", "controls", "batteries", "kinds", "sweeps", "transformers")  # of a result, in this order
_JUDGED = ("checks", "sweeps", "transformers")  # what has an outcome


# -- making one --------------------------------------------------------------------------------------------------------


def make(result: Result) -> dict[str, Any]:
    """The document of a result, as plain JSON values, for `schema`."""
    found = {name: [asdict(one) for one in getattr(result, name)] for name in _FOUND}
    for name, reasons in (("kinds", "equivalent"), ("sweeps", "declined")):
        for one in found[name]:
            one[reasons] = [{"reason": reason, "count": n} for reason, n in one[reasons]]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine(result.device),
        "hosts": hosts(),
        "sources": sources(),
        "asked": {"operators": result.operators, "cases": result.cases, "deep": result.deep, "host": result.host},
        "interpreted": result.interpreted,
        "exit_code": result.exit_code,
        "seeds": {"cases": 0, "sweeps": sweeps.SEED},
        **found,
    }
    return json.loads(json.dumps(document | {"digest": digest(document)}))


def hosts() -> dict[str, str | None]:
    """Versions of the frameworks that bitfuse accelerates, None for those that are not installed."""
    return {package: packages.version(package) for package in HOSTS}


def sources() -> dict[str, str]:
    """SHA-256 of the package's files that decide what is computed or how it is judged, by their paths in it."""
    files = [file for folder in _SOURCES for file in sorted((_PACKAGE / folder).glob("*.py"))]
    return {f.relative_to(_PACKAGE).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def digest(document: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but the digest itself."""
    content = {name: value for name, value in document.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of version 1."""
    return json.loads((_PACKAGE / "schemas" / "proof.schema.json").read_text())


# -- reading one -------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The document in a file, valid by the schema; CannotRun, with one sentence, for whatever else is there."""
    packages.need("jsonschema", "--check")
    import jsonschema

    name, accepted = text.one_line(path), "a JSON file that bitfuse verify --json wrote"
    try:
        if not path.is_file():
            raise CannotRun(f"{name} is no file; accepted: {accepted}")
        document = files.read_json(path, name, accepted, strict=True)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CannotRun(f"{name} is no proof document; accepted: {accepted}")
        if document.get("version") != VERSION:
            raise CannotRun(f"{name} is a proof document of another version; this bitfuse reads version {VERSION}")
        if wrong := next(jsonschema.Draft202012Validator(schema()).iter_errors(document), None):
            why = text.one_line(f"{wrong.json_path[:200]}: {wrong.message[:200]}")
            raise CannotRun(f"{name} is no valid proof document: {why}; accepted: {accepted}")
    except OSError as error:
        raise CannotRun(f"{name} can't be read: {error.strerror or error}; accepted: {accepted}") from None
    except ValueError as why:
        raise CannotRun(str(why)) from None
    except RecursionError:
        raise CannotRun(f"{name} is no proof document: it is nested too deeply; accepted: {accepted}") from None
    return document


# -- comparing one with this machine -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One fact, as the document has it and as it is here."""

    name: str
    document: Any
    here: Any

    @property
    def matches(self) -> bool:
        return self.document == self.here

    @property
    def sentence(self) -> str:
        """One line in ASCII, whatever stands in the document."""
        name = self.name if len(self.name) <= 100 and _PLAIN.fullmatch(self.name) else _shown(self.name)
        if self.matches:
            return f"matches  {name}: {_shown(self.here)}"
        return f"differs  {name}: the document has {_shown(self.document)}, this machine {_shown(self.here)}"


_PLAIN = re.compile(r"[\w./-]+( [\w./-]+)*", re.ASCII)  # what may stand in a line without quotes


def _shown(value: Any) -> str:
    """As JSON, in which a row of spaces, which would fill the line and begin another, is spelled out."""
    shown = re.sub(" {2,}", lambda spaces: r"\u0020" * len(spaces[0]), json.dumps(value)).replace("\x7f", r"\u007f")
    return shown if len(shown) <= 100 else f"{shown[:97]}..."


def compare(document: dict[str, Any], device: str | None = None) -> list[Item]:
    """A valid document's facts beside those of this machine and this code: all must match for it to speak of them.

    device    "cuda" or "cpu"; by default the document's own kind, where it is there
    """
    if device is None:
        device = "cuda" if document["machine"]["device_type"] == "cuda" and torch.cuda.is_available() else "cpu"
    here, theirs = json.loads(json.dumps(machine(device))), document["machine"]  # plain values: torch's version is none
    outcomes = [one["outcome"] for what in _JUDGED for one in document.get(what, ())]
    outcomes += ["differs" for one in document.get("tiers", ()) if one["outcome"] == "differs"]
    content = exit_code(outcomes, [one["caught"] for one in document["controls"]])
    items = [
        Item("digest of the content", document["digest"], digest(document)),
        Item("exit code of the content", document["exit_code"], content),
    ]
    names = ("device", "device_type", "capability", "driver", "torch", "torch_git", "cuda", "triton", "bitfuse")
    items += [Item(name.replace("_", " "), theirs[name], here[name]) for name in names]
    for title, given, found in (
        ("version of", document["hosts"], hosts()),
        ("SHA-256 of", document["sources"], sources()),
    ):
        items += [Item(f"{title} {name}", given.get(name), found.get(name)) for name in sorted({*given, *found})]
    return items


# -- in words, and as a page -------------------------------------------------------------------------------------------


def verdict(document: dict[str, Any]) -> str:
    """What the document says, in one sentence."""
    d = document
    checks, swept = (Counter(one["outcome"] for one in d[what]) for what in ("checks", "sweeps"))
    caught = sum(control["caught"] for control in d["controls"])
    tiers = Counter(one["outcome"] for one in d.get("tiers", ()))  # documents before 2026-11-28 have none
    parts = [f"{checks['equal']} of {len(d['checks'])} checks fused and equal in every bit"]
    if held := tiers["equal"] + tiers["differs"]:
        parts.append(f"{tiers['equal']} of {held} kernels equal in their own tier")
    if d["sweeps"]:
        parts.append(f"{swept['equal']} of {len(d['sweeps'])} long sweeps equal")
    parts.append(f"{caught} of {len(d['controls'])} wrong kernels caught")
    if steps := d.get("transformers"):  # documents before 2026-11-24 have none
        equal = sum(step["outcome"] == "equal" for step in steps)
        parts.append(f"{equal} of {len(steps)} steps of {steps[0]['host']}'s transformer equal")
    differing = sum(one["outcome"] == "differs" for what in (*_JUDGED, "tiers") for one in d.get(what, ()))
    return "; ".join([f"{differing} differ", *parts] if differing else parts) + "."


def render(document: dict[str, Any]) -> str:
    """The document as one HTML page that fetches nothing; CannotRun where Jinja is not installed."""
    packages.need("jinja2", "--html")
    operators: dict[str, dict[str, list[Any]]] = {}
    for what in ("checks", "tiers", "controls", "batteries"):
        for one in document.get(what, ()):
            of = operators.setdefault(one["operator"], {"checks": [], "tiers": [], "controls": [], "batteries": []})
            of[what].append(one)
    return page.fill(
        "verify.html.j2",
        command="verify",
        document=document | {"verdict": verdict(document)},
        operators=operators,
        kinds=("pairs", "values", "arguments", "shapes"),
    )
