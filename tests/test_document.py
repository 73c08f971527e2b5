"""The proof document: valid by its schema, read whatever the file holds, and compared with this machine and code."""

from __future__ import annotations

import copy
import dataclasses
import html
import io
import json
import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import bitfuse
from bitfuse.cli import app
from bitfuse.tools.compare import conformance
from bitfuse.tools.prove import document, verify
from bitfuse.tools.seeded import CannotRun

jsonschema = pytest.importorskip("jsonschema")

NAMES = ["gated_residual", "head_gate"]
CASES = ["small", "one row", "one token", "misaligned"]


@pytest.fixture(scope="module")
def result():
    return verify.run(Console(quiet=True), NAMES, "cpu", CASES, deep=True)


@pytest.fixture(scope="module")
def made(result):
    return document.make(result)


@pytest.fixture
def saved(made, tmp_path):
    """A function that writes the document, changed or not, and returns its path."""

    def save(change=None):
        path = tmp_path / "proof.json"
        content = copy.deepcopy(made)
        if change is not None:
            change(content)
        path.write_text(json.dumps(content))
        return path

    return save


def check(path):
    """(exit code, what is printed) of `bitfuse verify --check`."""
    found = CliRunner().invoke(app, ["verify", "--check", str(path)])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.exit_code, found.output


# -- making one --------------------------------------------------------------------------------------------------------


def test_the_schema_is_a_schema_and_the_document_is_valid_by_it(made):
    jsonschema.Draft202012Validator.check_schema(document.schema())
    jsonschema.Draft202012Validator(document.schema()).validate(made)
    assert json.loads(json.dumps(made)) == made


def test_the_schema_describes_every_field(made):
    """Nothing may be left out; nor be added that is not described, but for further facts of the machine."""
    validator = jsonschema.Draft202012Validator(document.schema())
    for path in ((), ("machine",), ("asked",), ("checks", 0), ("controls", 0), ("batteries", 0), ("sweeps", 0)):
        more, less = copy.deepcopy(made), copy.deepcopy(made)
        place = more
        for part in path:
            place = place[part]
        place["unheard of"] = 1
        assert list(validator.iter_errors(more)) or path == ("machine",), path
        place = less
        for part in path:
            place = place[part]
        del place[next(iter(place))]
        assert list(validator.iter_errors(less)), path


def test_it_says_what_was_proved_and_of_what(made):
    assert made["machine"]["torch"] == torch.__version__
    assert made["machine"]["torch_git"] == torch.version.git_version
    assert made["exit_code"] == 0
    assert {one["operator"] for one in made["checks"]} == set(NAMES)
    assert {one["case"] for one in made["checks"]} == set(made["asked"]["cases"]) == set(CASES)
    assert all(one["caught"] for one in made["controls"])
    assert {one["kind"] for one in made["sweeps"]} == {"arguments", "pairs", "values", "shapes"}
    assert all(sweep["done"] < sweep["of"] for sweep in made["sweeps"]), "a CPU takes a sample, and says so"
    decides = {"ops/head_gate.py", "core/numerics.py", "core/proof.py", "core/reduction.py", "tools/prove/sweeps.py"}
    assert decides <= made["sources"].keys()
    assert made["digest"] == document.digest(made)


def test_the_page_holds_every_verdict_and_fetches_nothing(made):
    page = document.render(made)
    text = html.unescape(page)
    for one in (*made["checks"], *made["controls"]):
        assert (one.get("case") or one["mutant"]) in text
    for source in made["sources"].values():
        assert source[:12] in text
    assert document.verdict(made) in text
    assert "src=" not in page.replace('src="data:', "")
    assert "http" not in page.replace("http-equiv", "")


def test_what_stands_in_a_document_is_no_markup_of_the_page(made):
    changed = copy.deepcopy(made)
    changed["checks"][0]["reason"] = changed["machine"]["device"] = "<script>alert(1)</script>"
    assert "<script>alert" not in document.render(changed)


# -- holding one against this machine ---------------------------------------------------------------------------------


def test_a_document_of_this_machine_and_code_matches(saved):
    code, printed = check(saved())
    assert code == 0
    assert "differs" not in printed
    assert "The document says: 5 of 5 checks fused and equal in every bit" in printed


