"""Time to link one long document: one pass with dynamic context against loopy belief propagation over all pairs.

    python -m benchmarks.entity_linking [--rounds 9] [--record docs/results]

Both read the same random document of T mentions with n = 8 candidates and vectors of 300 numbers; weights are random,
for the time does not depend on them. DCA's row is as long as its chunk: a longer document is cut, as the authors' code
does it at 100 mentions, so that the buffers of context are of one size. "whole" is DCA without cutting.
Measured in turns; per T the median and quartiles, and the exponent of T that fits the medians (1 is linear).
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import environment, record
from experiments.entity_linking.linking import belief, model
from experiments.entity_linking.linking.knowledge import Knowledge
from experiments.entity_linking.linking.model import Linker

LENGTHS = (50, 100, 200, 400, 800)
CHUNK = 50
ENTITIES, WORDS, DIM, INLINKS, CANDIDATES, CONTEXT = 5000, 5000, 300, 20, 8, 50


def knowledge() -> Knowledge:
    """Random vectors and in-links."""
    rng = np.random.default_rng(0)

    def table(n: int) -> Any:
        x = rng.standard_normal((n, DIM)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return Knowledge(
        titles=("", *(f"e{i}" for i in range(1, ENTITIES))),
        words=("", *(f"w{i}" for i in range(1, WORDS))),
        entities=table(ENTITIES),
        word_vectors=table(WORDS),
        types=np.zeros(ENTITIES, np.int32),
        inlinks=rng.integers(1, WORDS, (ENTITIES, INLINKS)).astype(np.int32),
        descriptions=np.zeros((ENTITIES, 1), np.int32),
    )


def document(length: int, slots: int) -> dict[str, Any]:
    """A document of `length` mentions in rows of `slots`, each row a chunk with a context of its own."""
    rng = np.random.default_rng(length)
    rows = math.ceil(length / slots)
    shape = (rows, slots)
    used = np.arange(rows * slots).reshape(shape) < length
    return {
        "document": jnp.asarray(np.where(used, 0, -1).astype(np.int32)),
        "candidates": jnp.asarray(rng.integers(1, ENTITIES, (*shape, CANDIDATES)).astype(np.int32)),
        "mask": jnp.broadcast_to(jnp.asarray(used)[..., None], (*shape, CANDIDATES)),
        "log_prior": jnp.asarray(np.log(rng.dirichlet(np.ones(CANDIDATES), shape)).astype(np.float32)),
        "mention_type": jnp.zeros(shape, jnp.int32),
        "context": jnp.asarray(rng.integers(1, WORDS, (*shape, CONTEXT)).astype(np.int32)),
    }


def systems(length: int) -> dict[str, Callable[[], Any]]:
    """Name -> one linking of the document, ready to be timed."""
    known = knowledge()
    facts, dca = model.facts_of(known), Linker()
    pairs = dataclasses.replace(dca, features=("belief", "prior", "types"))
    out: dict[str, Callable[[], Any]] = {}
    for name, linker, slots in (("dca", dca, CHUNK), ("dca_whole", dca, length), ("belief", pairs, length)):
        params, batch = model.init(linker, known, jax.random.key(0)), document(length, slots)
        if name == "belief":
            run = jax.jit(lambda p, b, k=linker: belief.global_scores(k, p, facts, b))
        else:
            # a chunk after the other, as a stream of mentions comes: nothing is gained by a batch of chunks
            one = jax.jit(lambda p, b, k=linker: model.rollout(k, p, facts, b).choice)

            def run(p: Any, b: Any, one: Any = one) -> Any:
                return [one(p, {k: x[i : i + 1] for k, x in b.items()}) for i in range(len(b["document"]))]

        out[name] = lambda run=run, p=params, b=batch: jax.block_until_ready(run(p, b))
    return out


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """By length: milliseconds of each system with quartiles, and belief over DCA."""
    rows: dict[str, dict[str, Any]] = {}
    medians: dict[str, list[float]] = {}
    for length in LENGTHS:
        steps = systems(length)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_:
                    times[name].append(1e3 * (time.perf_counter() - start))
        row: dict[str, Any] = {"mentions": length}
        for name, ms in times.items():
            row[f"{name}_ms"] = spread(ms)
            medians.setdefault(name, []).append(statistics.median(ms))
        row["belief_over_dca"] = spread([b / d for b, d in zip(times["belief"], times["dca"], strict=True)])
        rows[f"{length}_mentions"] = row
        print(length, {name: round(statistics.median(ms), 2) for name, ms in times.items()}, flush=True)
    x = np.log(LENGTHS)
    for row in rows.values():
        row["exponents"] = {name: float(np.polyfit(x, np.log(ms), 1)[0]) for name, ms in medians.items()}
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, at least 2 (default 9)")
    parser.add_argument("--record", type=Path, help="folder for a summary of every length")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds}: needs at least 2")
    about = environment()
    rows = measure(args.rounds)
    print(rows[f"{LENGTHS[0]}_mentions"]["exponents"])
    if args.record:
        record(args.record, "entity_linking_time", rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
