"""Gradients that lie on the host, beside a device that computes: fsdp_offload_params on GPUs."""

import torch

import launch
import models
from engine.placement import Replicated
from engine.processes import Processes
from tests.support.helpers import composed


def test_the_norm_of_offloaded_gradients_is_where_the_other_metrics_are():
    """metrics.Window stacks them, and torch stacks no tensors of two devices."""
    settings = launch.settings_of(composed("model=tiny", "lr=1e-3"))
    placement = Replicated(Processes(), settings.model)
    placement.place_policy(models.load_model(settings.model, trainable=True), settings.run)
    for parameter in placement.policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    placement.device = torch.device("meta")  # a device that is none of the gradients'
    norm = placement.step(1e-3, 1.0)
    assert isinstance(norm, torch.Tensor) and norm.device == placement.device
