"""The images of `experiments.pneumonia`: which ones are trained and scored on, and what is learned from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import data, training
from experiments.common.data import augment, rsna, xray
from experiments.common.training import ConfigError
from experiments.pneumonia import detection

NAMES = ("opacities", "chest_xray_nih", "rsna", "pneumoniamnist")


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
      name: "opacities" (generated, on real X-rays), "chest_xray_nih", "rsna" or "pneumoniamnist" (no boxes).
      size: height and width of the network's input, a multiple of 32 for the detector.
      channels: of that input; 3 repeats the grey one, for weights trained on colour images.
      train: how many training images to use, from the front; 0 is all.
      test: likewise, and of validation.
      faults: "error", or "skip": faulty images and boxes of `rsna` are left out, named and counted.
      shift: augmentation, largest shift as a share of the side.
      zoom: largest change of scale.
      flip: whether half of the images are mirrored.
      contrast: largest change of contrast.
    """

    name: str = "opacities"
    size: int = 96
    channels: int = 1
    train: int = 0
    test: int = 0
    faults: str = "error"
    shift: float = 0.1
    zoom: float = 0.15
    flip: bool = True
    contrast: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in NAMES or self.faults not in xray.POLICIES or self.channels not in (1, 3):
            raise ConfigError(
                f"data.name={self.name!r} must be one of {', '.join(NAMES)}, data.faults={self.faults!r} one of "
                f"{', '.join(xray.POLICIES)}, data.channels={self.channels} 1 or 3"
            )
        if self.size < 32 or self.size % 32:
            raise ConfigError(f"data.size={self.size} is impossible; it must be a multiple of 32")


class Judged(NamedTuple):
    """What scoring knows of a split beyond the training's arrays.

    Attributes:
      positive: int32 `[n]`, 1 where the image has what is looked for.
      patient: int32 `[n]`.
      boxed: bool `[n]`, whether its boxes are known: a positive image without a box is not scored as a detection.
    """

    positive: np.ndarray
    patient: np.ndarray
    boxed: np.ndarray


class Task(NamedTuple):
    """Images and everything that belongs to them.

    Attributes:
      info: facts about the set.
      train: arrays as the training takes them.
      validation: likewise; it chooses confidences.
      test: likewise.
      judged: "validation" and "test" -> beyond those arrays.
      geometry: of the detector; None for classification.
      prepare: stored images to the network's input.
      shape: of that input, `(h, w, c)`.
      classes: of the network.
      metric: the name of the figure that heads the summary.
      facts: what a saved model must keep: size, normalisation, anchors.
      report: counts for the summary.
    """

    info: data.Info
    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    judged: dict[str, Judged]
    geometry: detection.Geometry | None
    prepare: Callable[[jax.Array], jax.Array]
    shape: tuple[int, int, int]
    classes: int
    metric: str
    facts: dict[str, Any]
    report: dict[str, Any]


def _split(config: Data, split: str, data_dir: str | None) -> tuple[data.Dataset, dict[str, int]]:
    """A split at the network's size, cut to the number wanted, and its faults by kind."""
    counts: dict[str, int] = {}
    if config.name == "rsna":
        whole, faults = rsna.load(split, data_dir, size=config.size, policy=config.faults)
        counts = faults.counts
        if counts:
            print(f"rsna {split}: left out {faults}")
    else:
        try:
            whole = data.load(config.name, split, data_dir)
        except (data.DataNotFoundError, data.DataFileError):
            raise
        except ValueError as error:
            raise ConfigError(f"data: {error}") from None
    wanted = config.train if split == "train" else config.test
    if not 0 <= wanted <= len(whole):
        which = "train" if split == "train" else "test"
        raise ConfigError(f"data.{which}={wanted} is impossible; {config.name} {split} has {len(whole)} images")
    return (whole.take(slice(0, wanted)) if wanted else whole), counts


def _detection(config: Data, whole: data.Dataset) -> tuple[dict[str, np.ndarray], Judged]:
    labels, scale = whole.labels, config.size / whole.inputs.shape[1]
    arrays = {
        "inputs": xray.resize_area(whole.inputs, config.size),
        "boxes": (labels["boxes"] * scale).astype(np.float32),
        "count": labels["count"],
    }
    boxed = (labels["count"] > 0) | (labels["positive"] == 0)
    return arrays, Judged(labels["positive"], labels["patient"], boxed)