@pytest.mark.parametrize(
    ("item", "change"),
    [
        ("torch", lambda d: d["machine"].update(torch="2.11.0")),
        ("torch git", lambda d: d["machine"].update(torch_git="0" * 40)),
        ("device", lambda d: d["machine"].update(device="another")),
        ("triton", lambda d: d["machine"].update(triton="3.0.0")),
        ("version of diffusers", lambda d: d["hosts"].update(diffusers="0.1")),
        ("SHA-256 of numerics.py", lambda d: d["sources"].update({"numerics.py": "0" * 64})),
        ("SHA-256 of ops/of_another.py", lambda d: d["sources"].update({"ops/of_another.py": "0" * 64})),
    ],
)
def test_another_machine_or_other_code_does_not_match(item, change, saved):
    def changed(content):
        change(content)
        content["digest"] = document.digest(content)

    code, printed = check(saved(changed))
    assert code == 1
    assert [line for line in printed.splitlines() if line.startswith("differs")] == [
        line for line in printed.splitlines() if line.startswith(f"differs  {item}: the document has ")
    ]


def test_a_verdict_that_was_edited_shows(saved):
    code, printed = check(saved(lambda d: d["checks"][0].update(outcome="differs")))
    assert code == 1
    assert "differs  digest of the content" in printed
    assert "differs  exit code of the content: the document has 0, this machine 1" in printed


def test_a_document_of_a_failure_does_not_pass(saved):
    def failed(content):
        content["checks"][0]["outcome"], content["exit_code"] = "differs", 1
        content["digest"] = document.digest(content)

    code, printed = check(saved(failed))
    assert code == 1
    assert "differs  " not in printed
    assert "The document says: 1 differ; 4 of 5 checks" in printed


def test_nothing_that_is_read_enables_a_kernel(saved, fresh_routes):
    check(saved())
    assert bitfuse.core.proof.verdicts() == {}


# -- files that are no proof documents ---------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory):
    return tmp_path_factory.mktemp("documents") / "file.json"


def refused(path):
    with pytest.raises(CannotRun) as error:
        document.read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@given(content=st.binary(max_size=64) | _json.map(lambda value: json.dumps(value).encode()))
@example(content=b"")
@example(content=b"\xff\xfe")
@example(content=b"[" * 100_000)
@example(content=b'{"format": "bitfuse proof", "version": 1, "x": NaN}')
@example(content=b'{"format": "bitfuse proof", "version": 1e999}')
@example(content=b'{"format": "bitfuse proof", "format": "bitfuse proof"}')
@example(content=b"1" * 10_000)
@example(content=b'{"format": "bitfuse proof", "version": 1, "machine": ' + b"[" * 900 + b"]" * 900 + b"}")
def test_what_is_no_proof_document_is_refused_in_a_sentence(content, somewhere):
    somewhere.write_bytes(content)
    refused(somewhere)


@given(data=st.data())
def test_a_document_with_one_value_of_another_kind_is_refused_or_does_not_match(data, made, somewhere):
    content = copy.deepcopy(made)
    place, key = content, None
    for _ in range(data.draw(st.integers(1, 3))):
        keys = list(place) if isinstance(place, dict) else list(range(len(place))) if isinstance(place, list) else []
        if not keys:
            break
        parent, key = place, data.draw(st.sampled_from(keys))
        place = parent[key]
    other = data.draw(_json.filter(lambda value: value != place and json.dumps(value) != json.dumps(place)))
    parent[key] = other
    somewhere.write_text(json.dumps(content))
    try:
        read = document.read(somewhere)
    except CannotRun:
        return
    assert not all(item.matches for item in document.compare(read))


def test_what_is_nested_where_a_fact_belongs_is_refused(saved):
    """Further facts of a machine may stand there, but nothing so deep that it could not be written again."""
    deep = json.loads("[" * 500 + "]" * 500)
    assert "$.machine" in refused(saved(lambda d: d["machine"].update(further=deep)))


def test_terminal_codes_and_lone_surrogates_are_printed_as_ascii(saved):
    def changed(content):
        content["machine"]["device"] = "\x1b[31mred\ud800"
        content["digest"] = document.digest(content)

    code, printed = check(saved(changed))
    assert code == 1
    assert '"\\u001b[31mred\\ud800"' in printed


