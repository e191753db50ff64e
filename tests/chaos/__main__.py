"""Disturb runs on purpose, and say what came of it.

    python -m tests.chaos --faults 100 --seed 0
    python -m tests.chaos --faults 4 --only "zombie driver" --kinds people command

Exit 0 when every run ended with the same answer as the undisturbed one.
"""

from __future__ import annotations

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ.pop("RAY_ADDRESS", None)
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import itertools
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.campaign import FAULTS, KINDS, Lab, Strike, deck, disturb, undisturbed

PER_RUN = 5


def table(strikes: list[Strike]) -> str:
    """One line for each kind of fault."""
    lines = [
        "| fault | injected | recovered | blocks in hand, redone | committed blocks rewritten | seconds to the next commit |",
        "|---|---|---|---|---|---|",
    ]
    for fault in [*FAULTS, *({strike.fault for strike in strikes} - FAULTS.keys())]:
        mine = [strike for strike in strikes if strike.fault == fault]
        if mine:
            seconds = statistics.median(strike.seconds for strike in mine)
            lines.append(
                f"| {fault} | {len(mine)} | {sum(s.recovered for s in mine)} | {sum(s.in_hand for s in mine)} | "
                f"{sum(s.rewritten for s in mine)} | {seconds:.1f} |"
            )
    seconds = statistics.median(strike.seconds for strike in strikes)
    lines.append(
        f"| all | {len(strikes)} | {sum(s.recovered for s in strikes)} | {sum(s.in_hand for s in strikes)} | "
        f"{sum(s.rewritten for s in strikes)} | {seconds:.1f} |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="these faults", metavar="FAULT")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of runs", metavar="KIND")
    parser.add_argument("--per-run", type=int, default=PER_RUN, help="faults of a run, at most 5")
    parser.add_argument("--out", type=Path, help="JSON, one record for each strike")
    arguments = parser.parse_args()

    kinds = [KINDS[name] for name in arguments.kinds]
    faults = [name for name in arguments.only if any(FAULTS[name].fits(kind) for kind in kinds)]
    rng = random.Random(arguments.seed)
    waiting = deck(rng, arguments.faults, faults)
    strikes: list[Strike] = []
    began = time.monotonic()
    number, turns = 0, itertools.cycle(kinds)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Lab(Path(folder), arguments.samples) as lab:
        answers: dict[str, tuple[dict[str, object], float]] = {}
        while len(strikes) < arguments.faults:
            kind = next(turns)
            fitting = [fault for fault in waiting if FAULTS[fault].fits(kind)]
            hand = fitting[: min(arguments.per_run, arguments.faults - len(strikes))]
            if not hand and waiting:  # another kind of run can have what is left
                continue
            hand = hand or [rng.choice([fault for fault in faults if FAULTS[fault].fits(kind)])]
            for fault in hand:
                if fault in waiting:
                    waiting.remove(fault)
            if kind.name not in answers:
                answers[kind.name] = undisturbed(lab, kind)
            try:
                done = disturb(lab, number, hand, kind, answers[kind.name][0], arguments.seed)
            except Exception:
                traceback.print_exc()
                done = [Strike(number, "; ".join(hand), "?", note="the run did not end")]
                hand = []
            missed = list(hand)
            for strike in done if hand else ():
                missed.remove(strike.fault)
            waiting += missed  # found nothing to strike: they come again
            strikes += done
            number += 1
            for strike in done:
                print(
                    f"run {number} ({kind.name}): {strike.fault} at {strike.at}: {'recovered' if strike.recovered else 'LOST'} "
                    f"({strike.seconds:.1f} s) {strike.note}",
                    file=sys.stderr,
                    flush=True,
                )
            if arguments.out:
                arguments.out.write_text(json.dumps([strike.record() for strike in strikes], indent=1))
    alone = ", ".join(f"{name} {seconds:.0f} s" for name, (_, seconds) in answers.items())
    print(
        f"seed {arguments.seed}, {arguments.samples} images, {number} runs on {platform.processor() or 'this machine'}, "
        f"{time.monotonic() - began:.0f} s in all; undisturbed runs: {alone}\n"
    )
    print(table(strikes))
    lost = [strike for strike in strikes if not strike.recovered or strike.rewritten]
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
