"""How long a meta-gradient takes with `metarun.higher`, `higher` and `learn2learn`.

`python scripts/dropin_speed.py` takes the three in turn, in one process, and prints the median
time of a meta-batch and the ratio to each peer: its median, and its 10th and 90th percentile over
the rounds. OMP_NUM_THREADS sets the threads. Processor time (`--clock cpu`) says more on a machine
that others use as well.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from unittest import mock

import torch

import metarun.higher
from bench.peers import maml
from bench.problem import build, config_of

PIXELS = ("data=pixels", "data.channels=1", "data.side=28", "data.classes=4400")
SINUSOID = ("data=sinusoid", "backbone=mlp")
CASES = {
    "sinusoid, MLP 40-40, 25 tasks, 1 step": (*SINUSOID, "algo.inner_steps=1"),
    "sinusoid, MLP 40-40, 25 tasks, 5 steps": (*SINUSOID, "algo.inner_steps=5"),
    "28×28 pixels, conv4-64, 8 tasks, 1 step": (
        *PIXELS, "inner_opt.lr=0.4", "trainer.meta_batch=8", "algo.inner_steps=1"
    ),
}  # fmt: skip
NAMES = ("metarun.higher", "higher", "learn2learn")
WARM_UP = 2


def runner(name: str, overrides: tuple[str, ...]) -> Callable[[int], None]:
    """A function that computes the meta-gradient of meta-batch i."""
    problem = build(config_of(overrides), torch.device("cpu"))
    if name == "metarun.higher":  # the code written for `higher`, on ours
        with mock.patch.object(maml, "imported", lambda _: metarun.higher):
            meta_gradient = maml.higher(problem)
    else:
        meta_gradient = maml.PEERS[name](problem)

    def run(i: int) -> None:
        for parameter in problem.parameters.values():
            parameter.grad = None
        meta_gradient(problem.batches[i % len(problem.batches)])

    return run


def measure(
    overrides: tuple[str, ...], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each round by name, one after the other in every round."""
    runners = {name: runner(name, overrides) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for i in range(WARM_UP + rounds):
        for name, run in runners.items():
            begin = clock()
            run(i)
            seconds[name].append(clock() - begin)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    chosen = parser.parse_args()
    clock = time.perf_counter if chosen.clock == "wall" else time.process_time
    warnings.simplefilter("ignore")  # of the peers' imports
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {chosen.clock} time")
    for title, overrides in CASES.items():
        seconds = measure(overrides, chosen.rounds, clock)
        print(title, flush=True)
        for name, values in seconds.items():
            print(f"  {name:<15} {1e3 * statistics.median(values):8.2f} ms")
        for name in NAMES[1:]:
            pairs = zip(seconds[NAMES[0]], seconds[name], strict=True)
            tenths = statistics.quantiles([a / b for a, b in pairs], n=10)
            print(f"  ratio to {name:<15} {tenths[4]:.2f} ({tenths[0]:.2f} to {tenths[-1]:.2f})")


if __name__ == "__main__":
    main()
