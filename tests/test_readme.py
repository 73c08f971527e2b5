"""The pages say what the measurements say. That what they tell a user to type works: `tests/test_pages.py`."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def _tables(name="tables"):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_json():
    tables = _tables()
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        named = re.findall(r"<!-- (\w[\w. ]* table[\w. ]*) -->", text)
        assert set(named) <= set(tables.TABLES), page
        assert len(re.findall(r"^<!-- end -->$", text, re.MULTILINE)) == len(named), f"{page}: a table without its end"
        assert tables.filled(text) == text, f"{page}: run `make readme`"


def test_a_table_of_times_says_which_of_them_it_shows():
    tables = _tables()
    silent = []
    pages = "".join((ROOT / page).read_text() for page in tables.PAGES)
    for name, text in re.findall(r"<!-- (\w[\w. ]* table[\w. ]*) -->\n(.*?)\n<!-- end -->", pages, re.DOTALL):
        timed = re.search(r"\| (\*\*)?\d[\d.]* (ms|us)\b", text)
        if timed and not re.search(r"\bmedians?\b|\bthe least\b|\bmeans\b", text, re.IGNORECASE):
            silent.append(name)
    assert silent == []


def test_no_version_of_a_host_was_seen_to_differ():
    rows = _tables().json.loads(_tables().COMPATIBILITY.read_text())
    assert {row["host"] for row in rows} == {"diffusers", "ltx-core", "sglang"}
    for row in rows:
        assert row["functions"]["passed"]
        assert row["functions"]["failed"] == [], row
        assert {step["outcome"] for step in row["steps"]} <= {"equal", "declined"}, row
        assert any(step["outcome"] == "equal" and step["fused"] for step in row["steps"]), row


def test_a_versions_row_is_put_where_it_belongs_and_replaces_an_earlier_one():
    def row(host, version, torch="2.13.0+cpu", **more):
        return {"host": host, "version": version, "torch": torch, **more}

    rows = [row("diffusers", "0.9.0"), row("sglang", "0.5.23"), row("sglang", "0.5.23", "2.9.1")]
    new = [row("ltx-core", "1.0.0"), row("diffusers", "0.42.1"), {**rows[1], "new": 1}]
    found = _tables("compatibility").merged(rows, new)
    assert found == [rows[0], new[1], new[0], rows[2], new[2]], "a row with another torch stays"


def test_versions_of_which_the_same_was_found_share_a_row():
    def row(version, *outcomes, torch="2.13.0"):
        steps = [{"ltx": "2.0", "outcome": o, "fused": 3, "of": 4, "reason": "differs at [0]"} for o in outcomes]
        functions = {"passed": 5, "failed": ["one"], "skipped": ["another"]}
        facts = {"torch": torch, "triton": "3.7.1", "date": "2026-11-24T00:00:00"}
        return {"host": "sglang", "version": version, "functions": functions, "steps": steps, **facts}

    rows = [row("1.0", "equal"), row("1.1", "equal"), row("1.2", "differs"), row("1.3", "declined")]
    rows += [row("1.4", outcome, torch=torch) for torch in ("2.13.0", "2.14.1") for outcome in ("equal", "declined")]
    table = _tables().compatibility(rows)
    assert table.splitlines()[2:7] == [
        "| SGLang 1.0, 1.1 | 5 of 6 | 3 of 4, equal | 2.13.0 and 3.7.1 |",
        "| SGLang 1.2 | 5 of 6 | **differs**: differs at [0] | 2.13.0 and 3.7.1 |",
        "| SGLang 1.3 | 5 of 6 | left alone | 2.13.0 and 3.7.1 |",
        "| SGLang 1.4 | 5 of 6 | 3 of 4, equal | 2.13.0 and 3.7.1, 2.14.1 and 3.7.1 |",
        "| SGLang 1.4 | 5 of 6 | left alone | 2.13.0 and 3.7.1, 2.14.1 and 3.7.1 |",
    ]


def test_a_feature_has_a_row_with_both_orders_and_says_where_bits_differ():
    facts = dict.fromkeys(("torch", "diffusers", "accelerate", "peft", "torchao"), "1") | {"date": "2026-11-28T"}
    row = {"feature": "LoRA", "version": "2.0", "order": "feature first", "fused": 3, "seen": 4, "how": "`so`"}
    row |= {"differs": None, "after_restore": None}
    rows = [row, {**row, "version": "2.3", "fused": 4}, {**row, "order": "accelerate first", "after_restore": "at [0]"}]
    table = _tables().stacking({"machine": facts, "rows": rows}).splitlines()
    assert table[0] == "| feature | feature first | accelerate first | how |"
    assert table[2] == "| LoRA | 3 of 4, 4 of 4 | **differs**: at [0] | `so` |"


def test_ways_to_compile_have_a_row_each_with_a_gpus_times_or_without():
    def row(differing, **ms):
        ways = [{"way": way, "differing": differing.get(way, 0), "elements": 9} for way in ways_of]
        ways = [way | ({"ms": {"median": ms[way["way"]]}} if way["way"] in ms else {}) for way in ways]
        ways.append({"way": "bitfuse, odd", "failed": "RuntimeError: no"})
        return {
            "version": "2.0",
            "seed": 0,
            "layers": 2,
            "tokens": 6144,
            "left": {"aten.gelu.default": 2},
            "ways": ways,
        }

    ways_of = ["stock", "bitfuse", "bitfuse, CUDA graph", "stock, inductor", "bitfuse, inductor"]
    machine = dict.fromkeys(("device", "driver", "torch", "triton", "diffusers"), "1") | {"date": "2026-11-29T"}
    on_cpu = {"machine": machine, "rows": [row({"stock, inductor": 4}), row({"stock, inductor": 3})]}
    table = _tables().compiled(on_cpu, None).splitlines()
    assert table[:2] == ["| way | elements that differ, on the CPU |", "| --- | --- |"]
    assert table[2:7] == [
        "| `accelerate` | 0 of 18 |",
        "| `accelerate(cuda_graph=True)` | 0 of 18 |",
        "| stock, inductor | 7 of 18 |",
        "| opaque operators, inductor | 0 of 18 |",
        "| opaque operators, odd | does not run |",
    ]
    assert "0 matmuls, 0 attentions, 2 GELUs" in table[-1]
    assert "GPU" not in "".join(table)
    times = {"stock": 9.0, "bitfuse": 4.0, "bitfuse, CUDA graph": 2.0, "stock, inductor": 1.0, "bitfuse, inductor": 3.0}
    on_gpu = {"machine": machine, "path": "x-compiled.json", "rows": [row({"stock, inductor": 4}, **times)]}
    table = _tables().compiled(on_cpu, on_gpu).splitlines()
    assert table[4] == "| stock, inductor | 7 of 18 | 1.0 ms, 4 of 9 |"
    fastest = "the fastest compiled way that keeps every bit (opaque operators, inductor) takes 1.50x the time"
    assert f"At 6144 tokens {fastest} of bitfuse's own graph." in table[-1]
    on_gpu["rows"] = [row({"stock, inductor": 4, "bitfuse, inductor": 1}, **times)]
    assert "At 6144 tokens no compiled way keeps every bit." in _tables().compiled(on_cpu, on_gpu)


def _step(tokens, stock_ms, launches=10_000, **more):
    ms = {"stock": {"median": stock_ms}, "bitfuse": {"median": stock_ms / 2}}
    kernels = {"stock": {"matmul": 50.0, "attention": 20.0, "other": 30.0, "launches": launches}}
    row = {"host": "sglang", "host_version": "SGLang 1.0", "version": "2.0", "layers": 1, "tokens": tokens}
    row |= {"ms": ms, "speed_ups": {"bitfuse": 2.0}, "peak_gb": {"stock": 2.0, "bitfuse": 1.5}, "kernels_ms": kernels}
    return {**row, "mismatch": None, **more}


def test_other_hosts_steps_and_ranks_have_rows_and_diffusers_none():
    machine = {"device": "H100", "driver": "1", "torch": "2", "triton": "3", "diffusers": "0", "date": "2026-11-25T"}
    model = [_step(6144, 110.0), _step(64, 500.0, mismatch="output 0 differs at [0]"), _step(7, 9.0, host="diffusers")]
    steps = {"machine": machine, "path": "2026-11-25-x-sglang-model.json", "model": model}
    ranks = {"machine": machine, "path": "2026-11-25-x-2.3-ranks.json", "host": "SGLang 1.0", "ranks": 2, "differs": {}}
    ranks |= {"geometry": "1 layer: 6144 video and 126 audio tokens", "speed_up": 1.5}
    ranks["ms"] = {way: {"median": ms, "p10": ms - 1, "p90": ms + 2} for way, ms in (("stock", 30), ("bitfuse", 20))}
    table = _tables().hosts([steps], [ranks]).splitlines()
    assert table[2:5] == [
        "| SGLang 1.0 | 2.0 | H100 | 64 | 500 ms | 250 ms, 2.00x | - | - | 2.0 GB, -25% | output 0 differs at [0] |",
        "| SGLang 1.0 | 2.0 | H100 | 6144 | 110 ms | 55 ms, 2.00x | - | - | 2.0 GB, -25% | identical in every bit |",
        "| SGLang 1.0 | 2.3 | 2 H100 | 6144 | 30 ms (29 to 32) | 20 ms (19 to 22), 1.50x | - | - | - | "
        "identical in every bit |",
    ]
    assert table[5] == ""
    assert "At 64 tokens stock waits for the CPU, which launches a kernel every 50 us here" in table[6]
    assert "At 6144 tokens" not in table[6]


def test_benchmark_documents_name_machine_and_versions_and_have_no_red_gate():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        document = _tables().json.loads(path.read_text())
        for fact in ("device", "driver", "torch", "triton", "date"):
            assert document["machine"][fact], f"{path.name}: {fact}"
        if "equal" in document:
            assert document["equal"] is True, path.name
            rows = [
                r
                for part in ("operators", "overhead", "model", "audit", "first_step", "run", "decode", "first_decode")
                for r in document.get(part, ())
            ]
            assert rows, path.name
            assert all(row["mismatch"] is None for row in rows), path.name
        else:
            assert document["exit_code"] == 0, path.name


def test_files_in_the_tree_exist():
    files = re.findall(r"^[│├└─\s]*([\w/.]+\.(?:py|md)|\w+/)\s{2,}", README, flags=re.MULTILINE)
    assert files
    for file in files:
        name = file.rstrip("/")
        assert (ROOT / name).exists() or any((ROOT / "src").rglob(name)), file


def test_the_encoders_table():
    tables = _tables()
    assert tables.encoder(None) == "", "nothing where none was measured yet"
    facts = {"device": "a card", "driver": "1", "torch": "2", "triton": "3", "diffusers": "4", "date": "2026-11-29T01"}
    row = {"encode": "2.0 768x512x1", "stock_ms": [3.0, 2.0], "bitfuse_ms": [1.0, 1.5], "equal": True}
    row |= {"peak_gb": {"stock": 2.0, "bitfuse": 1.0}, "first_s": {"stock": 0.1, "bitfuse": 9.0}}
    row |= {"kernels": {"stock": {"launches": 700}, "bitfuse": {"launches": 180}}}
    table = tables.encoder({"machine": facts, "rows": [row, {**row, "equal": False}], "path": "a.json"}).splitlines()
    assert table[2] == (
        "| 2.0 768x512x1 | 2.0 ms | 1.0 ms, 2.00x | 0.1 to 9.0 s | 2.00 to 1.00 GB | 700 to 180 | "
        "identical in every bit |"
    )
    assert table[3].endswith("| differs |")


def test_in_comfyuis_table_a_graph_has_a_peak_only_where_what_it_holds_was_counted():
    tables = _tables()
    path = ROOT / "benchmarks" / "results" / "2026-11-29-h200-comfyui.json"
    document = {**json.loads(path.read_text()), "path": path.name}
    assert all("graph_holds_gb" not in row for row in document["rows"])
    *_, note = (table := tables.comfyui(document)).splitlines()
    assert "0.18 GB, 0.24 GB |" in table
    assert "bitfuse's without a graph. " in note
    for row in document["rows"]:
        row["graph_holds_gb"] = 1.5
    *_, note = (table := tables.comfyui(document)).splitlines()
    assert "0.18 GB, 0.24 GB, 1.60 GB |" in table
    assert "bitfuse's without a graph, then with it. " in note