@pytest.mark.parametrize("part", ["hosts", "sources"])
@pytest.mark.parametrize(
    "key",
    [
        "x\nmatches  torch: forged",
        "x\rmatches  torch: forged",
        "\x1b[2K\x1b[1Gmatches  torch: forged",
        "x" + " " * 80 + "matches  torch: forged",
        "[green]matches[/]",
        "\u202eegrof",
        "\u200b\x7f",
    ],
)
def test_no_key_of_a_document_makes_a_line(part, key, saved):
    def changed(content):
        content[part][key] = "0" * 64
        content["digest"] = document.digest(content)

    code, printed = check(saved(changed))
    assert code in (1, 2)
    assert not [
        line for line in printed.splitlines() if "forged" in line and not line.startswith(("differs", "bitfuse:"))
    ]
    assert printed.replace("\n", "").isprintable()
    assert " " * 3 not in printed, "nor is a line filled up so that the terminal begins another"
    lines = [line for line in printed.splitlines() if line.startswith("differs")]
    assert len(lines) == (code == 1)


@pytest.mark.parametrize("number", ["9" * 400, "1e400", "NaN", "-Infinity"])
def test_a_number_that_is_none_makes_no_traceback(number, saved, made):
    path = saved()
    text = path.read_text()
    for name in ("seconds", "elements", "version", "exit_code", "done", "count"):
        path.write_text(re.sub(rf'"{name}": [\d.e-]+', f'"{name}": {number}', text, count=1))
        assert check(path)[0] in (1, 2), name


def test_reasons_are_text_and_no_markup(result, capsys):
    """Of the tables and lines of `verify`, whatever stands in a reason, a name or a version."""
    odd = "[/] [bold]x[/bold] :smile: \x1b[31m\nmatches"
    changed = dataclasses.replace(
        result,
        checks=[dataclasses.replace(result.checks[0], outcome=o, reason=odd, case=odd) for o in ("differs", "equal")],
        controls=[dataclasses.replace(result.controls[0], caught=False, mutant=odd)],
        sweeps=[dataclasses.replace(result.sweeps[0], reason=odd, name=odd, outcome="declined")],
        transformers=[conformance.Step(odd, "2.0", "g", "differs", odd, 0, 1, 2, 0.0)],
    )
    out = io.StringIO()
    verify._print(Console(file=out, width=300), changed)
    lines = out.getvalue().splitlines()
    assert out.getvalue().count("[/] [bold]x[/bold] :smile: \\x1b[31m matches") >= 8
    assert all(line.isprintable() and not line.startswith("matches") for line in lines)


def test_what_is_not_seen_is_seen_on_the_page(made):
    changed = copy.deepcopy(made)
    changed["checks"][0]["reason"] = changed["machine"]["device"] = "a\u202eb\u200b\x1b<b>"
    page = document.render(changed)
    assert page.count(r"a\u202eb\u200b\x1b&lt;b&gt;") >= 2
    assert all(c.isprintable() or c == "\n" for c in page)


def test_check_takes_no_options_of_a_run_and_writes_json(saved, tmp_path):
    path, found = saved(), tmp_path / "found.json"
    for options in (["--deep"], ["--op", NAMES[0]], ["--html", str(tmp_path / "page.html")]):
        done = CliRunner().invoke(app, ["verify", "--check", str(path), *options])
        assert done.exit_code == 2
        assert "accepted with it: --device, --json" in done.output
    done = CliRunner().invoke(app, ["verify", "--check", str(path), "--json", str(found)])
    assert done.exit_code == 0
    content = json.loads(found.read_text())
    assert content["matches"] is True
    assert all(item["matches"] and item["document"] == item["here"] for item in content["items"])


@given(cut=st.integers(0, 5000))
def test_a_document_that_was_cut_off_is_refused(cut, made, somewhere):
    somewhere.write_text(json.dumps(made)[:cut])
    refused(somewhere)


def test_folders_missing_files_and_other_versions_are_refused(tmp_path, saved):
    assert refused(tmp_path) == f"{tmp_path} is no file; accepted: a JSON file that bitfuse verify --json wrote"
    assert "is no file" in refused(tmp_path / "nowhere")
    assert "another version; this bitfuse reads version 1" in refused(saved(lambda d: d.update(version=2)))
    assert check(tmp_path / "nowhere")[0] == 2
