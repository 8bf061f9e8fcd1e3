"""Products of two activations: found, counted as they are, and said to be no part of the cost."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.crossbar import chips, cost, mapping, network, presets


class Attends(nn.Module):
    """Attention of 4 heads of 8 over 16 tokens, between two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        q, k, v = (nn.Dense(32, name=n)(x).reshape(1, 16, 4, 8) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return nn.Dense(32, name="o")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(1, 16, 32))


def test_attention_is_counted_and_said_to_cost_nothing_here():
    x = jnp.zeros((1, 16, 32), jnp.float32)
    variables = Attends().init(jax.random.key(0), x)
    found = network.find_layers(Attends().apply, variables, x)
    assert [layer.name for layer in found if not layer.dynamic] == ["q", "k", "v", "o"]
    products = [layer for layer in found if layer.dynamic]
    assert [layer.macs for layer in products] == [4 * 16 * 16 * 8] * 2
    design = presets.isaac()
    mapped = mapping.map_network(found, design)
    plan = cost.plan(mapped, design, chips.isaac_chip())
    assert plan.operations == 2 * (4 * 16 * 32 * 32 + 2 * 4 * 16 * 16 * 8) and len(plan.stages) == 4
    (line,) = [line for line in plan.assumptions if "two activations" in line]
    assert line.startswith("32768 of 163840 operations") and "not counted" in line


def test_products_in_loops_and_with_weights_alone():
    class Loops(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            a, b = (self.param(n, nn.initializers.ones, (6,)) for n in "ab")
            mixed = jnp.outer(a, b) @ jnp.outer(b, a)  # of weights alone

            def step(carry, row):
                return carry + row @ carry.T @ carry, jnp.sum(carry)

            y, _ = jax.lax.scan(step, jnp.zeros((4, 6), jnp.float32), jnp.broadcast_to(x[0], (5, 4, 6)))
            return y + mixed[:4]

    x = jnp.ones((1, 4, 6), jnp.float32)
    variables = Loops().init(jax.random.key(0), x)
    found = network.find_layers(Loops().apply, variables, x)
    assert all(layer.dynamic for layer in found)
    assert [layer.macs for layer in found] == [5 * 4 * 6 * 4, 5 * 4 * 4 * 6]
    assert len({layer.name for layer in found}) == 2
    assert np.all([layer.uses == 20 for layer in found])
