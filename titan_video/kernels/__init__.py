"""Operators of the transformer block. Plain torch is the only implementation so far."""

from titan_video.kernels.reference import ada_layer_norm, gated_residual, layer_norm, rms_norm, rms_norm_rope

__all__ = ["ada_layer_norm", "gated_residual", "layer_norm", "rms_norm", "rms_norm_rope"]
