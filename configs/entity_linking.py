"""The experiments of `experiments.entity_linking`. A variant is the part after the colon of `--config=...:VARIANT`.

    python -m experiments.entity_linking --config=configs/entity_linking.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.plan.dense.epochs=5`, `--config.data.slots=100`. Every variant
has a form `VARIANT_tiny` that runs through all its phases in seconds and learns nothing. What a setting means is said
where it is declared: `experiments.entity_linking.config.Config`, and `Linker` and `Learning` of
`experiments.entity_linking.linking`.

    generated          a world that needs no data: ablations, and the main linker at 3 bits a vector entry
    aida_ladder        on AIDA's stand-in, the ladder of features
    aida_table         the ladder, the global baseline, both local models, attentions, orders, learning
    aida_compressed    the main linker on the stand-in, half of its vector entries pruned, 4 bits for the others
    aida_3bit          3 bits for every vector entry
    aida_structured    blocks of 16 dimensions pruned, 8 bits for the others
    deep_ed            DCA's own layout and settings; needs its files (docs/entity_linking.md)
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.cnn import admm, fit, stage
from experiments.common.settings import defaults, named
from experiments.common.training import Fit, Plan
from experiments.entity_linking.config import Config

Settings = dict[str, Any]

LOCAL = ("local", "prior")
TYPED = ("local", "prior", "types")
ONE_HOP = ("local", "prior", "entities", "types")
ALL = ("local", "prior", "entities", "types", "words")


def arm(name: str, features: tuple[str, ...] = ALL, **more: Any) -> Settings:
    """An arm: a linker's settings, `learning=`, `order=`, `epochs=`, `lr=` beside them."""
    own = {k: more.pop(k) for k in ("learning", "order", "epochs", "lr") if k in more}
    return {
        "name": name,
        "linker": {"features": features, **more},
        "learning": own.get("learning", {}),
        "order": own.get("order", ""),
        "epochs": own.get("epochs", 0),
        "lr": own.get("lr", 0.0),
    }


def base(variant: str) -> Settings:
    """What all variants share: the whole linker on the generated world."""
    c = defaults(Config, variant=variant, plan=Plan(Fit(8, 1e-2)), eval_batch=32)
    c["data"] |= {"candidates": 4, "context": 6}
    return c


VECTORS = r"params/vectors/(entities|words)"


def bits(number: int) -> tuple[tuple[str, Settings], ...]:
    """Rules that put every entry of the vector tables on levels of so many bits, a scale for every dimension."""
    return ((VECTORS, {"kind": "quantize", "bits": number, "per": "channel", "zero_level": True}),)


def pruned(density: float, number: int) -> tuple[tuple[str, Settings], ...]:
    """Rules that keep that share of the entries of each vector table, on levels of so many bits."""
    parts = [{"kind": "unstructured", "density": density}, {"kind": "quantize", "bits": number}]
    return ((VECTORS, {"kind": "all", "parts": parts}),)


def generated(variant: str) -> Settings:
    """A generated world whose names are shared across topics: the ladder of features, and 3 bits.

    Expected: largest prior 47 %, local and types 80 %, the whole linker 91 %. Needs no data.
    Launch: `python -m experiments.entity_linking --config=configs/entity_linking.py:generated --workdir=runs/linking`.
    """
    c = base(variant)
    c["arms"] = (arm("local", LOCAL), arm("local_types", TYPED), arm("one_hop", ONE_HOP))
    rules = bits(3)
    c["plan"] |= {
        "stages": (stage(rules, admm(4, 1e-3, 1e-2), fit(4, 2e-3)),),
        "baselines": ("one_shot",),
    }
    return c


def aida(variant: str) -> Settings:
    """The stand-in for AIDA: PPRforNED's candidates, no text. What was chosen on dev: docs/entity_linking.md."""
    c = base(variant)
    c["order"] = "size"
    c["data"] |= {
        "name": "aida_ppr",
        "also": ("kore50", "oke2015", "oke2016", "wiki_fair"),
        "dim": 128,
        "most_inlinks": 16,
        "counts": True,
        "slots": 64,
        "candidates": 8,
        "context": 32,
    }
    c["batch"], c["eval_batch"] = 4, 16
    c["plan"] |= {"dense": fit(10, 3e-3)}
    return c


