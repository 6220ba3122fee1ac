"""The annotations of public functions as a user's type checker reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

import flash_attn

PACKAGE = Path(flash_attn.__file__).parent


def test_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").exists(), "type checkers ignore the annotations of an installed package without it"


# mypy is told where the package is, since it looks into site-packages only and the source tree may be what is tested.
def test_users_calls_pass_a_strict_type_checker(tmp_path, monkeypatch):
    pytest.importorskip("mypy", reason="requirements/test.txt is not installed: types are not tested")
    (tmp_path / "flash_attn").symlink_to(PACKAGE)
    monkeypatch.setenv("MYPYPATH", str(tmp_path))
    mypy = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    checked = subprocess.run([*mypy, ROOT / "tests" / "typed_calls.py"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
