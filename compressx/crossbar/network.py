"""A whole flax network on an engine: its layers from one traced call, its weights on the grid, its score.

layers = find_layers(model.apply, variables, image[None])            what has to be mapped
grid, scales = on_grid(variables, levels)                            weights on levels
deployed = deploy_network(grid, designs, scales, input_scales, rows) arrays, a layer each
score = make_scorer(model.apply, prepare)
correct = score(deployed, grid, images, labels)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx.constraints.levels import Levels, decode, encode
from compressx.constraints.quantization import fit
from compressx.crossbar import layers as layer_calls
from compressx.crossbar.arrays import Programmed
from compressx.crossbar.design import Design
from compressx.crossbar.layers import Deployed, deploy
from compressx.crossbar.mapping import Layer
from compressx.crossbar.mvm import saturation
from compressx.crossbar.noise import Variation, perturb
from compressx.crossbar.products import dynamic_products, traced
from compressx.crossbar.recurrent import is_recurrent, path_of, plain
from compressx.crossbar.sot_mram import Operands, Planes
from compressx.crossbar.zero_skip import Skipping, measure, merge
from compressx.tree import paths


def kernel(variables: Any, path: str) -> Any:
    """The weight at a module path: the kernel of a layer, or a matrix that lies there itself (`gru_0/wz`).

    Args:
      variables: of a flax model.
      path: of the module, without `params` and `kernel`.

    Returns:
      The array as it is held.

    Example:
      >>> from compressx.crossbar import network
      >>> network.kernel({"params": {"Dense_0": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}}, "Dense_0").shape
      (3, 2)
    """
    node = variables["params"]
    for part in path.split("/"):
        node = node[part]
    return node["kernel"] if isinstance(node, Mapping) else node


def find_layers(apply: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any) -> list[Layer]:
    """Every Dense and Conv layer and recurrent matrix of a flax model in the order of its calls, by module path.

    Nothing is computed: shapes alone are traced. A layer that is called several times is used as often; a matrix of a
    recurrent layer (`recurrent.Recurrent`: GRU, LSTM) as often as there are steps. Calls inside `nn.scan` or `nn.RNN`
    are traced once and count once (`mapping.recurrent_layers` takes the steps). Tables that are only looked up
    (`nn.Embed`) are no layers. Products of two activations (attention) follow as layers that are `dynamic`: they are
    counted, and no array holds them.

    Args:
      apply: `model.apply`.
      variables: concrete; zeros of the kernels are what is not kept.
      args, kwargs: of `apply` besides the variables, for one input (leading axis 1).

    Returns:
      A `Layer` for each, for `map_network`.

    Raises:
      ValueError: the input's leading axis is not 1; a weight of two or more axes belongs to no layer that was called.

    Example:
      >>> import flax.linen as nn
      >>> from compressx.crossbar import network
      >>> model = nn.Sequential([nn.Conv(4, (3, 3)), nn.Dense(2)])
      >>> conv = {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)}
      >>> dense = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
      >>> variables = {"params": {"layers_0": conv, "layers_1": dense}}
      >>> found = network.find_layers(model.apply, variables, np.zeros((1, 8, 8, 1), np.float32))
      >>> [(layer.name, layer.kept.shape, layer.uses) for layer in found]
      [('layers_0', (1, 9, 4), 64), ('layers_1', (1, 4, 2), 64)]
    """
    if (shape := np.shape(args[0]) if args else ())[:1] != (1,):
        raise ValueError(f"give one input with a leading axis of 1; it is {shape}")
    uses: dict[str, int] = {}
    groups: dict[str, int] = {}
    tables: dict[str, bool] = {}  # embeddings: whether they are only looked up

    def intercept(next_fun: Callable[..., Any], given: Any, named: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        called = context.method_name == "__call__"
        if called and is_recurrent(module):
            y, fed = module.run_with(plain, *given, **named)
            for name, x in fed.items():
                at = path_of(module, name)
                uses[at], groups[at] = uses.get(at, 0) + prod(x.shape[:-1]), 1
            return y
        y = next_fun(*given, **named)
        if called and isinstance(module, (nn.Dense, nn.Conv)):
            uses[path] = uses.get(path, 0) + prod(y.shape[:-1])
            groups[path] = module.feature_group_count if isinstance(module, nn.Conv) else 1
        if isinstance(module, nn.Embed) and context.method_name in ("__call__", "attend"):
            tables[path] = tables.get(path, True) and called
        return y

    with nn.intercept_methods(intercept):
        program, given = traced(apply, variables, *args, **kwargs)
    held = {*uses, *(f"{path}/kernel" for path in uses)}
    held |= {f"{path}/embedding" for path, looked_up in tables.items() if looked_up}
    params = variables["params"]
    lost = [p for p, w in zip(paths(params), jax.tree.leaves(params), strict=True) if w.ndim >= 2 and p not in held]
    if lost:
        raise ValueError(
            f"{', '.join(lost)}: no Dense, Conv or recurrent layer that was called holds these weights, so an engine "
            "would leave them out; build the network from such layers, or give theirs `run_with` (recurrent.Recurrent)"
        )
    layers = [_layer(path, kernel(variables, path), groups[path], n) for path, n in uses.items()]
    return layers + dynamic_products(program, given)


def _layer(path: str, weight: Any, groups: int, uses: int) -> Layer:
    kept = (np.asarray(weight) != 0).reshape(-1, groups, weight.shape[-1] // groups)
    return Layer(path, np.moveaxis(kept, 1, 0), uses)


def levels_of(design: Design | Operands) -> Levels:
    """The levels that a design stores: magnitudes of `weight_bits` with the sign elsewhere, or a sign among the bits.

    Weights may be rounded to 0: these are the levels for weights that were not trained on any.

    Args:
      design: of a crossbar, or widths of operands in SOT-MRAM.

    Returns:
      `Levels`, for `on_grid`.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> network.levels_of(crossbar.isaac()).bits, network.levels_of(crossbar.forms()).grid
      (16, 'cells')
    """
    if isinstance(design, Operands):
        return Levels(design.w_bits, "uniform", zero_level=True)
    if design.signs == "offset":
        return Levels(design.weight_bits, "uniform", zero_level=True)
    return Levels(design.weight_bits, "cells", zero_level=True, cell_bits=design.device.cell_bits)


class Grid(NamedTuple):
    """Variables with kernels on levels: `kernel = scale * integer`, exactly.

    Attributes:
      variables: as they were, but for those kernels.
      scales: step of each layer by module path: a number, or one for each of the kernel's last axis.

    Example:
      >>> from compressx.crossbar import network
      >>> grid = network.Grid({"params": {"a": {"kernel": np.array([[0.5], [-1.0]])}}}, {"a": 0.5})
      >>> (network.kernel(grid.variables, "a") / grid.scales["a"]).tolist()
      [[1.0], [-2.0]]
    """

    variables: Any
    scales: dict[str, Any]


def on_grid(variables: Any, levels: Mapping[str, Levels], scales: Mapping[str, Any] | None = None) -> Grid:
    """Every named kernel at its nearest levels; a step is chosen by least squares where `scales` gives none.

    A kernel that lies on multiples of its given step within the levels is not changed. A step is a number, or one for
    each of the kernel's last axis.

    Args:
      variables: of a flax model.
      levels: by module path, see `levels_of`.
      scales: steps that are known; None: all are chosen here.

    Returns:
      `Grid`: variables and steps.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> variables = {"params": {"a": {"kernel": np.array([[0.6], [-1.0]], np.float32)}}}
      >>> grid = network.on_grid(variables, {"a": network.levels_of(crossbar.isaac())}, {"a": 0.5})
      >>> network.kernel(grid.variables, "a").ravel().tolist()
      [0.5, -1.0]
    """
    known, found, out = dict(scales or {}), {}, variables
    for path, level in levels.items():
        w = jnp.asarray(kernel(variables, path))
        step = jnp.asarray(known[path], w.dtype) if path in known else fit(w, level)
        level = replace(level, per="channel") if step.ndim else level
        out = _with_kernel(out, path, np.asarray(decode(encode(w, step, level), step, level, w.dtype)))
        found[path] = np.asarray(step) if step.ndim else float(step)
    return Grid(out, found)


def _with_kernel(variables: Any, path: str, w: np.ndarray) -> Any:
    def put(node: Any, parts: list[str]) -> Any:
        if not parts:
            return {**node, "kernel": w} if isinstance(node, Mapping) else w
        return {**node, parts[0]: put(node[parts[0]], parts[1:])}

    return put(variables, ["params", *path.split("/")])


def deploy_network(
    grid: Grid,
    designs: Mapping[str, Design | Operands],
    input_scales: Mapping[str, float],
    rows: Mapping[str, np.ndarray] | None = None,
    groups: Mapping[str, int] | None = None,
    **options: Any,
) -> dict[str, Deployed]:
    """Every named layer on its engine: crossbars for a `Design`, bit planes for `Operands`.

    Args:
      grid: weights on levels.
      designs: by module path.
      input_scales: of `layers.calibrate`.
      rows: order of the rows where signs are polarized (`rows_of`).
      groups: `feature_group_count` where it is not 1.
      options: of `program` (path, prove).

    Returns:
      `Deployed` by module path, as `simulate`, `hardware` and the functions here take it.

    Raises:
      ValueError: see `deploy`; the message names the layer.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> grid = network.Grid({"params": {"a": {"kernel": np.array([[0.5], [-1.0]], np.float32)}}}, {"a": 0.5})
      >>> deployed = network.deploy_network(grid, {"a": crossbar.isaac()}, {"a": 1.0})
      >>> deployed["a"].groups[0].design.name, network.proven_share(deployed)
      ('ISAAC', 1.0)
    """
    out = {}
    for path, design in designs.items():
        w, step, n = kernel(grid.variables, path), grid.scales[path], (groups or {}).get(path, 1)
        if isinstance(design, Operands):
            whole = np.rint(np.asarray(w, np.float64) / step).astype(np.int32).reshape(-1, w.shape[-1])
            parts = tuple(Planes(jnp.asarray(part), design) for part in np.split(whole, n, axis=1))
            as_array = lambda v: jnp.asarray(v, jnp.float32)
            out[path] = Deployed(parts, as_array(step), as_array(input_scales[path]))
        else:
            order = (rows or {}).get(path)
            out[path] = deploy(w, step, design, input_scales[path], order, n, path, **options)
    return out


Scorer = Callable[[Any, Any, Array, Array], Array]


def make_scorer(apply: Callable[..., Any], prepare: Callable[[Array], Array] = lambda x: x) -> Scorer:
    """`score(deployed, variables, images, labels) -> correct predictions`, int32 []; jitted.

    With nothing deployed it is the plain network's. A label of -1 never counts: it fills up a last batch.

    Args:
      apply: `model.apply`, called with `train=False`.
      prepare: images as the data set holds them -> inputs of the network.

    Returns:
      A function; it compiles once for each shape of a batch.

    Example:
      >>> from compressx.crossbar import network
      >>> score = network.make_scorer(lambda variables, x, train: x @ variables["w"])
      >>> int(score({}, {"w": jnp.eye(2)}, jnp.array([[3.0, 1.0], [0.0, 2.0]]), jnp.array([0, -1])))
      1
    """

    @jax.jit
    def score(deployed: Any, variables: Any, images: Array, labels: Array) -> Array:
        with layer_calls.hardware(deployed):
            logits = apply(variables, prepare(images), train=False)
        return jnp.sum(jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels, dtype=jnp.int32)

    return score


def batches(images: np.ndarray, labels: np.ndarray, batch: int) -> list[tuple[Array, Array]]:
    """Images and labels in batches of one size; the last is filled with images of label -1.

    Args:
      images: `[n, ...]`, at least one.
      labels: int `[n]`.
      batch: images in a batch.

    Returns:
      (images, labels) of each batch.

    Raises:
      ValueError: there are no images, or the batch is below 1.

    Example:
      >>> from compressx.crossbar import network
      >>> found = network.batches(np.zeros((5, 4)), np.arange(5), batch=3)
      >>> [y.tolist() for _, y in found]
      [[0, 1, 2], [3, 4, -1]]
    """
    if len(images) == 0 or batch < 1:
        raise ValueError(f"nothing to score: {len(images)} images in batches of {batch}")
    batch = min(batch, len(images))
    spare = -len(images) % batch
    images = np.concatenate([images, np.repeat(images[:1], spare, axis=0)])
    labels = np.concatenate([labels, np.full(spare, -1, labels.dtype)])
    cut = range(0, len(images), batch)
    return [(jnp.asarray(images[i : i + batch]), jnp.asarray(labels[i : i + batch])) for i in cut]


def read_again(deployed: Mapping[str, Deployed], number: int | Array) -> dict[str, Deployed]:
    """The same devices, read anew: the read noise of batch `number`; layers without any are as they were.

    Args:
      deployed: by module path.
      number: of the batch; int32 `[]` where it is traced.

    Returns:
      The same layers with keys of their own for this batch.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> layer = crossbar.deploy(np.array([[0.5], [-1.0]]), 0.5, crossbar.isaac(), input_scale=1.0)
      >>> network.read_again({"a": layer}, 3)["a"].key is None  # nothing is read with noise
      True
    """
    out = dict(deployed)
    for path, layer in deployed.items():
        if layer.key is not None:
            out[path] = replace(layer, key=jax.random.fold_in(layer.key, number))
    return out


def accuracy(score: Scorer, deployed: Any, variables: Any, batched: list[tuple[Array, Array]]) -> float:
    """Share of correct predictions over all batches, each with read noise of its own.

    Args:
      score: of `make_scorer`.
      deployed: by module path; `{}` is the plain network.
      variables: of the model.
      batched: of `batches`.

    Returns:
      In 0..1; images of label -1 do not count.

    Example:
      >>> from compressx.crossbar import network
      >>> score = network.make_scorer(lambda variables, x, train: x @ variables["w"])
      >>> images, labels = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 4.0]], np.float32), np.array([0, 1, 0])
      >>> round(network.accuracy(score, {}, {"w": jnp.eye(2)}, network.batches(images, labels, 2)), 3)
      0.667
    """
    correct = sum(int(score(read_again(deployed, n), variables, x, y)) for n, (x, y) in enumerate(batched))
    return correct / sum(int(np.sum(np.asarray(y) >= 0)) for _, y in batched)


def perturb_network(key: Array, deployed: Mapping[str, Deployed], variation: Variation) -> dict[str, Deployed]:
    """All layers on one draw of devices (`noise.perturb`); they must be programmed with `prove=False`.

    Args:
      key: of the draw.
      deployed: by module path, on crossbars.
      variation: what is drawn.

    Returns:
      The same layers on the drawn devices.

    Raises:
      ValueError: a layer is in SOT-MRAM, or was programmed without `prove=False`.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> design = crossbar.Design(rows=1, active_rows=1, weight_bits=2, signs="polarized")
      >>> layer = crossbar.deploy(np.array([[3.0]]), 1.0, design, input_scale=1.0, prove=False)
      >>> drawn = network.perturb_network(jax.random.key(0), {"a": layer}, crossbar.Variation(on_off=3.0))
      >>> drawn["a"].groups[0].cells.cells.dtype  # conductances in place of levels
      dtype('float32')
    """
    out = {}
    for number, (path, layer) in enumerate(deployed.items()):
        own = jax.random.fold_in(key, number)
        groups = tuple(perturb(jax.random.fold_in(own, g), _crossbar(a), variation) for g, a in enumerate(layer.groups))
        out[path] = replace(layer, groups=groups, key=own if variation.read_noise else None)
    return out


def noisy_accuracy(
    score: Scorer, deployed: Mapping[str, Deployed], variables: Any, batched: list[tuple[Array, Array]], v: Variation
) -> Callable[[Array], Array]:
    """The metric for `noise.monte_carlo`: a key's devices are drawn once, and all batches pass through them.

    Args:
      score: of `make_scorer`.
      deployed: by module path, programmed with `prove=False`.
      variables: of the model.
      batched: of `batches`.
      v: what is drawn.

    Returns:
      `key -> float32 []`, in 0..1.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> score = network.make_scorer(lambda variables, x, train: x @ variables["w"])
      >>> batched = network.batches(np.array([[3.0, 1.0], [0.0, 2.0]], np.float32), np.array([0, 0]), 2)
      >>> metric = network.noisy_accuracy(score, {}, {"w": jnp.eye(2)}, batched, crossbar.Variation(sigma=0.1))
      >>> float(metric(jax.random.key(0)))  # nothing is deployed here: the plain network's
      0.5
    """
    images, labels = (jnp.stack(part) for part in zip(*batched, strict=True))
    count = float(jnp.sum(labels >= 0))

    def metric(key: Array) -> Array:
        drawn = perturb_network(key, deployed, v)
        numbers = jnp.arange(len(images), dtype=jnp.int32)
        step = lambda lot: score(read_again(drawn, lot[0]), variables, *lot[1:])
        # Behind a barrier: XLA would compute whatever the images alone decide while it compiles, for minutes.
        correct = jax.lax.map(step, jax.lax.optimization_barrier((numbers, images, labels)))
        return jnp.sum(correct).astype(jnp.float32) / count

    return metric


Observer = Callable[[Any, Any, Array], dict[str, tuple[Array, ...]]]


def make_observer(apply: Callable[..., Any], prepare: Callable[[Array], Array] = lambda x: x) -> Observer:
    """`observe(deployed, variables, images) -> {path: inputs of each group}`: what the word lines of a network see.

    Inputs are int32 `[n * uses, P]`, all rows in the order of the GEMM view; jitted.

    Args:
      apply: `model.apply`, called with `train=False`.
      prepare: images as the data set holds them -> inputs of the network.

    Returns:
      A function, for `skipping` and `saturated`.

    Example:
      >>> import flax.linen as nn
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> w = jnp.array([[0.5], [-1.0]])
      >>> layer = crossbar.deploy(w, 0.5, crossbar.isaac(), input_scale=0.5)
      >>> dense = nn.Dense(1, use_bias=False)
      >>> observe = network.make_observer(lambda variables, x, train: dense.apply(variables, x))
      >>> [x.tolist() for x in observe({"": layer}, {"params": {"kernel": w}}, jnp.array([[3.0, 1.0]]))[""]]
      [[[6, 2]]]
    """

    @jax.jit
    def observe(deployed: Any, variables: Any, images: Array) -> dict[str, tuple[Array, ...]]:
        seen: dict[str, tuple[Array, ...]] = {}
        with layer_calls.hardware(deployed, seen=seen):
            apply(variables, prepare(images), train=False)
        return seen

    return observe


def skipping(
    observe: Observer,
    deployed: Mapping[str, Deployed],
    variables: Any,
    batched: list[Array],
    designs: Mapping[str, list[Design]],
) -> dict[str, list[Skipping]]:
    """Effective input cycles of every layer on real activations, for several designs together.

    Args:
      observe: of `make_observer`.
      deployed: the network; its row order is kept.
      variables: its other parameters.
      batched: images.
      designs: by path, those to be measured (fragment sizes, say). Groups of a grouped layer count together.

    Returns:
      path -> `Skipping` for each design.

    Source: G. Yuan et al., "FORMS", 2021, section IV.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> layer = crossbar.deploy(np.array([[0.5], [1.0]]), 0.5, crossbar.forms(4), input_scale=1.0)
      >>> observe = lambda deployed, variables, images: {"a": (images,)}  # `make_observer` gives the real one
      >>> images = [jnp.array([[3, 1]], jnp.int32)]
      >>> found = network.skipping(observe, {"a": layer}, {}, images, {"a": [crossbar.forms(4), crossbar.forms(8)]})
      >>> [one.mean for one in found["a"]]  # the largest input has two bits
      [2.0, 2.0]
    """
    parts: dict[str, list[list[Skipping]]] = {path: [[] for _ in d] for path, d in designs.items()}
    for images in batched:
        seen = observe(deployed, variables, images)
        for path, wanted in designs.items():
            for arrays, x in zip(deployed[path].groups, seen[path], strict=True):
                used = _crossbar(arrays).drive(x)
                for i, design in enumerate(wanted):
                    parts[path][i].append(measure(used, design, path))
    return {path: [merge(one) for one in each] for path, each in parts.items()}


def saturated(
    observe: Observer, deployed: Mapping[str, Deployed], variables: Any, images: Array
) -> dict[str, tuple[int, int]]:
    """Clipped conversions of every layer and all its conversions, on real activations.

    Args:
      observe: of `make_observer`.
      deployed: by module path, on crossbars.
      variables: of the model.
      images: one batch.

    Returns:
      path -> (clipped conversions, all conversions).

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> layer = crossbar.deploy(np.array([[0.5], [1.0]]), 0.5, crossbar.forms(4), input_scale=1.0)
      >>> observe = lambda deployed, variables, images: {"a": (images,)}  # `make_observer` gives the real one
      >>> network.saturated(observe, {"a": layer}, {}, jnp.array([[3, 1]], jnp.int32))  # nothing can clip
      {'a': (0, 64)}
    """
    out = {}
    for path, inputs in observe(deployed, variables, images).items():
        arrays = [_crossbar(a) for a in deployed[path].groups]
        counts = [saturation(x, a) for x, a in zip(inputs, arrays, strict=True)]
        out[path] = (sum(int(c.clipped.sum()) for c in counts), sum(c.conversions for c in counts))
    return out


def proven_share(deployed: Mapping[str, Deployed]) -> float:
    """Share of all kept filters of a network whose columns are proven not to clip.

    Args:
      deployed: by module path, on crossbars.

    Returns:
      In 0..1; 1 where no filter is kept.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import network
      >>> layer = crossbar.deploy(np.array([[0.5], [1.0]]), 0.5, crossbar.isaac(), input_scale=1.0)
      >>> network.proven_share({"a": layer})
      1.0
    """
    arrays = [_crossbar(a) for layer in deployed.values() for a in layer.groups]
    proven = sum(a.proven.shape[0] for a in arrays)
    kept = proven + sum(a.simulated.shape[0] for a in arrays)
    return proven / kept if kept else 1.0


def _crossbar(arrays: Programmed | Planes) -> Programmed:
    if isinstance(arrays, Planes):
        raise ValueError("SOT-MRAM planes are digital: they have no devices to draw, no ADC and no skipping")
    return arrays
