"""Files: written whole or not at all, never one over another, and JSON that is read with care.

What is written goes to a temporary file in the same folder, which then takes the place of the old one in one step. So
whatever happens (no room, Ctrl-C) there is the old file or the new one, and no half of either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitfuse.core.lines import visible

_MOST_BYTES = 64 << 20  # of a JSON file: a proof document of all operators with all sweeps has less than one MiB
_MOST_DIGITS = 4300  # of a number: Python's own limit, beyond which it takes long to read


# -- before the work: can it be written, and is it another file than the others? ---------------------------------------


def why_not_written(path: Path) -> str | None:
    """Why no file can be written at this path, with what is accepted, as far as that is known before it is tried."""
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        return why_no_folder(Path(os.path.realpath(path)).parent)
    except NotADirectoryError:
        return why_no_folder(path.parent)
    except (OSError, ValueError) as error:
        return f"{_shown(path)} can't be written ({_reason(error)}); accepted: a file that can be written"
    if stat.S_ISDIR(facts.st_mode):
        return f"{path} is a folder; accepted: a file that can be written"
    if not os.access(path, os.W_OK):
        return f"{path} can't be written; accepted: a file that can be written"
    return None


def why_no_folder(path: Path) -> str | None:
    """Why no file can be made in a folder of this path, whether it is there or is still to be made."""
    try:
        there = next((p for p in (path, *path.parents) if os.path.lexists(p)), Path())
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            os.stat(there / path.name)  # a name that no file can have shows here
            return None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"no file can be written to {_shown(path)} ({_reason(error)}); accepted: a folder where that can be done"
    return f"no file can be written to {path}; accepted: a folder where that can be done"


def why_not_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> str | None:
    """Which two of these, by their options, are the same file, so that one would be written over the other."""
    written = [(option, path) for option, path in outputs.items() if path is not None]
    for i, (option, path) in enumerate(written):
        for other, read in inputs.items():
            if read is not None and same(path, read):
                return f"{option} {path} would be written over {other} {read}; accepted: another file"
        for other, second in written[i + 1 :]:
            if same(path, second):
                return f"{option} {path} and {other} {second} are the same file; accepted: two files"
            for a, b in ((path, second), (second, path)):
                if Path(os.path.realpath(a)) in Path(os.path.realpath(b)).parents:
                    return f"{a} can't be a file and the folder of {b}; accepted: files of which none is in another"
    return None


def same(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file, which need not be there: through links, or in letters of another case."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(a), os.stat(b)):
            return True
    first, second = os.path.realpath(a), os.path.realpath(b)
    return first == second or (_folded(first) == _folded(second) and _ignores_case(Path(first).parent))


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _ignores_case(folder: Path) -> bool:
    """Whether the file system of a folder, or of the nearest that is there, takes `a` and `A` for one name."""
    there = next(p for p in (folder, *folder.parents) if p.is_dir())
    try:
        with tempfile.NamedTemporaryFile(prefix="bitfuse-", dir=there) as file:
            return os.path.exists(os.path.join(there, os.path.basename(file.name).swapcase()))
    except OSError:  # where nothing can be written, nothing is overwritten
        return False


# -- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, content: str) -> None:
    """Write a text, in UTF-8, as a whole: until it is there the old file is. OSError where that can't be done.

    Missing folders are made, a link stays a link. A device, a pipe, and the file that is this process's output are
    written to as they are.
    """
    data = content.encode("utf-8", "backslashreplace")  # a lone surrogate has no bytes
    try:
        facts = os.stat(path)
    except FileNotFoundError:
        facts = None
    own = None if facts is None else _own_output(facts)
    try:
        if facts is None or (own is None and stat.S_ISREG(facts.st_mode)):
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            _replace(target, data, facts)
        else:
            sys.stdout.flush()
            with open(path if own is None else own, "wb", closefd=own is None) as file:
                file.write(data)
    except OSError as error:  # which may name the temporary file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_stream(path: Path) -> bool:
    """Whether what is written to this path is added to what was written before: a device, a pipe, one's own output."""
    try:
        facts = os.stat(path)
    except OSError:
        return False
    return _own_output(facts) is not None or not stat.S_ISREG(facts.st_mode)


