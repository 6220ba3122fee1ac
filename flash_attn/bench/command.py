"""The command line of python -m flash_attn bench."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from flash_attn.bench import cpu_path, impls, report, runner, summary
from flash_attn.bench.suites import CPU_PATH, SUITES, Case, suites_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Speed, memory and error beside what a user would pick instead."
    parser.epilog = "\n".join(
        ["suites:", *(f"  {name:11} {suite.purpose}" for name, suite in SUITES.items())]
        + ["implementations:", *(f"  {name:11} {meaning}" for name, meaning in impls.MEANINGS.items())]
    )
    parser.add_argument("--suites", type=_names, help="comma-separated (default: every one for the device)")
    parser.add_argument("--impls", type=_names, help="comma-separated, not of the suite cpu (default: the usual ones)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rep", type=float, default=30.0, metavar="MS", help="time of a measurement (default: 30)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, in turn (default: 3)")
    parser.add_argument("--full", action="store_true", help="the suite cpu: every case, not a few")
    parser.add_argument("--json", type=Path, metavar="FILE", help="record the results, after every case")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="FILE", help="compare recorded results and stop")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(args: argparse.Namespace) -> int:
    """0, or 1 if a result of this package is wrong or the GPU was lost, or 2 for a misuse."""
    if args.summary:
        try:
            results = [report.read_json(file) for file in args.summary]
        except (OSError, ValueError) as error:
            return report.fail(str(error))
        print("\n".join([summary.table(results), *summary.problems(results, only_ours=True)]))
        return 0
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return report.fail("--device cuda: torch sees no GPU")
    try:
        _check(args)
        suites = _suites(args, device)
        names, implementations = _implementations(args, device, suites)
        cases = [(case, names[case.suite]) for name in suites for case in _cases(name, device, args.only)]
        on_cpu_path = cpu_path.declared(not args.full, args.only) if CPU_PATH in suites else None
        if not cases and not (on_cpu_path and on_cpu_path.cases):
            raise ValueError(f"--only: a case of {', '.join(suites)} must contain it, got {args.only!r}")
    except ValueError as error:
        return report.fail(str(error))
    result: dict[str, Any] = {"format": report.FORMAT, "environment": report.environment(device), "rows": []}
    result["settings"] = {"rep_ms": args.rep, "rounds": args.rounds, "suites": suites}
    print(report.heading(result["environment"]), flush=True)
    settings = runner.Settings(device, args.rep, args.rounds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every backend that refuses a call; the table tells it
        lost = _measure(args, cases, implementations, settings, on_cpu_path, result)
    print("\n".join([*summary.problems([result]), "", summary.table([result])]))
    return 1 if lost or report.wrong_ones(result["rows"], "ours") else 0


def _check(args: argparse.Namespace) -> None:
    """What a run of minutes would find at its end, or never."""
    if not 0 < args.rep < float("inf"):
        raise ValueError(f"--rep must be a time above 0 in ms, got {args.rep}")
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    for option in ("suites", "impls"):
        if getattr(args, option) == []:
            raise ValueError(f"--{option} must give at least one name, got none")
    if args.json:
        try:
            report.require_writable(args.json)
        except OSError as error:
            raise ValueError(f"--json: {error}") from error


def _suites(args: argparse.Namespace, device: str) -> list[str]:
    if args.suites is None:
        available = suites_for(device)
        with_cpu_path = cpu_path.SCRIPT.exists() and args.impls is None
        return [name for name in available if name != CPU_PATH or with_cpu_path]
    for name in args.suites:
        if name not in SUITES:
            raise ValueError(f"--suites: a suite must be one of {', '.join(SUITES)}, got {name!r}")
        if device not in SUITES[name].devices:
            raise ValueError(f"--suites: {name} runs on {', '.join(SUITES[name].devices)} only, got device {device}")
        if name == CPU_PATH and not cpu_path.SCRIPT.exists():
            raise ValueError(f"--suites: {name} needs the source tree, and there is no {cpu_path.SCRIPT}")
        if name == CPU_PATH and args.impls is not None:
            got = ",".join(args.impls)
            raise ValueError(f"--impls must not be given with {name}, which has its own two, got {got}")
    return args.suites


def _implementations(
    args: argparse.Namespace, device: str, suites: list[str]
) -> tuple[dict[str, list[str]], dict[str, impls.Implementation]]:
    """Per suite the names to measure, and what they name. A default peer that is not installed is left out."""
    asked = args.impls
    usual = impls.DEFAULTS[device]
    wanted = {
        name: list(dict.fromkeys(asked or (*(SUITES[name].only or usual), *SUITES[name].also))) for name in suites
    }
    loaded = {}
    for name in dict.fromkeys(name for names in wanted.values() for name in names):
        try:
            loaded[name] = impls.load(name)
        except ValueError as error:
            raise ValueError(f"--impls: {error}") from error
        except ImportError as error:
            print(f"# {name} is not here: {error}", flush=True)
    if asked and not loaded:
        raise ValueError(f"--impls: none of {', '.join(asked)} can be imported")
    return {suite: [name for name in names if name in loaded] for suite, names in wanted.items()}, loaded


def _cases(suite: str, device: str, only: str) -> list[Case]:
    return [case for case in SUITES[suite].cases(suite, device) if only in case.title]


def _measure(
    args: argparse.Namespace,
    cases: list[tuple[Case, list[str]]],
    implementations: dict[str, impls.Implementation],
    settings: runner.Settings,
    on_cpu_path: cpu_path.Declared | None,
    result: dict[str, Any],
) -> bool:
    """Fills result["rows"]. True if the GPU was lost on the way."""
    total = len(cases) + (len(on_cpu_path.cases) if on_cpu_path else 0)
    table = report.Table(settings.device, total, sys.stdout)

    def add(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        table.add(row)
        if args.json:
            report.write_json(args.json, result)

    try:
        for case, names in cases:
            try:
                chosen = [implementations[name] for name in names]
                add(runner.run_case(case, chosen, settings, table.progress))
            except torch.OutOfMemoryError as error:
                print(f"# {case.suite} {case.title}: left out, its inputs do not fit: {error}", flush=True)
            if settings.device == "cuda":
                torch.cuda.empty_cache()
        if on_cpu_path:
            for row in on_cpu_path.rows(settings.rep_ms * settings.rounds / 1e3, table.progress):
                add(row)
    except runner.DeviceLost as error:
        result["stopped"] = f"{case.suite} {case.title}: {error}"
        print(f"# {result['stopped']}", flush=True)
        if args.json:
            report.write_json(args.json, result)
        return True
    return False
