"""Files are written whole or not at all, none over another, and JSON is read with care; text gives no orders."""

from __future__ import annotations

import errno
import io
import json
import os
import stat

import pytest
from rich.console import Console

from bitfuse.core import lines
from bitfuse.core.lines import error_line
from bitfuse.tools import files, text

# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_as_a_whole_and_keeps_its_mode_and_its_links(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to("a.json")
    with file.open() as open_before:
        files.write(link, "new")
        assert open_before.read() == "old", "whoever reads it reads all of the old one"
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    files.write(tmp_path / "sub" / "deep" / "b.json", "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link.json", "sub"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["write", "replace"])
def test_what_ends_a_write_leaves_the_old_file_and_nothing_else(error, where, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fail(*args):
        raise error

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:1])
            raise error

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(files, "open", Full, raising=False)
        else:
            patch.setattr(os, where, fail)
        with pytest.raises(type(error)) as raised:
            files.write(file, "new" * 1000)
    if isinstance(error, OSError):
        assert raised.value.filename == str(file), "not that of the temporary file"
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_devices_and_pipes_are_written_as_they_are(tmp_path, capfd):
    files.write("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    files.write("/dev/stdout", "printed\n")
    assert capfd.readouterr().out == "printed\n"
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        files.write("/dev/full", "x")


def test_a_result_takes_the_place_of_the_earlier_one_at_its_end(tmp_path):
    for name in ("verdict", "film", "mine"):
        (tmp_path / name).write_text("old")

    def interrupted():
        with files.new_result(tmp_path, {"verdict", "film"}, "verdict") as making:
            (making / "verdict").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(("verdict", "film", "mine"), "old")
    with files.new_result(tmp_path, {"verdict", "film"}, "verdict") as making:
        (making / "verdict").write_text("new")
        assert (tmp_path / "verdict").read_text() == "old"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"verdict": "new", "mine": "old"}


