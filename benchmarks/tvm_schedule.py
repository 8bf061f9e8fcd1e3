"""Chains of convolutions and poolings in TVM, scheduled by hand: direct convolution in blocks of 16 channels.

    run = step(steps, x, start, threads)        # run() is an inference

TVM's default schedules are two orders of magnitude slower than any engine, and its tuner (MetaSchedule) was found to
crash in this release; this is the classic schedule for CPUs. Activations are `[c / 16, h, w, 16]` and weights
`[cout / 16, cin / 16, kh, kw, 16, 16]`. A row of up to 28 output pixels of 16 filters stays in registers over all input
channels and taps; rows of filters run in parallel.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK = 16  # channels of a block: a vector
MOST = 28  # sums in registers


def _conv(shape: tuple[int, ...], cout: int, geometry: Any, relu: bool) -> tuple[Any, tuple[int, ...]]:
    """The scheduled module of a convolution for activations of this shape, and the shape it gives."""
    from tvm import s_tir, te

    groups, h, w, block = shape
    (kh, kw), (sh, sw), (rows, columns) = geometry.size, geometry.strides, geometry.pads
    oh, ow = geometry.out(h, w)
    image = te.placeholder(shape, name="image")
    kernel = te.placeholder((cout // BLOCK, groups, kh, kw, block, BLOCK), name="kernel")
    bias = te.placeholder((cout // BLOCK, BLOCK), name="bias")

    def pad(o: Any, y: Any, x: Any, i: Any) -> Any:
        inside = te.all(y >= rows[0], y < h + rows[0], x >= columns[0], x < w + columns[0])
        return te.if_then_else(inside, image[o, y - rows[0], x - columns[0], i], 0.0)

    padded = te.compute((groups, h + sum(rows), w + sum(columns), block), pad, name="padded")
    axes = [te.reduce_axis((0, n), name=name) for n, name in ((groups, "o"), (kh, "p"), (kw, "q"), (block, "i"))]
    o, p, q, i = axes
    sums = te.compute(
        (cout // BLOCK, oh, ow, BLOCK),
        lambda k, y, x, c: te.sum(padded[o, y * sh + p, x * sw + q, i] * kernel[k, o, p, q, i, c], axis=axes),
        name="sums",
    )
    least = 0.0 if relu else -3.4e38
    out = te.compute(sums.shape, lambda k, y, x, c: te.max(sums[k, y, x, c] + bias[k, c], least), name="out")

    made = s_tir.Schedule(te.create_prim_func([image, kernel, bias, out]))
    find = made.get_sblock
    edge, product, end = find("padded"), find("sums"), find("out")
    o, y, _, i = made.get_loops(edge)
    made.parallel(made.fuse(o, y))
    made.vectorize(i)
    k, y, x, c = made.get_loops(end)
    width = max(n for n in range(1, MOST + 1) if ow % n == 0)
    x, inner = made.split(x, [None, width])
    row = made.fuse(k, y)
    made.parallel(row)
    made.reorder(row, x, inner, c)
    made.vectorize(c)
    made.compute_at(product, x, preserve_unit_loops=True)
    *_, k, y, x, c, o, p, q, i = made.get_loops(product)
    made.reorder(o, p, q, i, k, y, x, c)
    made.unroll(x)
    made.vectorize(c)
    first = made.decompose_reduction(product, o)
    *_, x, c = made.get_loops(first)
    made.unroll(x)
    made.vectorize(c)
    made.set_scope(product, 0, "local")
    return made.mod, (cout // BLOCK, oh, ow, BLOCK)


def _pool(shape: tuple[int, ...], window: tuple[int, int], strides: tuple[int, int]) -> tuple[Any, tuple[int, ...]]:
    """The scheduled module of a pooling without padding, and the shape it gives."""
    from tvm import s_tir, te

    groups, h, w, block = shape
    image = te.placeholder(shape, name="image")
    p, q = (te.reduce_axis((0, n), name=name) for n, name in zip(window, "pq", strict=True))
    out_shape = (groups, (h - window[0]) // strides[0] + 1, (w - window[1]) // strides[1] + 1, block)
    out = te.compute(
        out_shape,
        lambda o, y, x, i: te.max(image[o, y * strides[0] + p, x * strides[1] + q, i], axis=[p, q]),
        name="out",
    )
    made = s_tir.Schedule(te.create_prim_func([image, out]))
    o, y, x, i, p, q = made.get_loops(made.get_sblock("out"))
    made.parallel(made.fuse(o, y))
    made.reorder(x, p, q, i)
    made.vectorize(i)
    return made.mod, out_shape


def step(steps: list[Any], x: Any, start: int, threads: int) -> Callable[[], Any]:
    """The steps for images `[1, h, w, c]`, as one callable that gives `[1, c, h, w]`.

    Raises:
      ValueError: the steps are no chain, or one of them is of a kind that is not scheduled here.
    """
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm
    from tvm.target.codegen import llvm_get_system_cpu

    from compressx.kernels.graph import Conv

    about = {"kind": "llvm", "mcpu": str(llvm_get_system_cpu()), "mattr": ["-prefer-256-bit"], "num-cores": threads}
    target = tvm.target.Target(about)
    channels = x.shape[3]
    block = min(BLOCK, channels)
    shape: tuple[int, ...] = (channels // block, *x.shape[1:3], block)
    if len(x) != 1 or channels % block:
        raise ValueError(f"images of {channels} channels, {len(x)} together, are not scheduled")
    value, calls = start, []
    held = given = tvm.runtime.tensor(np.zeros(shape, np.float32))
    for s in steps:
        if s.x != value:
            raise ValueError("only chains are scheduled")
        if isinstance(s, Conv):
            plain = s.residual < 0 and s.geometry.groups == 1 and s.activation in ("relu", "none")
            if not plain or s.w.shape[3] % BLOCK:
                raise ValueError("only plain convolutions to multiples of 16 filters are scheduled")
            kh, kw, cin, cout = s.w.shape
            module, after = _conv(shape, cout, s.geometry, s.activation == "relu")
            w = (s.w * s.scale).reshape(kh, kw, shape[0], shape[3], cout // BLOCK, BLOCK).transpose(4, 2, 0, 1, 3, 5)
            constants = [np.ascontiguousarray(w, np.float32), np.asarray(s.bias, np.float32).reshape(-1, BLOCK)]
        else:
            if np.any(s.pads):
                raise ValueError("only poolings without padding are scheduled")
            module, after = _pool(shape, s.window, s.strides)
            constants = []
        out = tvm.runtime.tensor(np.zeros(after, np.float32))
        function = tvm.compile(module, target=target)["main"]
        calls.append((function, [held, *map(tvm.runtime.tensor, constants), out]))
        value, shape, held = s.y, after, out

    def run() -> Any:
        _, h, w, c = x.shape
        given.copyfrom(np.ascontiguousarray(x.reshape(h, w, c // block, block).transpose(2, 0, 1, 3)))
        for function, arrays in calls:
            function(*arrays)
        groups, h, w, _ = shape
        return held.numpy().transpose(0, 3, 1, 2).reshape(1, groups * BLOCK, h, w)

    return run
