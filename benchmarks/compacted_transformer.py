"""A decoder before and after compaction: bytes of its weights and time of a forward pass, by what was removed.

    python -m benchmarks.compacted_transformer [--d=256] [--heads=8] [--hidden=1024] [--layers=4] [--tokens=64]
        [--rounds=30] [--scan]

Random weights; half of the heads, of the SwiGLU's width, of the residual stream (embeddings with it), of the heads'
dimensions, and half of all of these are pruned by the rules that `coupled_rules` makes, and the network is compacted.
Dense and compact networks take turns in one process, and the least processor time of a forward pass counts for each:
another process lengthens elapsed time much more. Prints a table.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import environment
from compressx import compaction, harden


class Layer(nn.Module):
    """Attention and SwiGLU behind RMS norms, added to what they read."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        d = x.shape[-1]
        y = nn.MultiHeadDotProductAttention(self.heads, use_bias=False, name="attention")(nn.RMSNorm(name="norm1")(x))
        x = x + y
        y = nn.RMSNorm(name="norm2")(x)
        dense = lambda n, name: nn.Dense(n, use_bias=False, name=name)
        gated = nn.silu(dense(self.hidden, "gate")(y)) * dense(self.hidden, "up")(y)
        return x + dense(d, "down")(gated), None


class Decoder(nn.Module):
    """Token embeddings, layers one by one or stacked under a scan, and a head."""

    d: int
    heads: int
    hidden: int
    layers: int
    scanned: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(1024, self.d, name="embed")(tokens)
        if self.scanned:
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(self.heads, self.hidden, name="layers")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Layer(self.heads, self.hidden, name=f"layer{i}")(x)
        return nn.Dense(1024, use_bias=False, name="head")(nn.RMSNorm(name="norm")(x))


def cases(found: Sequence[compaction.Group]) -> dict[str, dict[int, float]]:
    """What is pruned, by name: half of the units of which groups."""

    def at(*ends: str) -> dict[int, float]:
        """The groups of which a unit lies on one of these axes of a leaf, counted from its end."""
        held = {}
        for number, group in enumerate(found):
            names = {f"{s.path.rsplit('/', 2)[-2]}[{s.axis - rank(s.path)}]" for s in group.slots}
            if names & set(ends):
                held[number] = 0.5
        return held

    widest: dict[str, int] = {}
    for group in found:
        for s in group.slots:
            widest[s.path] = max(widest.get(s.path, 0), s.axis)

    def rank(path: str) -> int:
        return widest[path] + 1

    return {
        "heads": at("query[-2]"),
        "SwiGLU width": at("up[-1]"),
        "head dimensions": at("query[-1]", "value[-1]"),
        "residual width": at("embed[-1]"),
        "all": dict.fromkeys(range(len(found)), 0.5),
    }


def least(functions: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The least processor time of each function in seconds; they take turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds + 1):  # the first one compiles
        for i, f in enumerate(functions):
            start = time.process_time()
            jax.block_until_ready(f())
            best[i] = min(best[i], time.process_time() - start)
    return best


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    numbers = {"d": 256, "heads": 8, "hidden": 1024, "layers": 4, "tokens": 64, "rounds": 30}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--scan", action="store_true", help="the layers stacked, under nn.scan")
    o = parser.parse_args()
    model = Decoder(o.d, o.heads, o.hidden, o.layers, o.scan)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 1024, (1, o.tokens)), jnp.int32)
    v = jax.jit(model.init)(jax.random.key(0), tokens)
    found = compaction.groups(compaction.channels(model, v, tokens))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    dense = jax.jit(model.apply)
    about = environment()
    print(f"{about['processor']}, {about['cores']} cores, load {about['load']}, jax {about['versions']['jax']}")
    print("| half removed of | bytes before | after | ms before | after | times as fast | largest difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, density in cases(found).items():
        hard = harden(v, compaction.coupled_rules(found, density, vectors=True), fresh=True).params
        small = compaction.compact(model, hard, tokens)
        apply = jax.jit(small.apply)
        before, after = least((partial(dense, hard, tokens), partial(apply, small.variables, tokens)), o.rounds)
        off = float(jnp.abs(dense(hard, tokens) - apply(small.variables, tokens)).max())
        times = f"{1e3 * before:.1f} | {1e3 * after:.1f} | {before / after:.2f}"
        print(f"| {name} | {size(hard):,} | {size(small.variables):,} | {times} | {off:.1e} |", flush=True)


if __name__ == "__main__":
    main()
