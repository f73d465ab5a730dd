"""A failing case in files: its arrays, and a script of three lines that calls the target with them again.

What lies in the .npz: `x` `[num_tokens, hidden]`, `topk_idx`, `topk_weights` `[num_tokens, num_topk]`, the weights by
the names of `reference.Weights`, and `about`, a JSON text of all else. bfloat16, which NumPy does not know, lies as
float32.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reference import MoEConfig, Weights
from reference.arrays import Array

from .inputs import Inputs
from .properties import PROPERTIES, Property
from .search import judge
from .target import Target, answers, arrays_of

SCRIPT = '''"""{story}"""

from pathlib import Path

from {module} import Saved

saved = Saved.load(Path(__file__).with_suffix(".npz"))
print(saved.judge())  # calls the target in this process; saved.inputs has x, topk_idx, topk_weights and weights
'''


@dataclass(frozen=True)
class Saved:
    """A property and the inputs for which it fails of a target."""

    target: Target
    asked: Property
    inputs: Inputs

    def judge(self) -> str:
        """What is wrong, by calling the target in this process."""
        finding = judge(self.asked, self.inputs, lambda weights, calls: answers(self.target, weights, calls))
        return f"{self.asked.name} {'fails' if finding.wrong else 'holds'}: {finding.wrong or self.asked.claim}"

    def save(self, folder: Path, story: str) -> Path:
        """Write both files, named by the property; returns the script's path."""
        arrays = self.inputs.call()._asdict() | arrays_of(self.inputs.weights)
        about = {"target": asdict(self.target), "property": self.asked.name, "config": asdict(self.inputs.config)}
        del arrays["strided"]
        script = folder / f"{self.asked.name}.py"
        known: dict[str, Any] = {name: _known(array) for name, array in arrays.items()}
        np.savez(script.with_suffix(".npz"), about=json.dumps(about), **known)
        text = SCRIPT.format(story=story.replace("\\", "/").replace('"', "'"), module=__name__)
        script.write_text(text, encoding="utf-8")
        return script

    @classmethod
    def load(cls, file: Path) -> Saved:
        """What `save` wrote."""
        with np.load(file) as archive:
            arrays: dict[str, Any] = dict(archive)
        about = json.loads(str(arrays.pop("about")))
        config = MoEConfig(**about["config"])
        x, idx, factors = arrays.pop("x"), arrays.pop("topk_idx"), arrays.pop("topk_weights")
        arrays = {n: a if n == "router" else a.astype(config.numpy_dtype) for n, a in arrays.items()}
        asked = next(each for each in PROPERTIES if each.name == about["property"])
        inputs = Inputs(config, Weights(**arrays), x.astype(config.numpy_dtype), idx, factors)
        return cls(Target(**about["target"]), asked, inputs)


def _known(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
