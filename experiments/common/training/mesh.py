"""Where arrays lie: one device, a mesh of devices with data and parameter axes, many hosts.

The batch is split over the axis `data`. A leaf of the state is split over the axis `model` along its largest axis that
`model` divides, and is a copy on every device if there is none. The rule sees the shape alone, so weights, Adam's
moments, Z and U of a leaf always lie alike.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common.training.config import ConfigError

AXES = ("data", "model")


class Placement(NamedTuple):
    """How to lay out arrays; a mesh of None is the default device.

    Attributes:
      mesh: the devices, with axes among `AXES`.
    """

    mesh: Mesh | None = None

    def spec(self, shape: tuple[int, ...]) -> P:
        """The layout of a state leaf of that shape."""
        ways = 1 if self.mesh is None else self.mesh.shape.get("model", 1)
        axes = [a for a, n in enumerate(shape) if n >= ways and n % ways == 0]
        if ways == 1 or not axes:
            return P()
        longest = max(axes, key=lambda a: shape[a])
        return P(*(["model" if a == longest else None for a in range(longest + 1)]))

    def put(self, tree: Any, split: bool = True) -> Any:
        """Arrays as new arrays, laid out as state (`split`) or copied to every device."""
        if self.mesh is None:
            # copies: no two states may share a buffer that one donates
            return jax.device_put(tree, jax.devices()[0], may_alias=False)
        mesh = self.mesh
        return jax.tree.map(lambda x: self._put(x, NamedSharding(mesh, self.spec(np.shape(x)) if split else P())), tree)

    def _put(self, x: Any, sharding: NamedSharding) -> Any:
        if jax.process_count() == 1:
            return jax.device_put(jnp.array(x), sharding)  # a copy first: one shard may alias what is put
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(lambda x: x.copy(), out_shardings=sharding)(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))
            whole = jax.make_array_from_callback(data.shape, NamedSharding(sharding.mesh, P()), lambda i: data[i])
            return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    def copy(self, tree: Any) -> Any:
        """Replicates over every device: data sets, orders of examples."""
        return self.put(tree, split=False)

    def batch(self, tree: Any) -> Any:
        """Inside jit: splits the leading axis over `data`, where it divides (`check_batch` is for the caller)."""
        if self.mesh is None or jax.tree.leaves(tree)[0].shape[0] % self.mesh.shape.get("data", 1):
            return tree
        sharding = NamedSharding(self.mesh, P("data" if "data" in self.mesh.shape else None))
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding), tree)

    def keep(self, tree: Any) -> Any:
        """Inside jit: a new state laid out as the old one was."""
        if self.mesh is None:
            return tree
        mesh = self.mesh
        return jax.tree.map(
            lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, self.spec(x.shape))), tree
        )

    def check_batch(self, size: int) -> None:
        """Raises ValueError where a batch cannot be split evenly."""
        ways = 1 if self.mesh is None else self.mesh.shape.get("data", 1)
        if size % ways:
            raise ValueError(f"batch={size} cannot be split over data={ways} devices; it must be a multiple of {ways}")


def parse(text: str) -> dict[str, int]:
    """Reads `data=4,model=2`.

    Raises:
      ValueError: not of that form, an unknown axis, a size below 1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, equals, number = part.partition("=")
        if name not in AXES or not equals or not number.isdecimal() or int(number) < 1 or name in sizes:
            raise ValueError(f"--mesh={text}: {part!r} is not an axis; write for example data=2 or data=4,model=2")
        sizes[name] = int(number)
    return sizes


def make(text: str = "") -> Placement:
    """The placement that `--mesh` asks for: "" is one device, or with many processes all devices on the axis `data`.

    Raises:
      ValueError: the text is malformed, or asks for more devices than there are.
    """
    sizes = parse(text)
    if not sizes and jax.process_count() == 1:
        return Placement()
    devices = jax.devices()
    sizes = sizes or {"data": len(devices)}
    need = math.prod(sizes.values())
    if need > len(devices) or (jax.process_count() > 1 and need != len(devices)):
        raise ValueError(f"--mesh={text} takes {need} devices, and there are {len(devices)}")
    # Auto: the compiler carries the layouts through the step; only the batch and the state are pinned.
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:need]
    )
    return Placement(mesh)


def for_batch(text: str, batch: int) -> Placement:
    """The placement that `--mesh` asks for, over whose devices batches of that size are split.

    Raises:
      ConfigError: what `make` or `Placement.check_batch` refuse.
    """
    try:
        placement = make(text)
        placement.check_batch(batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return placement


def start_processes(coordinator: str, processes: int, process: int) -> None:
    """Joins a run over several processes; does nothing without a coordinator. Call it before anything else of jax.

    Raises:
      ValueError: the numbers make no sense.
    """
    if not coordinator:
        if processes != 1 or process != 0:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
        return
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(f"--process_id={process} must lie in 0..{processes - 1}, --num_processes={processes} above 0")
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def host(tree: Any) -> Any:
    """Every leaf whole, as NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def agree(value: bool) -> bool:
    """The first process's answer, on all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))
