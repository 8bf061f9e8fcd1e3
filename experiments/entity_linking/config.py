"""The configuration of `experiments.entity_linking`, and what is built from it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from compressx.formats import CompressedFileError
from experiments.common import settings, training
from experiments.common.settings import Paper, Save, check_seed
from experiments.common.training import ConfigError, Plan
from experiments.entity_linking import linking
from experiments.entity_linking.linking import corpus, encode, files, world
from experiments.entity_linking.linking.files import Corpora


@dataclass(frozen=True)
class Data:
    """The documents and how they become arrays.

    Attributes:
      name: a key of `linking.CORPORA`.
      also: further sets to test on, of those the corpora have.
      world: seed of the generated world.
      train: how many training documents to use, from the front; 0 is all.
      dev: likewise.
      test: likewise.
      dim: length of vectors ("generated", "aida_ppr").
      most_inlinks: words of in-links kept for an entity.
      counts: whether priors are mixed with counts of training mentions.
      strength: how many counts a prior is worth.
      coreference: whether short names of persons take the candidates of the long ones ("aida_ppr").
      slots: mentions of a row; a longer document is cut.
      candidates: candidates of a mention.
      context: words around a mention.
    """

    name: str = "generated"
    also: tuple[str, ...] = ()
    world: int = 0
    train: int = 0
    dev: int = 0
    test: int = 0
    dim: int = 32
    most_inlinks: int = 8
    counts: bool = False
    strength: float = 3.0
    coreference: bool = False
    slots: int = 24
    candidates: int = 8
    context: int = 16

    def __post_init__(self) -> None:
        if self.name not in linking.CORPORA:
            raise ConfigError(f"name={self.name!r} is impossible; it must be one of {', '.join(linking.CORPORA)}")
        for name in ("slots", "candidates", "dim", "most_inlinks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is impossible; it must be 1 or more")
        for name in ("train", "dev", "test", "context", "world"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is impossible; it must be 0 or more")
        if self.strength <= 0:
            raise ConfigError(f"strength={self.strength} is impossible; it must be positive")


@dataclass(frozen=True)
class Arm:
    """Another linker trained beside the main one on the same documents, dense.

    Attributes:
      name: of its folder and its row.
      linker: settings of `linking.Linker` that differ from the main one's.
      learning: likewise of `linking.Learning`.
      order: of decisions; "" is the main one's.
      epochs: 0 is as many as the main one.
      lr: 0 is the main one's.
    """

    name: str
    linker: dict[str, Any] = dataclasses.field(default_factory=dict)
    learning: dict[str, Any] = dataclasses.field(default_factory=dict)
    order: str = ""
    epochs: int = 0
    lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      plan: how the main linker is trained, and what its weights are compressed to (no stages: nothing).
      variant: its name.
      seed: of the weights, the order of documents, dropout and random orders.
      data: the documents.
      linker: the main linker.
      learning: how it learns.
      order: in which it decides: "offset", "size" or "random".
      arms: others beside it.
      batch: rows a step.
      eval_batch: rows a step of evaluation.
      pages: documents shown on the page.
      rules: file of rules that replace those of the only stage, with its schedule; "" for none.
      save: when checkpoints are written.
      paper: what to compare with.
    """

    plan: Plan
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    linker: linking.Linker = linking.Linker()
    learning: linking.Learning = linking.Learning()
    order: str = "offset"
    arms: tuple[Arm, ...] = ()
    batch: int = 8
    eval_batch: int = 64
    pages: int = 12
    rules: str = ""
    save: Save = Save(seconds=120.0)
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for arm in all_arms(self):
            if arm.order not in corpus.ORDERS:
                raise ConfigError(f"order={arm.order!r} is impossible; it must be one of {', '.join(corpus.ORDERS)}")
            linker_of(self, arm)
        names = [arm.name for arm in all_arms(self)]
        if len(set(names)) < len(names) or not all(n.isidentifier() for n in names):
            raise ConfigError(f"arms: {names} must be different plain names, and 'dense' is the main linker's")
        fits = [self.plan.dense, *(f for s in self.plan.stages for f in (s.admm, s.retrain))]
        if any(f.distill or f.label_smoothing for f in fits):
            raise ConfigError("distill and label_smoothing do not go with the losses of linking; leave them 0")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    try:
        return settings.with_rules(training.parse(Config, config))
    except (ConfigError, CompressedFileError):
        raise
    except ValueError as error:  # what the library's own dataclasses refuse
        raise ConfigError(str(error)) from None


def all_arms(config: Config) -> tuple[Arm, ...]:
    """The main linker as the first arm, and the others."""
    arms = (Arm("dense"), *config.arms)
    return tuple(dataclasses.replace(arm, order=arm.order or config.order) for arm in arms)


def linker_of(config: Config, arm: Arm) -> tuple[linking.Linker, linking.Learning]:
    """An arm's linker and learning."""
    made = []
    for base, changes in ((config.linker, arm.linker), (config.learning, arm.learning)):
        whole = dataclasses.asdict(base) | changes
        try:
            made.append(training.parse(type(base), whole, f"arm {arm.name!r}"))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None
    linker, learning = made
    assert isinstance(linker, linking.Linker) and isinstance(learning, linking.Learning)
    if learning.method == "reinforce" and "belief" in linker.features:
        raise ConfigError(f"arm {arm.name!r}: 'belief' decides all mentions together and cannot learn by 'reinforce'")
    return linker, learning


def load(config: Config, data_dir: str | None) -> Corpora:
    """The corpora, cut to the numbers of documents the config asks for.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    d = config.data
    try:
        if d.name == "generated":
            if d.also or d.counts or d.coreference:
                raise ConfigError("data: the generated world has no other sets, and its priors are as they are")
            found = files.generated(d.world, d.dim, d.most_inlinks, world.Sizes())
        elif d.name == "aida_ppr":
            found = files.aida_ppr(
                data_dir,
                dim=d.dim,
                most_inlinks=d.most_inlinks,
                counts=d.counts,
                strength=d.strength,
                coreference=d.coreference,
                near=max(1, d.context // 2),
                also=d.also,
            )
        else:
            found = files.deep_ed(
                data_dir, counts=d.counts, strength=d.strength, most_inlinks=d.most_inlinks, also=d.also
            )
    except ConfigError:
        raise
    except (OSError, training.CheckpointError):
        raise
    except ValueError as error:
        raise error if type(error) is not ValueError else ConfigError(f"data: {error}") from None
    for split in ("train", "dev", "test"):
        wanted, there = getattr(d, split), len(found.documents[split])
        if wanted > there:
            raise ConfigError(f"data.{split}={wanted} is impossible; {d.name} has {there} documents there")
        if wanted:
            found.documents[split], found.plain[split] = found.documents[split][:wanted], found.plain[split][:wanted]
    return found


def encoded(config: Config, corpora: Corpora, split: str, order: str) -> linking.Encoded:
    """A split as rows; of training documents only the mentions that can be linked rightly."""
    d = config.data
    return encode.encode(
        corpora.documents[split],
        corpora.knowledge,
        slots=d.slots,
        candidates=d.candidates,
        context=d.context,
        order=order,
        seed=config.seed,
        answerable=split == "train",
    )
