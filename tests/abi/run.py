"""Proves that one wheel serves several releases of torch: `make test-abi`.

Installs the wheel, as it was built, beside each torch in an environment of its own under build/abi, loads it there and
runs the tests that need no GPU.

usage: python tests/abi/run.py DIST [TORCH ...]     for example: dist torch==2.12.1
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "build" / "abi"

# The oldest that the stable ABI allows, the one that the wheel is built with, and the newest on the index.
TORCHES = ("torch==2.10.0", "torch==2.11.0", "torch")

# Tests of the repository, not of what is installed.
NOT_OF_THE_WHEEL = ("test_build.py", "test_layering.py", "test_readme.py", "test_demo.py")


def main() -> None:
    wheel = newest_wheel(Path(sys.argv[1]))
    print(f"the wheel is {wheel.name}")
    results = {torch: try_with(torch, wheel) for torch in sys.argv[2:] or TORCHES}
    print()
    for torch, (version, failure, seconds) in results.items():
        print(f"{torch:<14} {version:<16} {failure or 'passed'} ({seconds:.0f} s)")
    sys.exit(any(failure for _, failure, _ in results.values()))


def newest_wheel(folder: Path) -> Path:
    wheels = sorted(folder.glob("flash_attn-*-cp310-abi3-*.whl"), key=lambda file: file.stat().st_mtime)
    if not wheels:
        sys.exit(f"{folder} holds no wheel with kernels: `make wheel` needs nvcc for one")
    return wheels[-1]


def try_with(torch: str, wheel: Path) -> tuple[str, str, float]:
    """torch's exact version, what failed (nothing if all is well), and the seconds that it took."""
    start = time.monotonic()
    folder = ENVIRONMENTS / torch.replace("==", "-")
    python = folder / "bin" / "python"
    print(f"\n== {torch}", flush=True)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--progress-bar", "off", "--quiet"]
    subprocess.run([*install, "--upgrade", torch, "-r", ROOT / "requirements" / "test.txt", "numpy"], check=True)
    subprocess.run([*install, "--no-deps", "--force-reinstall", wheel], check=True)
    # From folders without a flash_attn of their own, which would hide the installed one.
    check = subprocess.run(
        [python, Path(__file__).with_name("check.py")], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    print(check.stdout, flush=True)
    version = check.stdout.partition("\n")[0]
    if check.returncode != 0:
        return version, "the module does not load or lacks its ops", time.monotonic() - start
    ignored = [f"--ignore={name}" for name in NOT_OF_THE_WHEEL]
    tests = subprocess.run([python, "-m", "pytest", "-q", *ignored, "."], cwd=ROOT / "tests")
    return version, "" if tests.returncode == 0 else "its tests fail", time.monotonic() - start


if __name__ == "__main__":
    main()