def _classified(config: Data, whole: data.Dataset) -> tuple[dict[str, np.ndarray], Judged]:
    images, n = whole.inputs, len(whole)
    margin = config.size - images.shape[1]
    if margin < 0 or margin > config.size // 2:
        raise ConfigError(f"data.size={config.size} does not fit images of {images.shape[1:]}; take 32")
    pad = ((0, 0), (margin // 2, margin - margin // 2), (margin // 2, margin - margin // 2), (0, 0))
    every = np.ones(n, bool)
    arrays = {"inputs": np.pad(images, pad), "labels": whole.labels}
    return arrays, Judged(whole.labels, np.arange(n, dtype=np.int32), every)


def load(config: Data, data_dir: str | None) -> Task:
    """All splits, the anchors of the training boxes, and what a network reads.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or at fault.
    """
    found = {split: _split(config, split, data_dir) for split in ("train", "val", "test")}
    parts = {split: _arrays(config, whole) for split, (whole, _) in found.items()}
    train, judged = parts["train"]
    info = found["train"][0].info
    left_out = 0
    if config.name != "pneumoniamnist":
        left_out = int((~judged.boxed).sum())
        train = {k: v[judged.boxed] for k, v in train.items()}
    facts = _facts(config, info, train)
    report = {
        "train_positive": int(judged.positive.sum()),
        "test_positive": int(parts["test"][1].positive.sum()),
        "train_left_out_without_boxes": left_out,
        "test_scored_as_detections": int(parts["test"][1].boxed.sum()),
        "patients": {split: int(np.unique(j.patient).size) for split, (_, j) in parts.items()},
        "faults": {split: counts for split, (_, counts) in found.items() if counts},
        "mean_iou_of_anchors": facts.pop("mean_iou", None),
    }
    return _task(info, facts, train, parts["val"], parts["test"], report)


def load_for(config: Data, split: str, data_dir: str | None, facts: Mapping[str, Any], path: str) -> Task:
    """One split, for a network that was saved with these facts.

    Raises:
      ConfigError: facts that are damaged, or data of another kind than the network's.
    """
    boxes = config.name != "pneumoniamnist"
    numbers = ("size", "channels", "threshold", "mean", "std")
    if not all(isinstance(facts.get(k), int | float) for k in numbers) or float(facts["std"]) <= 0:
        raise ConfigError(f"{path}: its facts are damaged: {', '.join(numbers)} must be numbers")
    if boxes != bool(facts.get("anchors")):
        has = "has" if boxes else "has no"
        raise ConfigError(f"data.name={config.name!r} {has} boxes, and {path} is of the other kind")
    if (config.size, config.channels) != (facts["size"], facts["channels"]):
        raise ConfigError(f"{path} reads images of size {facts['size']}, {facts['channels']} channels; set data.size")
    whole, counts = _split(config, split, data_dir)
    part = _arrays(config, whole)
    return _task(whole.info, dict(facts), part[0], part, part, {"faults": {split: counts} if counts else {}})


def _arrays(config: Data, whole: data.Dataset) -> tuple[dict[str, np.ndarray], Judged]:
    return _classified(config, whole) if config.name == "pneumoniamnist" else _detection(config, whole)


def _facts(config: Data, info: data.Info, train: Mapping[str, np.ndarray]) -> dict[str, Any]:
    pixels = train["inputs"].astype(np.float32) / 255
    facts = {
        "dataset": info.name,
        "size": config.size,
        "channels": config.channels,
        "mean": float(pixels.mean()),
        "std": float(pixels.std()),
    }
    if "boxes" in train:
        real = np.arange(train["boxes"].shape[1])[None] < train["count"][:, None]
        if not real.any():
            raise ConfigError(f"data.name={config.name!r}: the training images have no boxes, so no detector can learn")
        found = detection.kmeans_anchors(train["boxes"][real][:, 2:], 9)
        facts |= {"anchors": found.sizes.round(3).tolist(), "mean_iou": found.mean_iou}
    return facts


def _task(
    info: data.Info,
    facts: dict[str, Any],
    train: dict[str, np.ndarray],
    validation: tuple[dict[str, np.ndarray], Judged],
    test: tuple[dict[str, np.ndarray], Judged],
    report: dict[str, Any],
) -> Task:
    size, channels = int(facts["size"]), int(facts["channels"])

    def prepare(images: jax.Array) -> jax.Array:
        x = augment.normalise(images, (facts["mean"],), (facts["std"],))
        return x if channels == 1 else jnp.repeat(x, channels, -1)

    geometry = None
    if "anchors" in facts:
        try:
            anchors = tuple((float(w), float(h)) for w, h in facts["anchors"])
            geometry = detection.Geometry((size, size), anchors)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"anchors: {error}") from None
    return Task(
        info=info,
        train=train,
        validation=validation[0],
        test=test[0],
        judged={"validation": validation[1], "test": test[1]},
        geometry=geometry,
        prepare=prepare,
        shape=(size, size, channels),
        classes=1 if geometry is not None else 2,
        metric="challenge_score" if geometry is not None else "auc",
        facts=facts,
        report=report,
    )


def learning(task: Task, model: Any, config: Data, positive: float) -> training.Task:
    """Loss and score of the network, for `training.train`."""
    if task.geometry is None:
        steps = [data.augment.random_shift(round(config.shift * config.size))] if config.shift else []
        if config.flip:
            steps.append(data.augment.random_flip())
        return training.classification(model.apply, task.prepare, data.augment.compose(*steps) if steps else None)
    options = {"shift": config.shift, "zoom": config.zoom, "flip": config.flip, "contrast": config.contrast}
    return detection.detection(model.apply, task.prepare, task.geometry, augment=options, positive=positive)