def test_json_is_json():
    odd = {"a": [float("nan"), float("inf"), {"b": -float("inf")}], "c": 1.5, "d": "\ud800\x1b"}
    found = json.loads(files.as_json(odd), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": ["NaN", "Infinity", {"b": "-Infinity"}], "c": 1.5, "d": "\ud800\x1b"}
    assert files.as_json(odd).isascii()


# -- which files -----------------------------------------------------------------------------------------------------


def test_one_file_by_two_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("x")
    (tmp_path / "sub").mkdir()
    os.link("there", "hard")
    os.symlink("there", "link")
    os.symlink("not yet", "dangling")
    os.symlink("sub", "folder")
    for a, b in (
        ("there", "./there"),
        ("there", "hard"),
        ("there", "link"),
        ("there", str(tmp_path / "sub" / ".." / "there")),
        ("not yet", "dangling"),
        ("not yet", "./not yet"),
        ("sub/x", "folder/x"),
        ("no/such/x", "no/such/../such/x"),
    ):
        assert files.same(files.Path(a), files.Path(b)), (a, b)
        assert "same file" in files.why_not_apart({"--json": files.Path(a), "--html": files.Path(b)}, {})
        assert "written over --check" in files.why_not_apart({"--json": files.Path(a)}, {"--check": files.Path(b)})
    assert not files.same(files.Path("there"), files.Path("other"))
    monkeypatch.setattr(files, "_ignores_case", lambda folder: True)
    assert files.same(files.Path("A.json"), files.Path("a.JSON")), "where the file system takes them for one"
    assert "the folder of" in files.why_not_apart({"--json": files.Path("x"), "--html": files.Path("x/y")}, {})


def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300), files.Path("a\0b"), files.Path("x" * 9000)):
        assert "accepted" in files.why_not_written(path), path
    for path in (tmp_path / "file", tmp_path / "new", tmp_path / "no" / "such" / "new", files.Path("/dev/null")):
        assert files.why_not_written(path) is None
    assert "accepted" in files.why_no_folder(tmp_path / "file")
    assert "accepted" in files.why_no_folder(tmp_path / ("x" * 300))


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xef\xbb\xbf{}", "a byte-order mark"),
        ("{}".encode("utf-16"), "byte 1 is not UTF-8"),
        (b'{"a": 1, "a": 1}', "'a' twice"),
        (b'{"a\\u001b": 1, "a\\u001b": 1}', "twice"),
        (b"9" * 5000, "has 5000 digits"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_no_json_gets_one_line(content, why, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"^--config x is not JSON: .*; accepted: an object$") as error:
        files.read_json(tmp_path / "x", "--config x", "an object")
    assert why in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_without_an_end_is_read_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(files, "_MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"^x has more than 1 MiB; accepted: an object$"):
        files.read_json(files.Path("/dev/zero"), "x", "an object")
    with pytest.raises(ValueError, match=r"^x can't be read: .*; accepted: an object$"):
        files.read_json(files.Path("/nowhere"), "x", "an object")


def test_only_what_bitfuse_wrote_is_known_as_such(tmp_path):
    (tmp_path / "a.json").write_text('{"exit_code": 0, "verdict": "equal"}')
    (tmp_path / "a.html").write_text("<!doctype html><title>bitfuse compare: equal</title>")
    assert files.is_result(tmp_path / "a.json")
    assert files.is_result(tmp_path / "a.html")
    for name, content in (
        ("b.json", '{"exit_code": 0}'),
        ("c.json", "[]"),
        ("d.json", ""),
        ("e.json", "\udcff"),
        ("b.html", "<title>mine</title>"),
        ("c.html", "\udcff"),
    ):
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        assert not files.is_result(tmp_path / name)
        with pytest.raises(ValueError, match="that bitfuse did not write; accepted: a folder without one"):
            files.check_folder(tmp_path, [name])
    assert not files.is_result(tmp_path / "nowhere.json")


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        *("\x1b[31m", "\n", "\r", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\u200b", "\u200d", "\ufeff", "\u2028"),
        *("\u061c", "\u00ad", "\u034f", "\u3164", "\u2800", "\ufe0f", "\U000e0041", "\U000e0100", "\ud800"),
    ],
)
def test_what_is_not_seen_is_shown(odd):
    shown = lines.visible(f"a{odd}b")
    assert shown.isprintable()
    assert shown.isascii()
    assert len(lines.one_line(f"a{odd}b{odd}").splitlines()) == 1
    assert lines.visible("Füchse, 狐, 🦊 and [red]") == "Füchse, 狐, 🦊 and [red]"


def test_rich_shows_text_as_it_is():
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system=None)
    text.say(console, "[/] [bold]x[/bold] :smile: [link=file:///]y", text.cell("z\nmatches", "red"))
    assert out.getvalue() == "[/] [bold]x[/bold] :smile: [link=file:///]y z matches\n"
    assert lines.one_line("x" * 50, 20) == "x" * 17 + "..."


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(), "ValueError"),
        (ValueError("  \n "), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (ValueError("first\n  second\x1b[31m\n"), "ValueError: first second\\x1b[31m"),
        (ValueError("at 5:3:\n" + "x = y\n" * 50 + "no such name"), "ValueError: at 5:3: no such name"),
        (ValueError("x" * 300), "ValueError: " + "x" * 197 + "..."),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), "OSError: [Errno 28] No space left: '/a/b'"),
    ],
)
def test_an_exception_is_said_in_one_line(error, line):
    assert error_line(error) == line


def test_an_exception_is_said_at_length_or_without_a_files_name():
    assert error_line(ValueError("x" * 300), 400) == "ValueError: " + "x" * 300
    assert error_line(OSError(errno.ENOSPC, "No space left", "/a/b"), paths=False) == "OSError: No space left"
    assert error_line(OSError("a host's own words"), paths=False) == "OSError: a host's own words"
