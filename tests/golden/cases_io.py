"""Read a golden-v1 case: tensors in float64 (float32 inputs are cast to float32 first), and compare outputs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def decoded(node: Any) -> Any:
    """Turn tensor nodes into torch tensors; floating ones end as float64."""
    if isinstance(node, dict) and set(node) == {"shape", "dtype", "data"}:
        tensor = torch.from_numpy(np.array(node["data"], dtype=node["dtype"]).reshape(node["shape"]))
        return tensor.double() if tensor.is_floating_point() else tensor
    if isinstance(node, dict):
        return {key: decoded(value) for key, value in node.items()}
    if isinstance(node, list):
        return [decoded(value) for value in node]
    return node


def load(path: Path) -> dict[str, Any]:
    """Load a case; every variant gets its inputs and params merged over the common ones."""
    case = decoded(json.loads(path.read_text(encoding="utf-8")))
    for variant in case["variants"]:
        variant["inputs"] = {**case.get("inputs", {}), **variant.get("inputs", {})}
        variant["params"] = {**case.get("params", {}), **variant.get("params", {})}
    return case


def tolerance_of(case: dict[str, Any], variant: dict[str, Any]) -> tuple[float, float]:
    """Return (atol, rtol): the case's, or those that a variant's notes name (a reference without a float64 path)."""
    noted = re.search(r"atol=([0-9.e-]+), rtol=([0-9.e-]+)", str(variant.get("notes") or ""))
    if noted:
        return float(noted[1]), float(noted[2])
    return case["tolerance"].get("atol", 0.0), case["tolerance"].get("rtol", 0.0)


def compare(expected: dict[str, Any], ours: dict[str, Any], atol: float, rtol: float) -> str | None:
    """Return the first disagreement, or None. Everything that ours names must be among the expected outputs."""
    for name, value in ours.items():
        if name not in expected:
            raise KeyError(f"the case has no output {name!r}: {sorted(expected)}")
        want = torch.as_tensor(expected[name], dtype=torch.float64)
        have = value.detach().double() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        if have.shape != want.shape:
            return f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        if not torch.allclose(have, want, atol=atol, rtol=rtol):
            return f"{name}: off by {float((have - want).abs().max()):.3g} (atol {atol:g}, rtol {rtol:g})"
    return None
