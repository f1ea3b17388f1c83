"""Pre-training of a small backbone from plain text: causal or encoder-decoder, on a CPU or a GPU, resumable."""

from deltatune.backbones.pretrain.loop import pretrain
from deltatune.backbones.pretrain.settings import Settings, parse_settings, read_settings

__all__ = ["Settings", "parse_settings", "pretrain", "read_settings"]
