"""The two training studies: partially trained flows, and pools of Vision Transformers."""
