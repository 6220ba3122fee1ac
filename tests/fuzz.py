"""Draws whole calls, forward, backward and with a cache, and compares every answer with the float64 oracle:
`python tests/fuzz.py --help`.
"""

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hypothesis
import torch
from checks import (
    Gradients,
    answer_of,
    assert_gradients_right,
    assert_right,
    gradients_on,
    oracle_gradients,
    output_gradients,
    poisoned,
)
from emulated_kernels import launched_keys
from emulation import IS_EMULATED, SMEM_BYTES, can_run
from fuzz_report import Failure, Tally, describe, reproducer, summary, traits
from harness import GPU_PATHS, build, device_of
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from memory import allocate, gaps, place
from strategies import EDGES, EMULATED, EMULATED_SM90, HEAD_DIMS, KINDS, calls, dims_in

import flash_attn
from flash_attn import _dispatch

_REDRAWS = 7  # of a call that breaks the tolerance rule
_LOOSE = 77  # what a loose max_seqlen is too large by
_SECONDS_TO_SHRINK = 60
_SECONDS_OF_A_HANG = 1800 if IS_EMULATED else 120
_SECONDS_PER_LINE = 5.0


class Stop(BaseException):
    """Ends a run. Hypothesis would take an Exception for a failing call."""


@dataclass(frozen=True)
class Options:
    """Which calls a run draws, and where it checks them."""

    paths: tuple
    num_calls: int
    kinds: tuple = KINDS
    head_dims: tuple = ()  # buckets; none: as many of each as fits the machine

    @property
    def sizes(self):
        sizes = EDGES if not IS_EMULATED else EMULATED_SM90 if self.paths == ("sm90",) else EMULATED
        return sizes._replace(dims=dims_in(self.head_dims)) if self.head_dims else sizes


# ---- One call -------------------------------------------------------------------------------------------------


def _inputs(path, call, number):
    """The call's inputs with their `number`th set of random numbers, laid out as it says, and its options."""
    case = replace(call.case, id=f"{call.case!r} {number}")
    inputs = _with_spare_rows(call, build(case, device_of(path), garbage=call.garbage))
    placed = {name: getattr(call, name) for name in "qkv"}
    placed = {name: place(getattr(inputs, name), memory) for name, memory in placed.items() if memory is not None}
    if call.shared_kv is not None:
        placed["k"], placed["v"] = _in_one_buffer(call.shared_kv, inputs.k, inputs.v)
    options = {"num_splits": call.num_splits, "pack_gqa": call.pack_gqa}
    if call.metadata is not None:
        options["scheduler_metadata"] = _metadata(call, inputs)
    if case.layout == "varlen" or case.varlen_q:
        options |= _max_seqlens(call)
    return replace(inputs, **placed), options


def _with_spare_rows(call, inputs):
    names = "qkv" if call.case.layout == "varlen" and call.case.page is None else "q"
    rows = {name: getattr(inputs, name) for name in names if call.spare_rows}
    spare = {name: x.new_full((call.spare_rows, *x.shape[1:]), call.garbage) for name, x in rows.items()}
    return replace(inputs, **{name: torch.cat((rows[name], spare[name])) for name in rows})


def _in_one_buffer(way, k, v):
    """K and V as two views of one buffer, as strategies.Call says."""
    if way == "columns":
        return torch.cat((k, v), dim=-1).split((k.shape[-1], v.shape[-1]), dim=-1)
    if way == "halves":
        return torch.stack((k, v), dim=1).unbind(1)
    return k, k[..., : v.shape[-1]]


def _metadata(call, inputs):
    case = inputs.case
    if call.metadata == "garbage":
        values = torch.arange(1 + 4 * len(case.lens_q), dtype=torch.int32, device=inputs.q.device)
        return values * 123_456_789
    return flash_attn.get_scheduler_metadata(
        len(case.lens_q), max(case.lens_q), max(case.lens_k), *case.heads, case.dims[0], inputs.layout["seqused_k"],
        case.dtype, case.dims[1], inputs.layout.get("cu_seqlens_q"), inputs.extra.get("cu_seqlens_k_new"),
        inputs.layout.get("leftpad_k"), case.page, max(case.new or (0,)), case.causal, case.window, 0,
        case.softcap > 0, call.num_splits, call.pack_gqa,
    )  # fmt: skip


def _gradients(path, call, number):
    """As _answer, of the backward pass."""
    inputs, options = _inputs(path, call, number)
    dout, dlse = output_gradients(inputs)
    arriving, arriving_dlse = poisoned(inputs, dout, dlse)
    arriving = arriving.to(device_of(path))
    if call.dout is not None:
        dout, arriving = place(dout, call.dout), place(arriving, call.dout)
    options["deterministic"] = call.deterministic
    ours = gradients_on(path, call.features, inputs, arriving, arriving_dlse, **options)
    return None if ours is None else Gradients(ours, *oracle_gradients(inputs, dout, dlse))


