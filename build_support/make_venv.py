"""Makes a virtual environment with pip, also where Python came without ensurepip and pip (bare Debian).

usage: python3 build_support/make_venv.py FOLDER
"""

from __future__ import annotations

import configparser
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv
from pathlib import Path

PIP_VERSION = "25.3"
MIN_PYTHON = (3, 10)


def main() -> None:
    folder = Path(sys.argv[1])
    if sys.version_info < MIN_PYTHON:
        found, needed = ".".join(map(str, sys.version_info[:2])), ".".join(map(str, MIN_PYTHON))
        sys.exit(f"flash-attn needs Python {needed}, and python3 here is {found}: set PYTHON3 to a newer one")
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    venv.create(folder, with_pip=has_ensurepip, clear=True)
    if not has_ensurepip:
        install_pip(folder / "bin" / "python")
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"pip=={PIP_VERSION}"], check=True)


def install_pip(python: Path) -> None:
    """Installs pip by means of the first pip wheel that can be had."""
    with tempfile.TemporaryDirectory() as scratch:
        for source in (wheel_on_this_machine, wheel_from_index, wheel_from_debian):
            wheel = source(Path(scratch))
            if wheel is not None:
                print(f"pip comes from {wheel} ({source.__name__.replace('_', ' ')})", flush=True)
                install = [python, f"{wheel}/pip", "install", "--quiet", "--no-index", wheel]
                subprocess.run(install, check=True)
                return
    sys.exit("neither ensurepip nor a pip wheel was found: apt-get install python3-venv")


def wheel_on_this_machine(scratch: Path) -> Path | None:
    """Debian's python3-pip-whl keeps one here."""
    return newest(glob.glob("/usr/share/python-wheels/pip-*.whl"))


def wheel_from_index(scratch: Path) -> Path | None:
    """From the package index that pip's settings name."""
    index = pip_setting("index-url")
    if index is None:
        return None
    page_url = index.rstrip("/") + "/pip/"
    tls = ssl.create_default_context(cafile=pip_setting("cert"))
    with urllib.request.urlopen(page_url, context=tls, timeout=60) as page:
        html = page.read().decode()
    name = f"pip-{PIP_VERSION}-py3-none-any.whl"
    link = re.search(rf'href="([^"#]*{re.escape(name)})#sha256=([0-9a-f]{{64}})', html)
    if link is None:
        return None
    with urllib.request.urlopen(urllib.parse.urljoin(page_url, link[1]), context=tls, timeout=60) as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != link[2]:
        sys.exit(f"{name} from {page_url} does not match the hash given there")
    wheel = scratch / name
    wheel.write_bytes(content)
    return wheel


def pip_setting(name: str) -> str | None:
    """A global setting of pip's, from its environment variables or its configuration files."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
        return value
    user_files = ("~/.config/pip/pip.conf", "~/.pip/pip.conf")
    for file in (os.environ.get("PIP_CONFIG_FILE", ""), *user_files, "/etc/pip.conf"):
        config = configparser.ConfigParser(interpolation=None)
        config.read(os.path.expanduser(file))
        value = config.get("global", name, fallback=None)
        if value:
            return value
    return None


def wheel_from_debian(scratch: Path) -> Path | None:
    """From Debian's or Ubuntu's packages; fetching one takes no root, refreshing their list does."""
    if shutil.which("apt-get") is None:
        return None
    fetch = ["apt-get", "download", "python3-pip-whl"]
    if subprocess.run(fetch, cwd=scratch, check=False).returncode != 0 and os.geteuid() == 0:
        subprocess.run(["apt-get", "update"], check=False)
        subprocess.run(fetch, cwd=scratch, check=False)
    for package in scratch.glob("python3-pip-whl_*.deb"):
        subprocess.run(["dpkg", "-x", package, scratch], check=True)
    return newest(glob.glob(str(scratch / "usr/share/python-wheels/pip-*.whl")))


def newest(files: list[str]) -> Path | None:
    return Path(max(files)) if files else None


if __name__ == "__main__":
    main()
