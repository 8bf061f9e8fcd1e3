"""The experiments of `experiments.gru_speech`; a variant follows the colon of `--config=configs/gru_speech.py:VARIANT`.

    python -m experiments.gru_speech --config=configs/gru_speech.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.model.hidden=512`, `--config.data.test_speakers=lucas`.
Every variant has a form `VARIANT_tiny` that runs through all its phases in under a minute and learns nothing.

What a setting means is said where it is declared: `experiments.gru_speech.config`,
`experiments.common.training.config`.
Rates count the gate matrices alone, as RTMobile does. The paper's first rho is not published; all else about rho, and
which part of a rate each of BSP's steps takes, is that of its released code and models.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import cnn
from experiments.common.settings import defaults, named
from experiments.gru_speech.config import Config

Settings = dict[str, Any]
RATES = (10, 20, 29, 80, 103, 245, 301)
# What the rows step takes of a rate in a narrow network: a tenth of the rows of 48 units is 4.
NARROW = {10: 2.0, 20: 4.0, 29: 2.0, 80: 4.0, 103: 5.0, 245: 8.0, 301: 10.0}

SPEEDS = (0.87, 1.0, 1.15)


def arm(structure: str, rate: int, method: str = "admm", narrow: bool = True) -> Settings:
    """One compression, named after what it is; a wide network splits the rate as the released ones do."""
    name = f"{structure}_{rate}x" + ("" if method == "admm" else f"_{method}")
    rows = NARROW.get(rate, 0.0) if narrow else 0.0
    return {"name": name, "structure": structure, "rate": float(rate), "row_rate": rows, "method": method}


def same_budget() -> Settings:
    """The dense network trained on for as many epochs."""
    return {"name": "dense_same_budget", "structure": "bsp", "rate": 10.0, "row_rate": 0.0, "method": "dense"}


def compared(rate: int, narrow: bool = True) -> tuple[Settings, ...]:
    """What BSP is compared with at one rate: other structures, its own steps alone, and no ADMM."""
    others = ("unstructured", "block", "rows", "columns", "coarse", "bsp_columns", "bsp_rows", "bsp_tiles")
    return (*(arm(s, rate, narrow=narrow) for s in others), arm("bsp", rate, "one_shot", narrow))


def rtmobile(epochs: int, lr: float, every: int) -> Settings:
    """ADMM with the paper's rule for rho, above 0.02 in steps of 0.02, and the penalty inside the gradient."""
    return cnn.admm(epochs, lr, 0.1, rho_schedule="rtmobile", final=0.1, every=every)


def pull(updates: int, lr: float, every: int, epochs: int) -> Settings:
    """ADMM with so many updates, decoupled from the optimizer, that lets the network learn meanwhile.

    Between two updates the first rho takes a twentieth of a weight's distance to Z (lr * rho * every = 0.05); each
    further one 1.4 times as much, up to twelve. Four times as much at first, or a learning rate that falls to a tenth
    inside ADMM, and the network came out of it knowing nothing (`fsdd` at 29x: docs/notes/recipes.md).
    """
    rho = float(f"{0.05 / (lr * every):.3g}")
    more = {"rho_factor": 1.4, "rho_stages": min(updates, 12), "every": every, "final": 0.5, "decoupled": True}
    return cnn.admm(epochs, lr, rho, **more)


def base(
    variant: str, hidden: int, epochs: tuple[int, int, int, int, int], lr: float, every: int, updates: int = 1
) -> Settings:
    """What all variants share.

    Args:
      variant: its name.
      hidden: units.
      epochs: of the dense training, of BSP's first step (ADMM, retraining), and of its second.
      lr: of them all.
      every: steps between updates of Z and U.
      updates: an epoch.
    """
    dense, column, column_retrain, row, row_retrain = epochs
    c = defaults(
        Config,
        variant=variant,
        dense=cnn.fit(dense, lr, final=0.02),
        column=pull(column * updates, lr, every, column),
        column_retrain=cnn.fit(column_retrain, lr, final=0.3),
        row=pull(row * updates, lr, every, row),
        row_retrain=cnn.fit(row_retrain, lr, final=0.02),
        arms=(arm("bsp", 10),),
        clip=1.0,
    )
    c["model"] |= {"hidden": hidden}
    c["decoding"] |= {"lm_weights": (0.5, 1.0, 2.0, 4.0), "rewards": (-1.0, 0.0, 1.0), "prior": 0.7}
    return c


def tones(variant: str) -> Settings:
    """Generated two-tone sounds, 2 x 48 units, BSP at 10x and 29x with one-shot and dense at the same budget beside it.

    Needs no data. Shows that everything works; its error rates say nothing about speech.
    """
    c = base(variant, 48, (20, 30, 4, 20, 20), 5e-3, 15)
    c["batch"] = 4
    c["arms"] = (arm("bsp", 10), arm("bsp", 29), arm("unstructured", 10), arm("bsp", 10, "one_shot"), same_budget())
    return c