def aida_ladder(variant: str) -> Settings:
    """The ladder of features on the stand-in. Goal: the whole linker at 90 % or more on the test documents.

    The baselines of most in-links and of the largest prior are in every run's table. Cost: about 2 minutes of one core.
    """
    c = aida(variant)
    c["arms"] = (
        arm("prior_scored", ("prior",)),
        arm("local", LOCAL),
        arm("local_types", TYPED),
        arm("one_hop", ONE_HOP),
    )
    return c


def aida_table(variant: str) -> Settings:
    """The ladder and every other choice: the global baseline, the CNN, attentions, orders, ways of learning.

    The two arms whose step costs four to eight times the others' have fewer epochs. Cost: about 7 minutes of one core.
    """
    c = aida_ladder(variant)
    c["arms"] += (
        arm("belief", ("belief", "prior", "types"), epochs=4),
        arm("cnn", local="cnn", epochs=3),
        arm("soft", attention="soft"),
        arm("mean", attention="mean"),
        arm("offset", order="offset"),
        arm("random", order="random"),
        arm("scheduled", learning={"own_decisions": 0.5}),
        arm("reinforce", learning={"method": "reinforce"}),
    )
    return c


def aida_small(variant: str, rules: tuple[tuple[str, Settings], ...]) -> Settings:
    """The whole linker on the stand-in, compressed. Goal: within the seeds' spread of dense at 8x fewer bytes."""
    c = aida(variant)
    c["plan"] |= {
        "stages": (stage(rules, admm(3, 1e-3, 1e-2), fit(3, 1e-3)),),
        "baselines": ("one_shot",),
    }
    return c


def structured(variant: str) -> Settings:
    """Blocks of 16 dimensions of a vector are pruned, three of ten stay, on 8 bits."""
    parts = [{"kind": "block", "block": [1, 16], "density": 0.3}, {"kind": "quantize", "bits": 8}]
    return aida_small(variant, ((VECTORS, {"kind": "all", "parts": parts}),))


def deep_ed(variant: str) -> Settings:
    """DCA's layout and settings: 300 dimensions, 100 in-link words, 100 mentions a document, Adam at 2e-4.

    Paper: 94.64 % on AIDA-B with SL; a user's run of the authors' code 92.8 %. Not run here: its files have no public
    copy in a form that could be fetched.
    """
    c = base(variant)
    c["data"] |= {
        "name": "deep_ed",
        "also": ("msnbc", "aquaint", "ace2004", "clueweb", "wikipedia"),
        "most_inlinks": 100,
        "slots": 100,
        "candidates": 8,
        "context": 100,
    }
    c["batch"], c["eval_batch"] = 1, 16
    c["plan"] |= {"dense": fit(100, 2e-4, schedule="constant")}
    c["paper"] = {"quantity": "metric.dense", "value": 0.9464}
    return c


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "generated": generated,
    "aida_ladder": aida_ladder,
    "aida_table": aida_table,
    "aida_compressed": lambda variant: aida_small(variant, pruned(0.5, 4)),
    "aida_3bit": lambda variant: aida_small(variant, bits(3)),
    "aida_structured": structured,
    "deep_ed": deep_ed,
}


def tiny(c: Settings) -> Settings:
    """The same phases on a handful of documents: for tests."""
    c["data"] |= {"train": 12, "dev": 4, "test": 5, "also": c["data"]["also"][:1]}
    c["batch"], c["eval_batch"] = 2, 4
    c["arms"] = c["arms"][:2]
    c["plan"]["dense"] |= {"epochs": 1}
    for s in c["plan"]["stages"]:
        s["admm"] |= {"epochs": 1, "every": 2}
        s["retrain"] |= {"epochs": 1}
    return c


def get_config(variant: str = "generated") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
