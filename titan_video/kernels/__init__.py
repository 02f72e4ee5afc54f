"""Operators of the transformer block. Plain torch is the only implementation so far."""

from titan_video.kernels.reference import ada_layer_norm, gated_residual, layer_norm, mean_square, rms_norm, rms_norm_rope, wide

__all__ = ["ada_layer_norm", "gated_residual", "layer_norm", "mean_square", "rms_norm", "rms_norm_rope", "wide"]
