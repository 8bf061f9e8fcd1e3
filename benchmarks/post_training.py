"""Whole networks compressed after training: projection beside reconstruction, ResNet-20 and ResNet-56 on CIFAR-10.

    python -m benchmarks.post_training [--examples=512] [--only=unstructured_90,...] [--results=docs/results]
    python -m benchmarks.post_training --choose [--results=docs/results]     variants, on training images alone

The networks are the published checkpoints, the images the CIFAR-10 subset, of which the calibration examples are drawn
from the training split. Constrained are all convolutions but the first. `--choose` compares variants of the method on
training images that the calibration does not use; the other rows read the test images once, at the end of a row.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import environment, record
from benchmarks.training import table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the checkpoints
CONVOLUTIONS = r"params/layer.*/conv\d/kernel"
HELD_OUT = 2000  # training images on which variants are chosen
VARIANTS = ("block_match", "block_estimate", "dense_match", "own_match")  # target and statistics


def cases() -> dict[str, tuple[str, Any]]:
    """Pattern of the leaves and constraint, by name."""
    import compressx as cx

    sets = {
        "unstructured_70": cx.unstructured(0.3),
        "unstructured_80": cx.unstructured(0.2),
        "unstructured_90": cx.unstructured(0.1),
        "n_of_m_2_4": cx.n_of_m(2, 4),
        "patterns_8": cx.pattern(k=8),
        "patterns_8_connectivity_3.6": cx.pattern_connectivity(1 / 3.6, k=8),
        "blocks_4x4_50": cx.block((4, 4), 0.5),
        "positions_50": cx.columns(0.5),
        "polarize_8": cx.polarize(8),
        "unify_4x1": cx.unify((4, 1), 1.0),
        "bits_3": cx.quantize(3, zero_level=True),
        "bits_2": cx.quantize(2, zero_level=True),
        "unstructured_50_bits_4": cx.unstructured(0.5) & cx.quantize(4, per="channel"),
        "crossbar_aware_50": cx.crossbar_aware(column_density=0.5, rows=32, cols=64),
    }
    return {name: (CONVOLUTIONS, one) for name, one in sets.items()} | {
        "channels_75": (r"params/layer.*/conv2/kernel", cx.channels(0.75)),
    }


class Task:
    """A checkpoint, and the images by what they are for."""

    def __init__(self, depth: int, seed: int, examples: int) -> None:
        import jax
        import jax.numpy as jnp

        from experiments.common import data
        from experiments.common.data.augment import normalise
        from experiments.common.data.source import find_file
        from experiments.common.models import convert

        self.model, self.dense = convert.load_cifar_resnet(find_file(f"checkpoints/resnet{depth}_cifar10.npz"))
        self.apply = jax.jit(self.model.apply)
        self.prepared = lambda x: normalise(jnp.asarray(x), MEAN, STD)
        self.load = lambda split: data.load("cifar10_subset", split)
        train = self.load("train")
        order = np.random.default_rng(seed).permutation(len(train) - HELD_OUT)
        images = np.asarray(train.inputs)[order[:examples]]
        self.batches = [self.prepared(images[k : k + 128]) for k in range(0, examples, 128)]
        self.held_out = train.take(slice(len(train) - HELD_OUT, None))

    def logits(self, variables: Any, images: Any) -> np.ndarray:
        parts = [images[k : k + 500] for k in range(0, len(images), 500)]
        return np.concatenate([np.asarray(self.apply(variables, self.prepared(part))) for part in parts])

    def measure(self, split: Any, variables: dict[str, Any]) -> dict[str, Any]:
        """Accuracy in per cent of each network, and its agreement with the dense one."""
        images, labels = np.asarray(split.inputs), np.asarray(split.labels)
        dense = self.logits(self.dense, images).argmax(-1)
        found: dict[str, Any] = {"dense": 100 * float((dense == labels).mean())}
        for name, each in variables.items():
            answers = self.logits(each, images).argmax(-1)
            found[name] = 100 * float((answers == labels).mean())
            found[f"{name}_agreement"] = 100 * float((answers == dense).mean())
        return found


def flipped(key: Any, x: Any) -> Any:
    """Every second image mirrored, at random."""
    import jax
    import jax.numpy as jnp

    chosen = jax.random.bernoulli(key, shape=(x.shape[0], 1, 1, 1))
    return jnp.where(chosen, x[:, :, ::-1], x)


def row(depth: int, name: str, seed: int, examples: int, steps: int = 0) -> dict[str, Any]:
    """One case: accuracy of bare projection, of projection with matched statistics, and of the reconstruction.

    With `steps` also after so many steps of distillation on the calibration images and their mirror images.
    """
    import compressx as cx
    from compressx.reconstruction import distill, match_statistics

    task = Task(depth, seed, examples)
    rules = [cases()[name]]
    projected = cx.harden(task.dense, rules, fresh=True).params
    matched = match_statistics(task.model, task.dense, projected, task.batches)
    started, worked = time.perf_counter(), time.process_time()
    hard, report = cx.reconstruct(task.model, task.dense, rules, task.batches)
    seconds, processor = time.perf_counter() - started, time.process_time() - worked
    networks = {"projection": projected, "projection_matched": matched, "reconstructed": hard.params}
    about: dict[str, Any] = {}
    if steps:
        started = time.perf_counter()
        trained, found = distill(task.model, task.dense, hard, rules, task.batches, steps=steps, augment=flipped)
        networks["distilled"] = trained.params
        about = {"steps": steps, "distill_seconds": time.perf_counter() - started, "divergence": list(found[:2])}
    return {
        "case": f"resnet{depth}_{name}" + (f"_seed{seed}" if seed else "") + ("_distilled" if steps else ""),
        **about,
        "network": f"ResNet-{depth}",
        "set": str(rules[0][1]),
        "seed": seed,
        "examples": examples,
        **task.measure(task.load("test"), networks),
        "layer_error": float(np.mean([layer.error for layer in report.layers])),
        "kept": {k: sum(layer.kept == k for layer in report.layers) for k in {x.kept for x in report.layers}},
        "seconds": seconds,
        "processor_seconds": processor,
    }


def choose(name: str, seed: int, examples: int, variants: Sequence[str]) -> Any:
    """Variants of the method on training images that calibrate nothing: the choice behind the defaults."""
    import compressx as cx

    task = Task(20, seed, examples)
    for target, norms in (variant.split("_") for variant in variants):
        hard, report = cx.reconstruct(task.model, task.dense, [cases()[name]], task.batches, target=target, norms=norms)
        found = task.measure(task.held_out, {"reconstructed": hard.params})
        error = float(np.mean([layer.error for layer in report.layers]))
        about = {
            "case": f"choice_{name}_{target}_{norms}",
            "target": target,
            "norms": norms,
            "split": "train, held out",
        }
        yield about | {"examples": examples, "seed": seed, **found, "layer_error": error}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20, choices=(20, 32, 56), help="of the ResNet (default 20)")
    parser.add_argument("--examples", type=int, default=512, help="calibration images (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of their choice (default 0)")
    parser.add_argument("--only", default="", help="comma-separated cases; all where left out")
    parser.add_argument("--distill", type=int, default=0, help="steps of distillation behind it (default none)")
    parser.add_argument("--choose", action="store_true", help="compare variants on training images instead")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of them, comma-separated")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args(arguments)
    known = list(cases())
    chosen = args.only.split(",") if args.only else known
    variants = args.variants.split(",")
    if odd := [name for name in variants if name not in VARIANTS]:
        parser.error(f"--variants: no variant {', '.join(odd)}; there are {', '.join(VARIANTS)}")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only: no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    for name in chosen:
        rows = (
            choose(name, args.seed, args.examples, variants)
            if args.choose
            else [row(args.depth, name, args.seed, args.examples, args.distill)]
        )
        for one in rows:
            print(table([{k: v for k, v in one.items() if k not in ("set", "kept")}]), flush=True)
            if args.results:
                record(args.results, "post_training", {one.pop("case"): one}, environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
