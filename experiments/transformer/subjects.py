"""What a transformer is trained on: images with classes, or a text of which it predicts every next symbol."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import data, training
from experiments.common.data import ngrams, text
from experiments.common.models.decoder import Decoder
from experiments.common.models.functional import Functional, functional
from experiments.common.models.vit import ViT
from experiments.common.training import ConfigError
from experiments.common.training.state import Sums, Task
from experiments.transformer.config import Data, Model


class Subject(NamedTuple):
    """Data in the form that the training takes, and how results are read.

    Attributes:
      info: facts about the data.
      train: arrays `inputs` and `labels`.
      test: likewise.
      metric: "accuracy" or "perplexity".
      floor: fits what a network must beat, and returns its name and figure.
      seen: symbols or images of training and test, for the summary.
      classes: of the network's outputs.
      words: the vocabulary of a text, `()` for images.
    """

    info: data.Info
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    metric: str
    floor: Callable[[], tuple[str, float]]
    seen: tuple[int, int]
    classes: int
    words: tuple[str, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    def value(self, figures: Mapping[str, float]) -> float:
        """The metric from the figures of an evaluation, which have `test_loss` or `loss`."""
        if self.higher_is_better:
            return figures["accuracy"]
        return math.exp(min(figures["test_loss"] if "test_loss" in figures else figures["loss"], 700.0))

    def example(self, data: Data, batch: int = 1) -> jax.ShapeDtypeStruct:
        """Shape and dtype of an input of the network."""
        if self.metric == "perplexity":
            return jax.ShapeDtypeStruct((batch, data.window), jnp.int32)
        return jax.ShapeDtypeStruct((batch, *self.info.shape), jnp.float32)


def load(given: Data, data_dir: str | None, split: str = "test", words: tuple[str, ...] | None = None) -> Subject:
    """The data of a config.

    Args:
      given: which.
      data_dir: see `driver.Options`.
      split: what stands in `test`.
      words: of a text, the vocabulary of a trained network.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    try:
        return _text(given, data_dir, split, words) if given.subject == "text" else _images(given, data_dir, split)
    except (data.DataNotFoundError, data.DataFileError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def _images(given: Data, data_dir: str | None, split: str) -> Subject:
    train, test = (data.load(given.name, s, data_dir) for s in ("train", split))
    train, test = _front(train, given.train, "train"), _front(test, given.test, "test")
    arrays = [{"inputs": np.asarray(d.inputs), "labels": np.asarray(d.labels)} for d in (train, test)]

    def floor() -> tuple[str, float]:
        return "linear classifier of the pixels", linear_accuracy(*arrays)

    seen = len(train), len(test)
    return Subject(train.info, arrays[0], arrays[1], "accuracy", floor, seen, train.info.classes)


def _front(dataset: Any, wanted: int, what: str) -> Any:
    if wanted > len(dataset):
        raise ValueError(f"{what}={wanted} is impossible; {dataset.info.name} has {len(dataset)} examples")
    return dataset.take(slice(0, wanted or None))


def _text(given: Data, data_dir: str | None, split: str, words: tuple[str, ...] | None) -> Subject:
    corpus = text.load(given.name, data_dir, words=words)
    train, test = corpus.train, corpus.part(split)
    for what, wanted, ids in (("train", given.train, train), ("test", given.test, test)):
        if wanted and not 2 <= wanted <= len(ids):
            raise ValueError(f"{what}={wanted} is impossible; it must be 0 or 2 to {len(ids)}, the symbols there are")
    train, test = train[: given.train or None], test[: given.test or None]
    cut = [text.windows(ids, 1, given.window, whole=True) for ids in (train, test)]
    arrays = [{name: w[name] for name in ("inputs", "labels")} for w in cut]

    def floor() -> tuple[str, float]:
        return "smoothed bigram", ngrams.bigram_perplexity(train, test, len(corpus.words))

    seen = len(train), len(test)
    return Subject(corpus.info, arrays[0], arrays[1], "perplexity", floor, seen, len(corpus.words), corpus.words)


def linear_accuracy(train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]) -> float:
    """The accuracy on `test` of a logistic regression on the pixels of `train`."""
    from sklearn.linear_model import LogisticRegression  # takes a second to import, and only a full run asks for it

    flat = [np.asarray(d["inputs"], np.float32).reshape(len(d["labels"]), -1) for d in (train, test)]
    mean, std = flat[0].mean(0), flat[0].std(0) + 1e-3 * flat[0].std()
    fitted = LogisticRegression(max_iter=200, tol=1e-3).fit((flat[0] - mean) / std, train["labels"])
    return float(fitted.score((flat[1] - mean) / std, test["labels"]))


# -- the network and its loss ------------------------------------------------------------------------------------------


def network(model: Model, given: Data, subject: Subject) -> Functional:
    """The network of a config, as pure functions.

    Raises:
      ConfigError: there is no such network.
    """
    sizes = {"width": model.width, "heads": model.heads, "hidden": model.hidden, "layers": model.layers}
    try:
        if given.subject == "text":
            return functional(lambda rngs: Decoder(subject.classes, given.window, rngs=rngs, **sizes))
        h, w, c = subject.info.shape
        return functional(lambda rngs: ViT((h, w, c), subject.classes, patch=model.patch, rngs=rngs, **sizes))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def task(net: Functional, given: Data, subject: Subject) -> Task:
    """Loss and score of a network on the subject."""
    if given.subject == "text":
        return next_symbol(net)
    mean, std = subject.info.mean, subject.info.std
    augment = data.augment.random_shift(given.shift) if given.shift else None
    return training.classification(net.apply, lambda x: data.augment.normalise(x, mean, std), augment)


def next_symbol(net: Functional) -> Task:
    """Mean cross-entropy of every next symbol of a window, each read from its own beginning; a label below 0 is none.

    Sums count positions, so that `exp(loss)` of a record is a perplexity.
    """

    def sums(params: Any, batch: Any, valid: jax.Array) -> Sums:
        labels = batch["labels"]
        counted = (labels >= 0) & valid[:, None]
        logits = net.apply(params, batch["inputs"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        right = counted & (jnp.argmax(logits, -1) == labels)
        return Sums(
            jnp.sum(jnp.where(counted, each, 0.0)),
            jnp.sum(right, dtype=jnp.int32),
            jnp.sum(counted, dtype=jnp.int32),
        )

    def loss(params: Any, stats: Any, batch: Any, key: jax.Array, fit: Any, teacher: Any) -> Any:
        del key, fit, teacher
        found = sums(params, batch, jnp.ones(batch["labels"].shape[:1], bool))
        return found.loss / jnp.maximum(found.seen, 1), (stats, found)

    def score(params: Any, stats: Any, batch: Any, valid: jax.Array) -> Sums:
        del stats
        return sums(params, batch, valid)

    return Task(loss, score)
