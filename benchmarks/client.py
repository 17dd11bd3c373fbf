"""How much of a server's capacity the client finds by itself, as a ratio of the best fixed number of requests at once.

    python benchmarks/client.py --rounds 3

A server on loopback in a process of its own works on `slots` requests at once for `latency` seconds each; beyond that it
queues, or refuses with 429 (with and without Retry-After). For each of these the same requests are asked with a sweep of
fixed numbers and adaptively, the ramp from the start included. Prints answers a second; nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "evaluate"))

from hostile_server import Remote, hostile_server

from mixmerge.evaluate.client import Client, Limits

STYLES = {
    "queues": {"style": "queue"},
    "refuses": {"style": "refuse"},
    "refuses, Retry-After 1": {"style": "refuse", "retry_after": 1},
}
SETTINGS = {4: 0.05, 48: 0.3}  # slots: seconds of work for one request


def rate(server: Remote, plan: dict[str, object], requests: int, fixed: int | None) -> tuple[float, int, int]:
    """Answers a second over one call from a cold start; the concurrency at the end; the requests that were refused."""
    server.plan(**plan)
    bodies = [{"model": "m", "messages": [{"role": "user", "content": f"{n}"}]} for n in range(requests)]
    limits = Limits(concurrency=fixed, backoff_s=0.1)
    with (
        tempfile.TemporaryDirectory() as folder,
        Client([server.url], answers=Path(folder) / "a", limits=limits) as client,
    ):
        began = time.perf_counter()
        client.ask(bodies)
        seconds = time.perf_counter() - began
        (found,) = client.stats()["concurrency"].values()
    return requests / seconds, found, server.counts()["refused"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=int, default=60, help="requests for each slot of the server")
    parser.add_argument("--slots", type=int, nargs="+", default=list(SETTINGS))
    arguments = parser.parse_args()
    rounds = arguments.rounds
    with hostile_server() as server:
        for slots in arguments.slots:
            latency = SETTINGS.get(slots, 0.1)
            for style, plan in STYLES.items():
                settings = {"slots": slots, "latency_s": latency, **plan}
                count = slots * arguments.work
                fixed = sorted({max(1, slots // 2), slots, slots * 5 // 4, 2 * slots})
                at = max(fixed, key=lambda number: rate(server, settings, count, number)[0])
                # in turn, so that another load on the machine meets both
                pairs = [
                    (rate(server, settings, count, at), rate(server, settings, count, None)) for _ in range(rounds)
                ]
                best = (statistics.median(pair[0][0] for pair in pairs), at)
                runs = [pair[1] for pair in pairs]
                mine = statistics.median(run[0] for run in runs)
                print(
                    f"{slots:3} slots, {style:22}: adaptive {mine:6.1f}/s (at {[run[1] for run in runs]}, refused "
                    f"{[run[2] for run in runs]}), best fixed {best[0]:6.1f}/s (at {best[1]}), of {slots / latency:.0f}/s; "
                    f"ratio {mine / best[0]:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
