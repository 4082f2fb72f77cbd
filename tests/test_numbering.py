"""Kinds, slots and wire layout are said once: numbering.py, of which everything else is made."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlkernels
from mlkernels import numbering, schemas
from mlkernels.backends import native
from mlkernels.numbering import HEAD_TABLES, KIND_BITS, KINDS, TRAINABLE, TRANSFORM_TABLES, Slot, Structure
from mlkernels.spec import spec

PACKAGE = Path(mlkernels.__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"
in_a_checkout = pytest.mark.skipif(not CSRC.exists(), reason="installed without sources")


@in_a_checkout
def test_headers_are_of_these_modules():
    """csrc/numbering.h and schemas.h as they lie there: what any build, or none yet, would compile."""
    assert (CSRC / "numbering.h").read_text() == numbering.header()
    assert (CSRC / "schemas.h").read_text() == schemas.header()


@in_a_checkout
def test_build_brings_the_header_up_to_date(tmp_path):
    """Alone, without torch; and where nothing changed it is not touched, or all would be compiled again."""
    for name in ("csrc/build.py", "mlkernels/numbering.py", "mlkernels/schemas.py"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        target.write_text((PACKAGE.parent / name).read_text())
    source, header = tmp_path / "mlkernels" / "numbering.py", tmp_path / "csrc" / "numbering.h"
    program = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'csrc'); import build; build.write_headers()"
    make = lambda: subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    make()
    before = header.stat()
    assert header.read_text() == numbering.header()
    make()
    assert (header.stat().st_mtime_ns, header.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    text = source.read_text()
    assert text.count("TRUNCATED = 3") == 1
    source.write_text(text.replace("TRUNCATED = 3", "TRUNCATED = 3\n    ANOTHER = 4").replace(
        'Value(Slot.HEAD_A, "k", "Truncated.k"),)', 'Value(Slot.HEAD_A, "k", "Truncated.k"),), _H.ANOTHER: ()'
    ))  # fmt: skip
    make()
    assert "  ANOTHER = 4,\n" in header.read_text()
    assert re.findall(r'NUMBERING\[\] = "(\w+)"', header.read_text()) != [numbering.signature()]
    source, header = source.with_name("schemas.py"), header.with_name("schemas.h")
    text = source.read_text()
    for one, other in (("bool stats) ->", "bool stats, bool more) ->"), ("OOOpp", "OOOppp")):
        assert text.count(one) == 1
        source.write_text(text.replace(one, other))
        make()
        assert re.findall(r'SCHEMAS\[\] = "(\w+)"', header.read_text()) != [schemas.signature()]


def test_what_libraries_implement_is_in_the_signature():
    """An operator of C++ that is defined elsewhere might be called by the schema that a later library has."""
    if native._cpu is None:
        pytest.skip(native.cpu_missing)
    known = {f"{of}::{schema.partition('(')[0]}" for of, each in schemas.SCHEMAS.items() for schema in each}
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    ours = {name for name in names if name.startswith("mlkernels::")}
    assert "mlkernels::linear_rows" in ours and ours <= known


@pytest.mark.parametrize("module", [numbering, schemas])
def test_library_of_other_sources_is_refused(module, monkeypatch):
    """One that was built before a slot moved, or an argument, would take one loss for another, or fail at a call."""
    if native._cpu is None:
        pytest.skip(native.cpu_missing)
    monkeypatch.setattr(module, "signature", lambda: "another")
    name = f"{module.__name__.replace('.', '/')}.py"
    assert native._load("_cpu") == (None, f"_cpu.abi3.so was built from another {name}: build it again")


def test_library_of_older_sources_is_refused(monkeypatch):
    """One without an entry point that today's Python calls is no reason for `import mlkernels` to fail."""
    if native._cpu is None:
        pytest.skip(native.cpu_missing)
    points = {**native._ENTRY_POINTS, "_cpu": dict.fromkeys(("numbering", "of_tomorrow"))}
    monkeypatch.setattr(native, "_ENTRY_POINTS", points)
    assert native._load("_cpu") == (None, "_cpu.abi3.so was built from older sources: build it again")


def test_numbers_fit_where_they_travel():
    assert list(KINDS) == list(range(len(KINDS)))
    for kind, _ in KINDS.values():
        assert [member.value for member in kind] == list(range(len(kind)))
        assert len(kind) <= 1 << KIND_BITS
    assert [slot.value for slot in Slot] == list(range(numbering.SLOTS))
    assert all(tables <= TRAINABLE for tables in (*TRANSFORM_TABLES, *HEAD_TABLES))
    assert max(TRAINABLE) < numbering.LOSS_SLOTS <= Slot.SMOOTHING
    assert Structure._fields == tuple(field.name.lower() for field in list(KINDS)[:-1])
    assert Structure(4, 1, 3, 4, 1, 1).packed == 0x114314


def test_structures():
    tables = spec(numbering.TransformKind.PIECEWISE, head=numbering.HeadKind.TAU)
    assert {*tables.tables} == tables.ids.tables == {Slot.TRANSFORM_A, Slot.TRANSFORM_B, Slot.HEAD_A, Slot.HEAD_B}
    assert not spec().ids.tables
    assert numbering.structure_of([float(kind) for kind in (*tables.ids, 0, -100, 0)]) == tables.ids


@in_a_checkout
@pytest.mark.parametrize("suffix", [".py", ".h", ".cpp", ".cu"])
def test_no_slot_by_its_number(suffix):
    """Nor a kind by its place, nor how many bits one takes: names say which."""
    place = r"\b(?:ids|structure|consts|numbers|v|values\.at|by_slot|by)\[\d+\]|\b(?:shared|number)\(values, \d"
    literal = re.compile(rf"{place}|slot (?:[<>]=?|==) \d|structure >> \d|MODES >> ")
    files = [path for folder in (PACKAGE, CSRC) for path in folder.rglob(f"*{suffix}")]
    found = [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if literal.search(line)]
    assert not found