def _answer(path, call, number):
    """The answer to the call with its `number`th set of random numbers, or None where the path refuses it."""
    inputs, options = _inputs(path, call, number)
    case, device = inputs.case, device_of(path)
    shape = (*inputs.q.shape[:-1], case.dims[1])
    if not call.passes_out:
        torch.full(shape, torch.nan, dtype=case.dtype, device=device)  # likely the memory that the result will get
        answer = answer_of(path, call.features, inputs, **options)
        assert answer is None or answer.out.is_contiguous(), "out is not contiguous"
        return answer
    if call.out is None:
        flat = out = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
    else:
        flat, out = allocate(shape, call.out, case.dtype, device)
    answer = answer_of(path, call.features, inputs, out=out, **options)
    if answer is not None:
        assert answer.out.data_ptr() == out.data_ptr(), "the result is not the tensor given as out"
        assert gaps(flat, out).isnan().all(), "the memory between out's elements was written"
    return answer


def _max_seqlens(call):
    lengths = {"max_seqlen_q": max(call.case.lens_q)}
    if call.case.layout == "varlen":
        lengths["max_seqlen_k"] = max(call.case.lens_k)
    change = {"exact": lambda x: x, "loose": lambda x: x + _LOOSE, "none": lambda x: None}[call.max_seqlen]
    return {name: change(length) for name, length in lengths.items()}


def check(path, call):
    """Whether the path serves the call; raises where its answer or its refusal is wrong.

    The tolerance rule takes the naive computation's error as its measure. In a result of a few elements that can
    be small by luck, so a call that breaks the rule is drawn again with other numbers, and the rule is applied to
    all of these answers together: a kernel that is wrong still is.
    """
    answers, judge = (_gradients, assert_gradients_right) if call.backward else (_answer, assert_right)
    first = answers(path, call, 0)
    if first is None:
        return False
    try:
        judge(first)
    except AssertionError:
        judge(first, *(answers(path, call, 1 + number) for number in range(_REDRAWS)))
    return True


# ---- Many calls -----------------------------------------------------------------------------------------------


def _is_fatal(error):
    """After these every CUDA call fails, so shrinking would end at an innocent call."""
    return "CUDA error" in str(error) or "out of memory" in str(error)


def fuzz(options, seed, seconds=None, on_call=lambda tally: None):
    """Draws calls and checks each on every path, until one fails or the number or the time is used up."""
    tally, started = Tally(), time.monotonic()
    deadline = None if seconds is None else started + seconds
    specs = [_dispatch.PATHS[path] for path in options.paths]
    served = None if "cpu" in options.paths else frozenset().union(*(spec.features for spec in specs))
    if IS_EMULATED:
        os.environ["FLASH_ATTN_EMULATOR_SEED"] = str(seed)
        launched_keys()

    @hypothesis.seed(seed)
    @settings(
        max_examples=options.num_calls,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
    )
    @given(calls(served, options.sizes, options.kinds))
    def check_one(call):
        nonlocal deadline
        if deadline is not None and time.monotonic() > deadline:
            raise Stop
        on_call(tally)
        tally.calls += tally.failure is None
        for path in options.paths:
            tally.running = path, call, time.monotonic()
            try:
                is_served = check(path, call)
            except Exception as error:
                if tally.failure is None:
                    deadline = time.monotonic() + _SECONDS_TO_SHRINK
                if tally.failure is None or not _is_fatal(error):
                    tally.failure = Failure(path, call, f"{type(error).__name__}: {error}", seed)
                if _is_fatal(error):
                    raise Stop from error
                raise
            if is_served and tally.failure is None:
                tally.served += 1
                tally.counts.update(traits(call))
                tally.kernels.update(launched_keys() if IS_EMULATED else ())

    try:
        check_one()
    except Stop:
        pass
    except Exception:
        if tally.failure is None:
            raise
    tally.running = None
    tally.seconds = time.monotonic() - started
    return tally


# ---- Many seeds -----------------------------------------------------------------------------------------------


