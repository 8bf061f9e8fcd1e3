import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import models

DIGIT, MNIST, CIFAR, IMAGENET = (8, 8, 1), (28, 28, 1), (32, 32, 3), (224, 224, 3)

# Published counts: LeCun 1998, Han 2015 (LeNets), He 2015, torchvision (ResNets, VGG-16, MobileNetV2).
COUNTS = [
    ("digits_cnn", DIGIT, 10, {}, 38_282),
    ("lenet_300_100", MNIST, 10, {}, 266_610),
    ("lenet5", MNIST, 10, {}, 61_706),
    ("lenet5_caffe", MNIST, 10, {}, 431_080),
    ("vgg16", IMAGENET, 1000, {"head": "imagenet", "batch_norm": False}, 138_357_544),
    ("vgg16", IMAGENET, 1000, {"head": "imagenet"}, 138_357_544 + 4_224),
    ("vgg16", CIFAR, 10, {}, 14_724_042),
    ("resnet20", CIFAR, 10, {}, 269_722),
    ("resnet32", CIFAR, 10, {}, 464_154),
    ("resnet56", CIFAR, 10, {}, 853_018),
    ("resnet18", IMAGENET, 1000, {}, 11_689_512),
    ("resnet18", CIFAR, 10, {"stem": "cifar"}, 11_173_962),
    ("resnet50", IMAGENET, 1000, {}, 25_557_032),
    ("mobilenet_v2", IMAGENET, 1000, {}, 3_504_872),
    ("mobilenet_v2", CIFAR, 1000, {"stem": "cifar"}, 3_504_872),
]
TINY = [
    ("digits_cnn", DIGIT, {"width": 0.25}),
    ("lenet_300_100", MNIST, {"width": 0.1}),
    ("lenet5", MNIST, {"width": 0.5}),
    pytest.param("lenet5_caffe", MNIST, {"width": 0.1}, marks=pytest.mark.slow),
    pytest.param("vgg16", CIFAR, {"width": 0.05}, marks=pytest.mark.slow),
    pytest.param("vgg16", CIFAR, {"width": 0.05, "head": "imagenet", "batch_norm": False}, marks=pytest.mark.slow),
    ("resnet20", CIFAR, {"width": 0.25}),
    pytest.param("resnet18", CIFAR, {"width": 0.05, "stem": "cifar"}, marks=pytest.mark.slow),
    pytest.param("resnet50", (33, 33, 3), {"width": 0.05}, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", CIFAR, {"width": 0.1, "stem": "cifar"}, marks=pytest.mark.slow),
]


def shapes(name, image, classes, options):
    model = models.build(name, classes, **options)
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image), jnp.float32))


@pytest.mark.parametrize(("name", "image", "classes", "options", "count"), COUNTS)
def test_parameter_counts(name, image, classes, options, count):
    params = shapes(name, image, classes, options)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_lenet5_of_caffe_has_430500_weights():
    params = shapes("lenet5_caffe", MNIST, 10, {})["params"]
    assert set(params) == {"c1", "c2", "f1", "f2"}
    assert sum(layer["kernel"].size for layer in params.values()) == 430_500


@pytest.mark.parametrize(("name", "image", "options"), TINY)
def test_a_step_runs_and_every_parameter_has_a_gradient(name, image, options):
    model = models.build(name, 7, **options)
    x = jax.random.normal(jax.random.key(1), (4, *image))
    y = jnp.arange(4)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = variables["params"]
    rest = {key: value for key, value in variables.items() if key != "params"}

    @jax.jit
    def step(params):
        def loss(params):
            logits, new = model.apply({"params": params, **rest}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits, dict(new))

        return jax.grad(loss, has_aux=True)(params)

    grads, (logits, new) = step(params)
    assert logits.shape == (4, 7) and logits.dtype == jnp.float32
    assert jax.tree.structure(new) == jax.tree.structure(rest)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.isfinite(grad).all()), path
    nonzero = [bool(jnp.any(grad != 0)) for grad in jax.tree.leaves(grads)]
    assert np.mean(nonzero) > 0.9  # at these widths a ReLU may kill a bias or two


def test_evaluation_does_not_depend_on_the_batch():
    model = models.build("resnet20", 10, width=0.25)
    x = jax.random.normal(jax.random.key(1), (4, *CIFAR))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, x)[:2], apply(variables, x[:2]), rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    model = models.build("vgg16", 5, width=0.05, head="imagenet", batch_norm=False, dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (2, *CIFAR))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = jax.jit(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    evaluate = jax.jit(model.apply)
    assert not np.array_equal(train(jax.random.key(2)), train(jax.random.key(3)))
    np.testing.assert_array_equal(evaluate(variables, x), evaluate(variables, x))


def test_shortcut_a_subsamples_and_pads_both_sides():
    x = jnp.arange(2 * 5 * 4 * 3, dtype=jnp.float32).reshape(2, 5, 4, 3)
    y = np.asarray(models.resnet.shortcut_a(x, 8, 2))
    assert y.shape == (2, 3, 2, 8)
    np.testing.assert_array_equal(y[..., 2:5], np.asarray(x)[:, ::2, ::2])
    assert not y[..., :2].any() and not y[..., 5:].any()


@pytest.mark.parametrize(
    ("name", "classes", "options", "message"),
    [
        ("resnet21", 10, {}, "no model 'resnet21'; the models are .*darknet53, digits_cnn"),
        ("resnet20", 0, {}, "classes must be at least 1, got 0"),
        ("resnet20", 10, {"depth": 3}, "'resnet20' has no option depth; its options are width"),
        ("resnet20", 10, {"blocks": 4}, "has no option blocks"),
    ],
)
def test_build_refuses(name, classes, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, classes, **options)


@pytest.mark.parametrize(
    ("name", "options", "image", "message"),
    [
        ("resnet18", {"stem": "tiny"}, CIFAR, "stem is 'imagenet' or 'cifar', got 'tiny'"),
        ("mobilenet_v2", {"stem": ""}, CIFAR, "stem is"),
        ("vgg16", {"head": "none"}, CIFAR, "head is 'cifar' or 'imagenet', got 'none'"),
        ("vgg16", {}, MNIST, "needs 32x32 or more, got shape"),
        ("lenet5", {"width": -1.0}, MNIST, "width must be positive"),
    ],
)
def test_bad_options_are_named(name, options, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(name, image, 10, options)