def _own_output(facts: os.stat_result) -> int | None:
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(facts, os.fstat(descriptor)):
                return descriptor
    return None


def _replace(target: Path, data: bytes, old: os.stat_result | None) -> None:
    temporary = target.with_name(f".bitfuse-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(file.fileno())
        if old is not None:
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        os.replace(temporary, target)
    except PermissionError:
        if old is None:
            raise
        target.write_bytes(data)  # the file is one's own to write, and its folder is not
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_result(folder: Path, earlier: Iterable[str], last: str) -> Iterator[Path]:
    """A folder to write a result to: at the end its files take the places of those of the same names in `folder`.

    earlier    names of files of an earlier result, which then go; until then, or where this block raises, they stay
    last       the name of the file that is put there last, which says what the others are
    """
    making = Path(tempfile.mkdtemp(prefix=".bitfuse-", dir=folder))
    try:
        yield making
        made = sorted((file.name for file in making.iterdir()), key=lambda name: name == last)
        for name in made:
            os.replace(making / name, folder / name)
        for name in set(earlier) - set(made):
            (folder / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values, and a line end. What is no number of JSON's (NaN, an infinity) stands there as a text."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(_quoted(value), indent=indent, allow_nan=False) + "\n"


def _quoted(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, Mapping):
        return {name: _quoted(inner) for name, inner in value.items()}
    return [_quoted(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def sha256(path: Path) -> str | None:
    """Of what stands in a file; None where it can't be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


# -- what an earlier run wrote -----------------------------------------------------------------------------------------


def is_result(file: Path) -> bool:
    """Whether bitfuse wrote a file of this name, .json or .html: the one begins with an exit code and a verdict, the
    other's title names the command."""
    try:
        if file.suffix == ".html":
            with file.open(encoding="utf-8") as page:
                return "<title>bitfuse " in page.read(4096)
        found = read_json(file, "", "")
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and type(found.get("exit_code")) is int and isinstance(found.get("verdict"), str)


def check_folder(out: Path, names: Iterable[str]) -> None:
    """Make a folder for a result; ValueError where nothing can be written there, or over somebody else's files."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".bitfuse-", dir=out))
    except (OSError, ValueError) as error:
        raise ValueError(f"--out {_shown(out)} can't be written: {_reason(error)}") from None
    for name in names:
        if os.path.lexists(out / name) and not is_result(out / name):
            raise ValueError(f"--out {out} holds a {name} that bitfuse did not write; accepted: a folder without one")


# -- reading JSON ------------------------------------------------------------------------------------------------------


def read_json(path: Path, name: str, accepted: str, *, strict: bool = False) -> Any:
    """What stands in a JSON file. ValueError, a sentence that begins with `name`, for whatever else is there.

    accepted    what should be there, in words, for that sentence
    strict      also refuse what only Python reads: NaN, Infinity, and a number that is too large to be finite
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} can't be read: {_reason(error)}; accepted: {accepted}") from None
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{name} has more than {_MOST_BYTES >> 20} MiB; accepted: {accepted}")
    options: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _finite} if strict else {}
    try:
        if data.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it begins with a byte-order mark, which JSON has not")
        return json.loads(data.decode(), parse_int=_whole, object_pairs_hook=_once, **options)
    except UnicodeDecodeError as error:
        why = f"byte {error.start + 1} is not UTF-8"
    except ValueError as error:
        why = visible(str(error))[:200]
    except RecursionError:
        why = "it is nested too deeply"
    raise ValueError(f"{name} is not JSON: {why}; accepted: {accepted}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON's")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"the number {text[:20]}... has {len(text)} digits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError(f"{next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)!r} twice")
    return found


# -- in words ----------------------------------------------------------------------------------------------------------


def _reason(error: Exception) -> str:
    """An operating system's word for it, or what Python says of a path that it does not even try."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return str(error)


def _shown(path: Path) -> str:
    """A path of any length in a sentence."""
    return text if len(text := str(path)) <= 120 else f"{text[:117]}..."
