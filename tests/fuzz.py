"""Draws whole calls, forward, backward and with a cache, and compares every answer with the float64 oracle:
`python tests/fuzz.py --help`.
"""

import argparse
import os
import sys
import threading
import time
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace

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
from emulation import IS_EMULATED, can_run
from harness import GPU_PATHS, build, device_of
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from memory import allocate, gaps, place
from strategies import EDGES, EMULATED, Call, calls

import flash_attn
from flash_attn import _dispatch

_REDRAWS = 7  # of a call that breaks the tolerance rule
_LOOSE = 77  # what a loose max_seqlen is too large by
_SECONDS_TO_SHRINK = 60
_SECONDS_OF_A_HANG = 1800 if IS_EMULATED else 120
_SECONDS_PER_LINE = 5.0
_BUCKETS = (32, 64, 96, 128, 192, 256, 512)


class Stop(BaseException):
    """Ends a run. Hypothesis would take an Exception for a failing call."""


@dataclass(frozen=True)
class Failure:
    path: str
    call: Call
    error: str


@dataclass
class Tally:
    """What a run did."""

    calls: int = 0  # each on every path
    served: int = 0  # answers that were compared
    counts: Counter = field(default_factory=Counter)  # of the served calls, per feature
    running: tuple | None = None  # (path, call, when it started)
    failure: Failure | None = None


# ---- One call -------------------------------------------------------------------------------------------------


def _inputs(path, call, number):
    """The call's inputs with their `number`th set of random numbers, laid out as it says, and its options."""
    case = replace(call.case, id=f"{call.case!r} {number}")
    inputs = build(case, device_of(path), garbage=call.garbage)
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


def _bucket(dims):
    return next(f"head_dim to {bucket}" for bucket in _BUCKETS if max(dims) <= bucket)


def _traits(call):
    case = call.case
    strided = [name for name in "qkv" if getattr(call, name) is not None]
    found = [*call.features, case.layout, _bucket(case.dims), str(case.dtype)]
    found += ["unequal head dims"] * (case.dims[0] != case.dims[1]) + ["odd strides"] * bool(strided)
    found += ["strided out"] * (call.out is not None) + ["strided dout"] * (call.dout is not None)
    found += [f"K and V share: {call.shared_kv}"] * (call.shared_kv is not None)
    found += [f"metadata: {call.metadata}"] * (call.metadata is not None)
    found += ["deterministic"] * call.deterministic + ["scale <= 0"] * (case.scale is not None and case.scale <= 0)
    return {*found}


def _is_fatal(error):
    """After these every CUDA call fails, so shrinking would end at an innocent call."""
    return "CUDA error" in str(error) or "out of memory" in str(error)


def fuzz(paths, num_calls, seed, seconds=None, on_call=lambda tally: None):
    """Draws calls and checks each on every path, until one fails or the number or the time is used up."""
    tally = Tally()
    deadline = None if seconds is None else time.monotonic() + seconds
    served = None if "cpu" in paths else frozenset().union(*(_dispatch.PATHS[path].features for path in paths))

    @hypothesis.seed(seed)
    @settings(
        max_examples=num_calls,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        verbosity=Verbosity.quiet,
    )
    @given(calls(served, EMULATED if IS_EMULATED else EDGES))
    def check_one(call):
        nonlocal deadline
        if deadline is not None and time.monotonic() > deadline:
            raise Stop
        on_call(tally)
        tally.calls += tally.failure is None
        for path in paths:
            tally.running = path, call, time.monotonic()
            try:
                is_served = check(path, call)
            except Exception as error:
                if tally.failure is None:
                    deadline = time.monotonic() + _SECONDS_TO_SHRINK
                if tally.failure is None or not _is_fatal(error):
                    tally.failure = Failure(path, call, f"{type(error).__name__}: {error}")
                if _is_fatal(error):
                    raise Stop from error
                raise
            if is_served and tally.failure is None:
                tally.served += 1
                tally.counts.update(_traits(call))

    try:
        check_one()
    except Stop:
        pass
    except Exception:
        if tally.failure is None:
            raise
    tally.running = None
    return tally


# ---- Reports --------------------------------------------------------------------------------------------------


def source_of(value):
    """Python that makes the value; fields that have their defaults are left out."""
    if is_dataclass(value):
        given = [(f.name, getattr(value, f.name)) for f in fields(value)]
        defaults = {f.name: f.default for f in fields(value) if f.default is not MISSING}
        changed = [(n, x) for n, x in given if n not in defaults or not (x is defaults[n] or x == defaults[n])]
        parts = [f"{name}={source_of(x)}" for name, x in changed]
        return f"{type(value).__name__}({', '.join(parts)})"
    return repr(value)


def reproducer(path, call):
    """A script that repeats one call."""
    return (
        "cd tests && python - <<'END'\n"
        "import torch; from math import inf, nan; from cases import Case; from memory import Memory\n"
        "from strategies import Call; from fuzz import check\n"
        f"print(check({path!r}, {source_of(call)}))\n"
        "END"
    )


def describe(failure):
    return f"FAILED on {failure.path}: {failure.error}\n\n{reproducer(failure.path, failure.call)}"


def _watch(tally_of):
    """Ends the process with a reproducer when a call hangs, where Python can't interrupt it."""
    while True:
        time.sleep(1.0)
        running = tally_of().running if tally_of() is not None else None
        if running is not None and time.monotonic() - running[2] > _SECONDS_OF_A_HANG:
            print(f"HANGS: over {_SECONDS_OF_A_HANG} s\n\n{reproducer(*running[:2])}", flush=True)
            os._exit(3)


def _paths_here():
    found = [path for path in GPU_PATHS if _dispatch.PATHS[path].features and can_run(path)]
    return found if IS_EMULATED else [*found, "cpu"]


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="fuzz.py", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000, help="how many calls to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal calls (%(default)s)")
    parser.add_argument(
        "--path", choices=[*GPU_PATHS, "cpu"], help="the only path to check; else all that can run here"
    )
    parser.add_argument("--seconds", type=float, help="stop after this time")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = _parse(arguments)
    torch.set_num_threads(1)  # as in conftest.py
    paths = [options.path] if options.path else _paths_here()
    started = time.monotonic()
    last_line = started
    current = None

    def show(tally):
        nonlocal last_line, current
        current = tally
        if time.monotonic() - last_line > _SECONDS_PER_LINE:
            last_line = time.monotonic()
            state = "" if tally.failure is None else ", failed; looking for a simpler call"
            print(f"{tally.calls} of {options.calls} calls, {last_line - started:.0f} s{state}", flush=True)

    threading.Thread(target=_watch, args=(lambda: current,), daemon=True).start()
    print(f"seed {options.seed} on {', '.join(paths)}", flush=True)
    tally = fuzz(paths, options.calls, options.seed, options.seconds, show)
    for name, count in sorted(tally.counts.items()):
        print(f"{count:8d}  {name}")
    seconds = time.monotonic() - started
    print(f"{tally.calls} calls in {seconds:.0f} s, {tally.served} answers compared, seed {options.seed}")
    path = f" --path {options.path}" if options.path else ""
    print(f"again: python tests/fuzz.py --calls {options.calls} --seed {options.seed}{path}")
    if tally.failure is not None:
        print(describe(tally.failure))
    return 0 if tally.failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
