"""Linear probes of frozen backbones."""

from torchlin.probe.attach import ProbedModel, attach_head, load_probe
from torchlin.probe.backbone import Backbone, load_backbone
from torchlin.probe.preprocess import Preprocess
from torchlin.probe.probe import LinearProbe, ProbeResult
from torchlin.probe.sgd import Recipe

__all__ = [
    "Backbone",
    "LinearProbe",
    "Preprocess",
    "ProbeResult",
    "ProbedModel",
    "Recipe",
    "attach_head",
    "load_backbone",
    "load_probe",
]