def timit(variant: str) -> Settings:
    """TIMIT from --data_dir, the paper's 2 x 1024 network, RMSprop at its learning rate; every rate from 10x to 301x.

    The paper's row: 18.8 % at 10x, with context-dependent states and Kaldi's decoder; here 48 phones and a bigram.
    For a GPU. Not run: the corpus is not free.
    """
    c = base(variant, 1024, (24, 20, 12, 20, 12), 4e-4, 462)
    c |= {name: rtmobile(20, 4e-4, 462) for name in ("column", "row")}
    c |= {f"{name}_retrain": cnn.fit(12, 2e-4, final=0.02) for name in ("column", "row")}
    c["data"] |= {"name": "timit", "sa": False}
    c["optimizer"], c["clip"] = "rmsprop", 0.0
    c["arms"] = (*(arm("bsp", r, narrow=False) for r in RATES), *compared(29, narrow=False), same_budget())
    c["paper"] = {"quantity": "metric.compressed", "value": 0.188}
    return c


def sample(variant: str, arms: tuple[Settings, ...]) -> Settings:
    """The free sample of TIMIT: 10 speakers to learn from, 2 others for dev and 2 for test; 2 x 192 units.

    A stand-in: 5 minutes of training speech, learned at three speeds. The network is narrower than the paper's for the
    sake of CPU time.
    """
    c = base(variant, 192, (10, 5, 1, 3, 6), 3e-3, 25, 3)
    c["data"] |= {"name": "timit_sample", "speeds": SPEEDS}
    c["batch"] = 4
    c["model"]["dropout"] = 0.3
    c["arms"] = arms
    return c


def sample_all(variant: str) -> Settings:
    """`timit_sample` at every rate from 10x to 301x, and BSP's baselines at 29x."""
    return sample(variant, (*(arm("bsp", r) for r in (29, 10, 20, 80, 103, 245, 301)), *compared(29), same_budget()))


def sample_two(variant: str) -> Settings:
    """`timit_sample` at 10x and 29x, for further seeds."""
    return sample(variant, (arm("bsp", 29), arm("bsp", 10), arm("unstructured", 29), arm("bsp", 29, "one_shot")))


def digits(variant: str, arms: tuple[Settings, ...], by: str = "speaker") -> Settings:
    """Strings of spoken digits by CTC, 2 x 128 units, scored by word; by default the speaker george is never heard.

    A stand-in for connected digits; five speakers, each at three speeds, to learn from. Another unseen speaker:
    `--config.data.test_speakers=lucas`.
    """
    c = base(variant, 128, (12, 4, 1, 3, 5), 3e-3, 38, 3)
    c["data"] |= {"name": "fsdd", "by": by, "speeds": SPEEDS}
    c["features"]["mels"] = 20  # 8 kHz
    c["loss"], c["batch"] = "ctc", 16
    c["arms"] = arms
    c["decoding"] |= {"lm_weights": (0.0,), "rewards": (-1.0, 0.0, 1.0)}
    return c


def digits_all(variant: str) -> Settings:
    """`fsdd` at every rate from 10x to 301x, an unseen speaker, and BSP's baselines at 29x."""
    return digits(variant, (*(arm("bsp", r) for r in (29, 10, 20, 80, 103, 245, 301)), *compared(29), same_budget()))


def digits_two(variant: str) -> Settings:
    """`fsdd` at 10x and 29x with one-shot beside both, for further seeds and other unseen speakers."""
    return digits(variant, (arm("bsp", 29), arm("bsp", 10), arm("bsp", 29, "one_shot"), arm("bsp", 10, "one_shot")))


def digits_rtmobile(variant: str) -> Settings:
    """`fsdd_two` with RTMobile's rule for rho and the penalty inside the gradient, in as many epochs."""
    c = digits(variant, (arm("bsp", 29), arm("bsp", 10)))
    c |= {"column": rtmobile(4, 3e-3, 38), "row": rtmobile(3, 3e-3, 38)}
    return c


def digits_unified(variant: str) -> Settings:
    """`fsdd` with 4x4 blocks pruned, and with nine tenths of what is left unified too, at three rates."""
    return digits(variant, tuple(arm(s, r) for r in (4, 10) for s in ("unified", "block")) + (arm("unified", 1),))


def digits_official(variant: str) -> Settings:
    """`fsdd` at 10x and 29x on its official split: every speaker is heard in training."""
    return digits(variant, (arm("bsp", 29), arm("bsp", 10)), by="official")


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "tones": tones,
    "timit": timit,
    "timit_sample": sample_all,
    "timit_sample_two": sample_two,
    "fsdd": digits_all,
    "fsdd_two": digits_two,
    "fsdd_rtmobile": digits_rtmobile,
    "fsdd_unified": digits_unified,
    "fsdd_official": digits_official,
}


def tiny(c: Settings) -> Settings:
    """One compression of a handful of utterances; for the tones by the rows step alone, and one-shot: for tests."""
    c["data"] |= {"train": 8, "dev": 2, "test": 3}
    c["model"] |= {"hidden": 16, "layers": 1}
    c["features"] |= {"coefficients": 5}
    c["batch"], c["eval_batch"], c["buckets"], c["timing_rounds"] = 4, 4, 2, 3
    c["dense"] |= {"epochs": 1}
    for name in ("column", "row"):
        c[name] |= {"epochs": 1, "every": 1}
        c[f"{name}_retrain"] |= {"epochs": 1}
    rows = tuple(arm("bsp", 10, method, narrow=False) for method in ("admm", "one_shot"))
    c["arms"] = rows if c["data"]["name"] == "tones" else c["arms"][:1]
    c["decoding"] |= {"lm_weights": c["decoding"]["lm_weights"][:2], "rewards": (0.0,)}
    return c


def get_config(variant: str = "tones") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
