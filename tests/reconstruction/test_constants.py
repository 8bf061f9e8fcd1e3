"""Which data stand behind the solver's constants, and behind the figures of docs/post_training.md: no test images."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from benchmarks import post_training_layers
from compressx.reconstruction.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "post_training.md").read_text()
RECORDED = sorted((ROOT / "docs" / "results" / "post_training_layers").glob("*/summary.json"))


def test_every_constant_names_its_data() -> None:
    section = PAGE.split("## What was chosen on which data")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "`" in line]
    said: dict[str, str] = {}
    for names, values, *_ in (r for r in rows if len(r) == 3):
        said |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    assert said == {k: json.dumps(v) if isinstance(v, str) else str(v) for k, v in defaults.items()}


def test_the_benchmark_reads_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.common import data

    asked: list[str] = []

    def load(name: str, split: str) -> Any:
        asked.append(split)
        return SimpleNamespace(inputs=np.zeros((4, 2, 2, 3), np.uint8))

    monkeypatch.setattr(data, "load", load)
    assert post_training_layers.images(3).shape == (3, 2, 2, 3)
    assert asked == ["train"]


@pytest.mark.parametrize(("kernel", "stride", "pad"), [((3, 3), 1, 1), ((3, 3), 2, 1), ((1, 1), 2, 0), ((5, 3), 1, 0)])
def test_patches_are_what_a_convolution_multiplies(kernel: tuple[int, int], stride: int, pad: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 7, 3)).astype(np.float32)
    w = rng.standard_normal((*kernel, 3, 4)).astype(np.float32)
    m = post_training_layers.patches(x, kernel, stride, pad)
    names = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(w), (stride, stride), [(pad, pad)] * 2, dimension_numbers=names, precision="highest"
    )
    np.testing.assert_allclose(m @ w.reshape(-1, 4), np.asarray(y).reshape(-1, 4), atol=1e-4)


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.parent.name)
def test_recorded_layers_are_the_solver_never_above_a_refitted_projection(path: Path) -> None:
    found = json.loads(path.read_text())["post_training_layers"]
    assert found["of"] == len(found["layers"]) > 0
    for layer in found["layers"]:
        errors = layer["errors"]
        least = min(errors[n] for n in errors if n.startswith(("magnitude", "diagonal")))
        assert errors["ours"] <= least, layer["layer"]
    assert found["mean"]["ours"] == pytest.approx(np.mean([e["errors"]["ours"] for e in found["layers"]]))