class Log:
    """A file with a line for each seed that was run, so that a run that was stopped continues after the last one."""

    def __init__(self, path, options):
        self._path = None if path is None else Path(path)
        # As the lines have it: JSON has no tuples.
        self._options = json.loads(json.dumps(asdict(options) | {"smem_kb": IS_EMULATED and SMEM_BYTES // 1024}))

    def done(self):
        """{seed: Tally} of what was run with these options before, and did not fail."""
        lines = self._path.read_text().splitlines() if self._path is not None and self._path.exists() else ()
        entries = [entry for entry in map(json.loads, lines) if entry["options"] == self._options]
        return {entry["seed"]: _tally_of(entry) for entry in entries if entry["failure"] is None}

    def add(self, seed, tally):
        if self._path is None:
            return
        entry = {"options": self._options, "seed": seed, "calls": tally.calls, "served": tally.served}
        entry |= {"seconds": round(tally.seconds), "counts": tally.counts, "kernels": [*tally.kernels.items()]}
        entry["failure"] = None if tally.failure is None else describe(tally.failure)
        with self._path.open("a") as file:
            print(json.dumps(entry), file=file)


def _tally_of(entry):
    tally = Tally(entry["calls"], entry["served"], seconds=entry["seconds"])
    tally.counts.update(entry["counts"])
    for key, count in entry["kernels"]:
        tally.kernels[key if isinstance(key, str) else (key[0], tuple(key[1]))] += count
    return tally


def _total(tallies):
    total = Tally()
    for tally in tallies:
        total.calls, total.served = total.calls + tally.calls, total.served + tally.served
        total.seconds += tally.seconds
        total.counts.update(tally.counts)
        total.kernels.update(tally.kernels)
    return total


def _watch(tally_of):
    """Ends the process with a reproducer when a call hangs, where Python can't interrupt it."""
    while True:
        time.sleep(1.0)
        running = tally_of().running if tally_of() is not None else None
        if running is not None and time.monotonic() - running[2] > _SECONDS_OF_A_HANG:
            print(f"HANGS: over {_SECONDS_OF_A_HANG} s\n\n{reproducer(*running[:2])}", flush=True)
            os._exit(3)


def _paths_here():
    found = [path for path in GPU_PATHS if can_run(path)]
    return found if IS_EMULATED else [*found, "cpu"]


def _list_of(values):
    """Parses some of the values, separated by commas."""
    kind = type(values[0])

    def parse(text):
        found = tuple(map(kind, text.split(",")))
        if not {*found} <= {*values}:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(map(str, values))}, got {text!r}")
        return found

    return parse


def _seeds(text):
    """ "3", or "0-39"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="fuzz.py", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="how many calls to draw for each seed (%(default)s)")
    parser.add_argument("--seed", type=_seeds, default="0", help="or first-last; equal ones draw equal calls (0)")
    parser.add_argument(
        "--path", choices=[*GPU_PATHS, "cpu"], help="the only path to check; else all that can run here"
    )
    parser.add_argument("--kinds", type=_list_of(KINDS), default=KINDS, help=f"of {','.join(KINDS)}")
    parser.add_argument("--head-dims", type=_list_of(HEAD_DIMS), default=(), help="only these buckets of head dims")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--log", help="a file for each seed's counts; those that it has for equal options don't run")
    return parser.parse_args(arguments)


def _command(arguments, seed):
    parts = [f"--calls {arguments.calls} --seed {seed}"]
    parts += [f"--path {arguments.path}"] if arguments.path else []
    for name, values, default in (("kinds", arguments.kinds, KINDS), ("head-dims", arguments.head_dims, ())):
        parts += [f"--{name} {','.join(map(str, values))}"] if values != default else []
    return f"python tests/fuzz.py {' '.join(parts)}"


def main(arguments=None):
    arguments = _parse(arguments)
    torch.set_num_threads(1)  # as in conftest.py
    paths = (arguments.path,) if arguments.path else tuple(_paths_here())
    options = Options(paths, arguments.calls, arguments.kinds, arguments.head_dims)
    log = Log(arguments.log, options)
    tallies = {seed: tally for seed, tally in log.done().items() if seed in arguments.seed}
    started = last_line = time.monotonic()
    current = None

    def show(tally):
        nonlocal last_line, current
        current = tally
        if time.monotonic() - last_line > _SECONDS_PER_LINE:
            last_line = time.monotonic()
            state = "" if tally.failure is None else ", failed; looking for a simpler call"
            print(f"{tally.calls} of {options.num_calls} calls, {last_line - started:.0f} s{state}", flush=True)

    threading.Thread(target=_watch, args=(lambda: current,), daemon=True).start()
    for seed in arguments.seed:
        if seed in tallies:
            continue
        left = None if arguments.seconds is None else arguments.seconds - (time.monotonic() - started)
        if left is not None and left <= 0:
            break
        print(f"seed {seed} on {', '.join(paths)}", flush=True)
        tallies[seed] = tally = fuzz(options, seed, left, show)
        print(f"again: {_command(arguments, seed)}", flush=True)
        if tally.failure is not None:
            print(describe(tally.failure), flush=True)
        if tally.failure is not None or left is None or tally.seconds < left:  # a seed that was cut short runs again
            log.add(seed, tally)
    total = _total(tallies.values())
    print("\n".join(summary(total)))
    print(f"{total.calls} calls in {total.seconds:.0f} s, {total.served} answers compared, {len(tallies)} seeds")
    failed = [seed for seed, tally in tallies.items() if tally.failure is not None]
    print(f"failed: seeds {', '.join(map(str, failed))}" if failed else "none failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
