"""The tables of README and docs are what the committed CSVs say."""

import subprocess
import sys

import pytest
from helpers import ROOT

import tables


def test_the_committed_tables():
    """Run python studies/tables.py if this fails."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "studies" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_number_that_differs_is_found(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table ") >= 3
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", ("README.md",))
    (tmp_path / "README.md").write_text(text.replace("| .643 | .641 |", "| .643 | .643 |"))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="README.md differ"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("<!-- table nothing -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="nothing"):
        tables.main()


def test_numbers():
    """Rounded once, from the CSV's digits."""
    assert [tables.short(x) for x in ("-0.04849", "0.05449", "24.4321", "-49228.6", "0")] == [
        *("-.048", ".054", "24.4", "-49,229", ".000"),
    ]
